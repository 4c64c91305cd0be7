"""MAE, SimMIM, I-JEPA: values at known predictions, exact numbers of hidden patches, contexts and targets that do not meet."""

import math

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from sslctl.factory.from_config import Preprocess, build_backbone
from sslctl.losses import masked_mse
from sslctl.methods.ijepa import IJEPA
from sslctl.methods.mae import MAE
from sslctl.methods.simmim import SimMIM
from sslctl.ops.masks import block_masks, random_order, rectangles
from sslctl.random import Key
from sslctl.training.optim import parameter_groups
from tests.methods import built
from tests.one_view import a_batch, facts


def small_vit(size=28, channels=1, patch=4):
    kwargs = {"patch_size": patch, "embed_dim": 16, "depth": 1, "num_heads": 2}
    node = OmegaConf.create(
        {"_target_": "sslctl.models.backbones.Timm", "model": "vit_tiny_patch16_224", "kwargs": kwargs}
    )
    torch.manual_seed(0)
    return build_backbone(node, Preprocess(channels, size, size, [0.4] * channels, [0.3] * channels))


def mae(size=28, ratio=0.75, patch=4, channels=1):
    arguments = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2, "normalize_target": True}
    return MAE(small_vit(size, channels, patch), facts(channels, size), mask_ratio=ratio, **arguments)


def ijepa(size=28, **changes):
    arguments = {"targets": 4, "predictor_dim": 8, "predictor_depth": 1, "predictor_heads": 2}
    arguments |= {"initial_std": 0.02, "teacher_momentum": 0.9, "teacher_momentum_end": 1.0} | changes
    return IJEPA(small_vit(size), facts(size=size), **arguments)


# --- The loss ---


@pytest.mark.parametrize("pixels", [768, 48])
def test_predicting_nothing_of_normalised_patches_costs_n_minus_1_over_n(pixels):
    target = torch.rand(4, 10, pixels, dtype=torch.float64)
    mask = torch.rand(4, 10) < 0.75
    value = masked_mse(torch.zeros_like(target), target, mask, normalize_target=True)
    assert value.item() == pytest.approx((pixels - 1) / pixels, rel=1e-4)


def test_the_loss_is_the_mean_over_hidden_patches_in_loops():
    prediction, target = torch.randn(2, 3, 5, 4, dtype=torch.float64).unbind()
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    errors = [
        sum((p - t) ** 2 for p, t in zip(prediction[b, l].tolist(), target[b, l].tolist(), strict=True)) / 4
        for b in range(3)
        for l in range(5)
        if mask[b, l]
    ]
    assert masked_mse(prediction, target, mask, False).item() == pytest.approx(sum(errors) / len(errors), rel=1e-9)
    spoilt = prediction + ~mask[..., None] * 5
    assert masked_mse(spoilt, target, mask, False) == masked_mse(prediction, target, mask, False)
    assert masked_mse(prediction + mask[..., None], target, mask, False) != masked_mse(prediction, target, mask, False)


# --- MAE ---


@pytest.mark.parametrize(("size", "ratio", "kept"), [(28, 0.75, 12), (32, 0.75, 16), (40, 0.9, 9)])
def test_as_many_patches_stay_visible_as_the_official_code_keeps(size, ratio, kept):
    assert mae(size, ratio).kept == kept  # int(100 · (1 - 0.9)) is 9


# --- SimMIM ---


@pytest.mark.parametrize(("size", "unit", "patch", "hidden"), [(192, 32, 16, 22), (224, 32, 16, 30), (32, 8, 4, 10)])
def test_as_many_squares_are_hidden_as_the_official_code_hides(size, unit, patch, hidden):
    method = SimMIM(small_vit(size, 1, patch), facts(size=size), mask_ratio=0.6, mask_size=unit)
    assert method.hidden == hidden
    batch = a_batch(size=size)
    mask = method.mask(batch, batch.views["global"][0])
    assert (mask.sum(1) == hidden * (unit // patch) ** 2).all()
    squares = mask.view(8, size // unit, unit // patch, size // unit, unit // patch).float().mean((2, 4))
    assert set(squares.unique().tolist()) == {0.0, 1.0}  # squares as a whole


# --- I-JEPA ---


def test_initial_weights_have_one_deviation_whatever_their_depth():
    """helper.py of the official code: its init_model draws anew what vision_transformer.py has divided by depth; biases are 0."""
    method = ijepa(predictor_dim=64, predictor_depth=2, initial_std=0.02)
    layers = [part for part in method.modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv2d)]
    assert len(layers) == 1 + 4 + 1 + 2 * 4 + 1 + (1 + 4)  # patches, blocks; embedding, blocks, head; the teacher's
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert not layer.bias.any()
    assert method.backbone.network.model.cls_token.abs().max() < 1e-5


def test_initial_weights_by_the_number_of_inputs_are_timms_and_torchs():
    plain, method = small_vit(), ijepa(predictor_dim=64, initial_std=None)
    for own, layer in zip(plain.network.model.blocks, method.backbone.network.model.blocks, strict=True):
        assert torch.equal(own.mlp.fc1.weight, layer.mlp.fc1.weight)
    patches = method.backbone.network.model.patch_embed.proj
    assert torch.equal(plain.network.model.patch_embed.proj.weight, patches.weight)
    for layer, inputs in ((patches, 16), (method.predictor[0].mlp.fc1, 64)):
        assert layer.weight.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.1)


def test_context_and_targets_do_not_meet():
    method, batch = ijepa(), a_batch(size=28, count=64)
    keep, wanted = method.patches(batch, batch.views["global"][0])
    assert wanted.shape[:2] == (64, 4)
    assert 0 <= wanted.min() <= wanted.max() < 49
    seen = torch.zeros(64, 49).scatter_(1, keep, 1.0)
    asked = torch.zeros(64, 49).scatter_(1, wanted.flatten(1), 1.0)
    assert (seen * asked).sum() == 0
    assert len({tuple(row) for row in keep.tolist()}) > 60


def test_the_context_is_the_first_of_what_the_targets_leave_as_much_as_the_batch_has():
    """multiblock.py of the official code, over a block that is the whole image; one image's targets cover more than another's."""
    method, batch = ijepa(), a_batch(size=28, count=64)
    method.block_size = lambda scale, aspect: (3, 3) if scale < 0.5 else (7, 7)
    keep, wanted = method.patches(batch, batch.views["global"][0])
    left = [[place for place in range(49) if place not in set(blocks.flatten().tolist())] for blocks in wanted]
    counts = [len(places) for places in left]
    assert min(counts) < max(counts)
    assert keep.tolist() == [places[: min(counts)] for places in left]


def test_the_context_lies_in_its_block_where_the_targets_leave_any_of_it():
    method, batch = ijepa(), a_batch(size=28, count=64)
    method.block_size = lambda scale, aspect: (4, 4) if scale < 0.5 else (2, 2)
    keep, wanted = method.patches(batch, batch.views["global"][0])
    block = rectangles(batch.key, "ijepa/block", 1, 7, 7, 2, 2)[:, 0]  # (B, 4)
    inside = [set(row) <= set(places) for row, places in zip(keep.tolist(), block.tolist(), strict=True)]
    covered = [
        set(places) <= set(asked) for places, asked in zip(block.tolist(), wanted.flatten(1).tolist(), strict=True)
    ]
    assert any(covered)
    assert not all(covered)
    assert inside == [not whole for whole in covered]
    assert keep.shape[1] >= 1


def test_target_blocks_are_rectangles_of_15_to_20_percent():
    method = ijepa()
    sizes = set()
    for start in range(0, 320, 8):
        batch = a_batch(size=28, start=start)
        _, wanted = method.patches(batch, batch.views["global"][0])
        row, column = wanted // 7, wanted % 7
        height, width = (int(axis.amax() - axis.amin()) for axis in (row[0, 0], column[0, 0]))
        assert (height + 1) * (width + 1) == wanted.shape[2]
        assert 6 <= wanted.shape[2] <= 12
        sizes.add((height + 1, width + 1))
    assert len(sizes) > 1


def test_rectangles_reach_every_edge():
    places = rectangles(Key(0, 0, torch.arange(400)), "a", 2, 5, 6, 2, 3)
    assert set(places.flatten().tolist()) == set(range(30))
    assert places.shape == (400, 2, 6)
    assert torch.equal(places[..., 3:] - places[..., :3], torch.full((400, 2, 3), 6))  # the second row


def test_the_blind_value_of_normalised_gaussian_targets():
    target = F.layer_norm(torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)), (64,))
    assert F.smooth_l1_loss(torch.zeros_like(target), target).item() == pytest.approx(0.424, abs=3e-3)


# --- Masks ---


def test_visible_positions_are_each_images_own_in_ascending_order():
    keep, mask = random_order(Key(0, 0, torch.arange(300)), "a", 12, 5)
    assert keep.shape == (300, 5)
    assert (keep.diff(dim=1) > 0).all()
    assert torch.equal(mask.sum(1), torch.full((300,), 7))
    assert not mask.gather(1, keep).any()
    assert (mask.float().mean(0) - 7 / 12).abs().max() < 5 * (7 * 5 / 144 / 300) ** 0.5  # every place alike
    assert len({tuple(row) for row in keep.tolist()}) > 200


def blocks_by_hand(key, rows, columns, hidden):
    """BEiT, algorithm 1, patch by patch, with the numbers that the key of one image holds; then single patches."""

    def number(name):
        return key.uniform(name).item()

    covered, least = [], (min(rows, columns) // 3) ** 2

    def cover(patches):
        covered.extend([p for p in patches if p not in covered][: hidden - len(covered)])

    for turn in range(8):
        area = least + number(f"a/{turn}/area") * max(0, hidden - len(covered) - least)
        ratio = math.exp(math.log(0.3) * (1 - 2 * number(f"a/{turn}/ratio")))
        height = min(max(round(math.sqrt(area * ratio)), 1), rows)
        width = min(max(round(math.sqrt(area / ratio)), 1), columns)
        top = int(number(f"a/{turn}/top") * (rows - height + 1))
        left = int(number(f"a/{turn}/left") * (columns - width + 1))
        cover([r * columns + c for r in range(top, top + height) for c in range(left, left + width)])
    cover(key.permutation("a/rest", rows * columns)[0].tolist())
    return covered


@pytest.mark.parametrize(("rows", "columns"), [(14, 14), (6, 9)])
def test_blocks_cover_exactly_as_many_patches_as_they_should(rows, columns):
    index = torch.arange(40)
    hidden = (index * rows * columns) // 39  # none of them to all of them
    masks = block_masks(Key(0, 0, index), ["a"], rows, columns, hidden[None])[0]
    assert torch.equal(masks.sum(1), hidden)
    for b in range(40):
        expected = blocks_by_hand(Key(0, 0, index[b : b + 1]), rows, columns, hidden[b].item())
        assert masks[b].nonzero()[:, 0].tolist() == sorted(expected)


def test_places_of_rectangles_are_drawn_for_rows_and_columns_apart():
    corners = rectangles(Key(0, 0, torch.arange(2000)), "a", 1, 5, 6, 2, 2)[:, 0, 0]
    assert (torch.bincount(corners, minlength=24).view(4, 6)[:, :5] > 50).all()  # 100 each


# --- Weight decay ---


@pytest.mark.parametrize("name", ["mae", "simmim", "ijepa", "ibot", "dinov2"])
def test_mask_tokens_decay_as_weights(name):
    method = built(name).method
    groups = parameter_groups(method.parameter_groups(), 0.05, exclude_bias_and_norm=True)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    network = method.backbone.network.model
    assert decay[id(method.mask_token)] == 0.05
    assert decay[id(network.cls_token)] == (0.0 if name == "simmim" else 0.05)
    assert decay.get(id(network.pos_embed)) == {"simmim": 0.0, "ibot": 0.05, "dinov2": 0.05}.get(
        name
    )  # fixed elsewhere
    assert len(decay) == sum(p.requires_grad for p in method.parameters())
