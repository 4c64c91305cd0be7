"""Tokens of vision transformers against timm's own, positions against the formula, masks: exact, keyed, in blocks."""

import math

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sslctl.factory.exportable import feature_names, find_backbone
from sslctl.methods.cpc import Context, cut, turned
from sslctl.models.backbones import Backbone, Timm
from sslctl.models.preprocess import Preprocess
from sslctl.models.vit import (
    fix_positions_,
    gather_tokens,
    initialize_,
    patchify,
    require_vit,
    sine_cosine,
    tokens,
    unpatchify,
    xavier,
)
from sslctl.ops.masks import block_masks, random_order
from sslctl.random import Key
from tests.methods import built

ROTARY = {"use_rot_pos_emb": True, "init_values": 0.5}
FAMILIES = {
    "ViT": (VisionTransformer, {}),
    "ViT with registers": (VisionTransformer, {"reg_tokens": 2, "no_embed_class": True, "dynamic_img_size": True}),
    "ViT without a class token": (VisionTransformer, {"class_token": False, "global_pool": "avg"}),
    "EVA-02": (Eva, ROTARY | {"swiglu_mlp": True, "dynamic_img_size": True}),
    "DINOv3": (
        Eva,
        ROTARY | {"rope_type": "dinov3", "use_abs_pos_emb": False, "num_reg_tokens": 2, "rope_rotate_half": True},
    ),
    "Eva, rotary positions of each block": (Eva, ROTARY | {"rope_type": "mixed", "dynamic_img_size": True}),
    "Eva without rotary positions": (Eva, {}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def vit(request):
    family, arguments = FAMILIES[request.param]
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "in_chans": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return family(num_classes=0, **sizes, **arguments).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def key(count=200, epoch=0, start=0):
    return Key(0, epoch, torch.arange(start, start + count))


# --- Tokens ---


def test_tokens_are_timms_own(vit, images):
    torch.testing.assert_close(tokens(vit, images, None, None, None), vit.forward_features(images))


def test_all_patches_kept_is_no_change_and_their_order_does_not_matter(vit, images):
    whole = tokens(vit, images, None, None, None)
    order, prefix = torch.randperm(16, generator=torch.Generator().manual_seed(2)), vit.num_prefix_tokens
    for keep in (order, order.expand(3, -1)):
        kept = tokens(vit, images, None, None, keep)
        torch.testing.assert_close(kept[:, prefix:], whole[:, prefix:][:, order], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(kept[:, :prefix], whole[:, :prefix], atol=1e-5, rtol=1e-4)
    keep, _ = random_order(key(3), "test", 16, 5)  # other patches of each image
    each = torch.cat([tokens(vit, images[i : i + 1], None, None, keep[i]) for i in range(3)])
    torch.testing.assert_close(tokens(vit, images, None, None, keep), each, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["kept", "masked"])
def test_pixels_of_hidden_patches_do_not_reach_the_encoder(vit, images, how):
    keep, mask = random_order(key(3), "test", 16, 4)
    hidden = unpatchify(mask[..., None].expand(-1, -1, 48).float(), 4, 4).bool()
    leaf = images.clone().requires_grad_()
    arguments = (None, None, keep) if how == "kept" else (mask, torch.zeros(16), None)
    tokens(vit, leaf, *arguments).square().sum().backward()
    assert leaf.grad[hidden].abs().max() == 0
    assert leaf.grad[~hidden].abs().max() > 0


def test_the_mask_token_stands_where_the_mask_is(vit, images):
    mask = torch.zeros(3, 16, dtype=torch.bool)
    token = torch.full((16,), 3.0)
    assert torch.equal(tokens(vit, images, mask, token, None), tokens(vit, images, None, None, None))
    mask[:] = True  # nothing of the image is left
    out = tokens(vit, images, mask, token, None)
    torch.testing.assert_close(out[0], out[1])


def test_gathering_by_image_and_for_all():
    x = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(gather_tokens(x, torch.tensor([2, 0])), x[:, [2, 0]])
    each = gather_tokens(x, torch.tensor([[2], [1]]))
    assert torch.equal(each, torch.stack([x[0, [2]], x[1, [1]]]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ibot", "mae", "simmim", "ijepa", "msn", "dinov2", "dinov3"])
def test_methods_of_tokens_train_dinov3s_networks(name):
    """With registers and rotary positions, none absolute."""
    network = ("backbone=timm", "backbone.model=vit_small_patch16_dinov3_qkvb", "+backbone.kwargs.global_pool=token")
    network += ("+backbone.kwargs.patch_size=4", "+backbone.kwargs.embed_dim=16", "+backbone.kwargs.depth=1")
    ready = built(name, network=(*network, "+backbone.kwargs.num_heads=2"))
    first = ready.step()["loss"]
    assert torch.isfinite(first)
    for _ in range(3):
        last = ready.step()["loss"]
    assert torch.isfinite(last)
    assert last != first
    # What is evaluated is a network by itself, which a run keeps.
    method, preprocess = ready.method.eval(), Preprocess(1, 16, 16, [0.5], [0.5])
    _, arguments = find_backbone(method, feature_names(method, preprocess)[0], preprocess)
    timm.create_model("vit_small_patch16_dinov3_qkvb", embed_dim=16, depth=1, num_heads=2, **arguments)


def test_other_networks_are_refused_in_a_line():
    with pytest.raises(ValueError, match="backbone=small_vit"):
        require_vit(nn.Linear(2, 2))


# --- Positions ---


def test_sine_cosine_positions_equal_the_formula():
    actual = sine_cosine(8, 2, 3)
    for row in range(2):
        for column in range(3):
            for k in range(2):
                rate = 10_000 ** (-k / 2)
                expected = (
                    math.sin(column * rate),
                    math.cos(column * rate),
                    math.sin(row * rate),
                    math.cos(row * rate),
                )
                at = actual[row * 3 + column]
                assert (at[k].item(), at[2 + k].item(), at[4 + k].item(), at[6 + k].item()) == pytest.approx(expected)


def test_fixed_positions_are_fixed_and_leave_the_class_token_at_zero():
    backbone = Backbone(Timm("vit_tiny_patch16_224", 1, 16, {"patch_size": 4, "embed_dim": 16, "num_heads": 2}))
    fix_positions_(backbone)
    model = backbone.network.model
    assert not model.pos_embed.requires_grad
    assert model.pos_embed[0, 0].abs().max() == 0
    torch.testing.assert_close(model.pos_embed[0, 1:], sine_cosine(16, 4, 4))


def test_initial_weights_leave_what_was_given():
    """Also a bias whose weight did not fit."""
    backbone = Backbone(Timm("vit_tiny_patch16_224", 1, 16, {"patch_size": 4, "embed_dim": 16, "num_heads": 2}))
    model, given = backbone.network.model, ("patch_embed.proj.bias", "blocks.0.mlp.fc1.weight", "cls_token")
    backbone.pretrained = frozenset(f"network.model.{name}" for name in given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    initialize_(backbone, draw=xavier)
    left = [n for n, p in model.named_parameters() if (p == 1).all() and "norm" not in n and n != "pos_embed"]
    assert sorted(left) == sorted(given)


def test_sine_cosine_positions_need_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4"):
        sine_cosine(6, 2, 2)


# --- Patches ---


def test_patchify_and_back():
    images = torch.rand(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(unpatchify(patches, 4, 2), images)
    assert torch.equal(patches[1, 4], images[1, :, 4:8, 4:8].permute(1, 2, 0).flatten())  # second row, second patch


# --- Masks ---


def test_random_order_keeps_as_many_as_it_says():
    keep, mask = random_order(key(), "mae", 49, 12)
    assert keep.shape == (200, 12)
    assert (mask.sum(1) == 37).all()
    assert not mask.gather(1, keep).any()
    assert (keep.diff(dim=1) > 0).all()
    share = mask.float().mean(0)  # every patch is hidden equally often
    assert (share - 37 / 49).abs().max() < 0.15


@pytest.mark.parametrize("rows", [4, 7, 14])
def test_block_masks_hide_exactly_what_they_should(rows):
    hidden = torch.arange(200) % (rows * rows // 2)
    mask = block_masks(key(), ["test"], rows, rows, hidden[None])[0]
    assert torch.equal(mask.sum(1), hidden)


def test_block_masks_are_blocks():
    hidden = torch.full((200,), 60)
    block = block_masks(key(), ["test"], 14, 14, hidden[None]).view(-1, 14, 14).int()
    scattered = random_order(key(), "test", 196, 136)[1].view(-1, 14, 14).int()

    def edges(mask):
        return (mask[:, 1:] != mask[:, :-1]).float().sum((1, 2)).mean() + (
            mask[:, :, 1:] != mask[:, :, :-1]
        ).float().sum((1, 2)).mean()

    assert edges(block) < 0.6 * edges(scattered)


@pytest.mark.parametrize(
    "make",
    [
        lambda k: random_order(k, "a", 49, 12)[1],
        lambda k: block_masks(k, ["a"], 7, 7, torch.full_like(k.index[None], 20))[0],
    ],
)
def test_masks_depend_on_seed_epoch_and_image_only(make):
    whole = make(key())
    assert torch.equal(whole[50:80], make(key(30, start=50)))
    assert not torch.equal(whole, make(key(epoch=1)))
    assert not torch.equal(whole, make(Key(1, 0, torch.arange(200))))


# --- CPC's patches and contexts ---


def test_overlapping_patches_are_pieces_of_the_image():
    images = torch.rand(2, 1, 32, 32)
    patches = cut(images, 7, 8)
    assert patches.shape == (2, 49, 1, 8, 8)
    assert torch.equal(patches[:, 0], images[..., :8, :8])
    assert torch.equal(patches[:, 48], images[..., -8:, -8:])
    assert torch.equal(patches[:, 1], images[..., :8, 4:12])


def test_contexts_see_no_row_below_their_own():
    torch.manual_seed(0)
    context = Context(4, 3)
    z = torch.rand(1, 5, 5, 4, requires_grad=True)
    context(z)[:, 2].square().sum().backward()
    assert z.grad[:, 3:].abs().max() == 0
    assert z.grad[:, :3].abs().min() >= 0
    assert z.grad[:, 2].abs().max() > 0


@pytest.mark.parametrize(("direction", "first"), [(0, (0, 0)), (1, (2, 0)), (2, (0, 0)), (3, (0, 2))])
def test_turning_makes_every_direction_downwards(direction, first):
    z = torch.arange(9.0).view(1, 3, 3, 1)
    out = turned(z, direction)
    assert out[0, 0, 0, 0] == z[0, *first, 0]
    step = {0: 3, 1: -3, 2: 1, 3: -1}[direction]
    assert (out[0, 1, :, 0] - out[0, 0, :, 0] == step).all()
