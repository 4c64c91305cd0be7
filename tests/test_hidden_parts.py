"""Steps of methods that hide, spoil or ask something: hidden parts stay hidden, targets are the true ones, chance is keyed."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.data.batch import Batch
from sslctl.data.text import MASK, SPECIAL
from sslctl.methods.base import Method
from sslctl.methods.relative_patch import NEIGHBOURS, RelativePatch
from sslctl.models.vit import gather_tokens, unpatchify
from sslctl.views import Key
from tests.built import ROWS, SIDE, VOCABULARY, built, silence, tell
from tests.test_pretext import a_batch, backbone, facts

PATCH, PREFIX = 4, 1  # of built's vision transformers


def entrance(method: Method) -> nn.Module:
    """What takes the visible part: a vision transformer's blocks, a text's embedding, or the backbone."""
    network = method.backbone.network
    if hasattr(network, "model"):
        return network.model.blocks
    return getattr(network, "embedding", method.backbone)


def received(module: nn.Module) -> list[Tensor]:
    """Fills with a module's inputs, one a forward."""
    seen = []
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    return seen


def said(module: nn.Module) -> list[Tensor]:
    """Fills with a module's outputs, one a forward; they keep their gradients."""
    outputs = []

    def keep(module, args, out):
        out.retain_grad()
        outputs.append(out)

    module.register_forward_hook(keep)
    return outputs


def step(method: Method, batch: Batch) -> dict:
    return method(batch, method.schedules(0))


def other_pixels(batch: Batch, where: Tensor) -> Batch:
    """where: (S, S) or (B, 1, S, S) bool, pixels that become other ones."""
    x = batch.views["global"]
    return replace(batch, views={"global": torch.where(where, (x + 0.37) % 1, x)})


def pixels_of(patches: Tensor) -> Tensor:
    """(B, L) bool -> (B, 1, S, S) bool."""
    return unpatchify(patches[..., None].expand(-1, -1, PATCH**2).float(), PATCH, SIDE // PATCH) > 0


# --- Hidden parts do not go in ---


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_the_network_does_not_see_the_patches_that_it_draws(name):
    its = built(name)
    seen, drawn = received(entrance(its.method)), said(its.method.head)
    step(its.method, its.batch)["loss"].backward()
    asked = drawn[0].grad.abs().sum(2)[:, -((SIDE // PATCH) ** 2) :] > 0  # patches that have a loss
    assert 0 < asked.float().mean() < 1
    step(its.method, other_pixels(its.batch, pixels_of(asked)))
    assert torch.equal(seen[1], seen[0])
    assert torch.equal(drawn[1], drawn[0])
    step(its.method, other_pixels(its.batch, pixels_of(~asked)))
    changed = (seen[2] != seen[0]).any(2)[:, PREFIX:].sum(1)
    assert torch.equal(changed, (~asked).sum(1))  # every visible patch goes in


def test_the_student_of_ijepa_sees_the_context_only():
    its = built("ijepa")
    seen, predicted = received(entrance(its.method)), said(its.method.head)
    step(its.method, its.batch)
    keep, wanted = its.method.patches(its.batch, its.batch.views["global"][0])
    hidden = torch.ones(ROWS, (SIDE // PATCH) ** 2, dtype=torch.bool).scatter_(1, keep, False)
    assert hidden.gather(1, wanted.flatten(1)).all()
    step(its.method, other_pixels(its.batch, pixels_of(hidden)))
    assert torch.equal(seen[1], seen[0])
    assert torch.equal(predicted[1], predicted[0])
    step(its.method, other_pixels(its.batch, pixels_of(~hidden)))
    assert (seen[2] != seen[0]).any(2)[:, PREFIX:].all()


@pytest.mark.parametrize("hole", ["centre", "blobs"])
def test_the_backbone_does_not_see_what_lies_in_the_hole(hole):
    its = built("inpainting", f"method.hole={hole}", "method.overlap=0.0")
    seen = received(its.method.backbone)
    _, hidden = its.method.holes(its.batch)
    for batch in (its.batch, other_pixels(its.batch, hidden), other_pixels(its.batch, ~hidden)):
        step(its.method, batch)
    assert torch.equal(seen[1], seen[0])
    assert (seen[2] != seen[0]).all(0).all(0).equal(~hidden)


def test_the_backbone_does_not_see_what_an_autoencoder_blackens():
    its = built("autoencoder", "method.hidden=0.5")
    batch = replace(its.batch, views={"global": 0.2 + 0.6 * its.batch.views["global"]})  # no pixel is black
    seen = received(its.method.backbone)
    step(its.method, batch)
    black = seen[0] == 0
    assert 0.3 < black.float().mean() < 0.7
    step(its.method, other_pixels(batch, black))
    assert torch.equal(seen[1], seen[0])


def test_the_backbone_sees_the_noise_of_a_denoising_autoencoder():
    its = built("autoencoder", "method.noise_std=0.2")
    seen = received(its.method.backbone)
    step(its.method, its.batch)
    noise = seen[0] - its.batch.views["global"][0]
    assert noise.std().item() == pytest.approx(0.2, rel=0.1)


def test_a_text_is_read_without_its_hidden_tokens():
    its = built("masked_language", rows=32)
    seen = received(entrance(its.method))
    step(its.method, its.batch)
    ids = its.batch.views["tokens"]
    hidden = seen[0] != ids[0]
    asked = 32 * its.method.hidden
    assert 0.8 * asked < hidden.sum() < asked  # a tenth stays as it is
    assert 0.7 * asked < (seen[0] == MASK).sum() < 0.9 * asked
    assert not hidden[:, 0].any()
    ordinary = VOCABULARY - len(SPECIAL)
    others = len(SPECIAL) + (ids - len(SPECIAL) + 7) % ordinary
    step(its.method, replace(its.batch, views={"tokens": torch.where(hidden, others, ids)}))
    assert torch.equal(seen[1], seen[0])


# --- Targets ---


@pytest.mark.parametrize("words", [("method.noise_std=0.3",), ("method.hidden=0.5",)])
def test_an_autoencoders_target_is_the_clean_view(words):
    its = built("autoencoder", *words)
    tell(its.method.decoder, its.method.backbone.normalize(its.batch.views["global"][0]))
    assert its.loss().item() == pytest.approx(0, abs=1e-10)


def test_the_loss_of_a_vae_is_its_formula():
    its = built("vae")
    x = its.batch.views["global"][0]
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, ROWS, 8, generator=generator).unbind()
    drawn = torch.randn(ROWS, 1, SIDE, SIDE, generator=generator)
    tell(its.method.decoder, drawn)
    tell(its.method.mean_head, torch.zeros(ROWS, 8), mean)
    tell(its.method.log_variance_head, torch.zeros(ROWS, 8), log_variance)
    codes = received(its.method.decoder)
    its.method(its.batch, {"beta": 0.3})
    out = its.method(its.batch, {"beta": 0.3})
    error = (0.3 * drawn + 0.5 - x).square().sum((1, 2, 3)) / (
        2 * 0.2**2
    )  # built's mean and deviation, the likelihood's
    divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(1) / 2
    assert out["loss"].item() == pytest.approx((error + 0.3 * divergence).mean().item(), rel=1e-5)
    noise = codes[0]  # the code of mean 0 and variance 1
    assert noise.std().item() == pytest.approx(1, abs=0.3)
    torch.testing.assert_close(codes[1], mean + (log_variance / 2).exp() * noise)


def test_the_targets_of_ijepa_are_the_teachers_normalised_tokens_in_their_order():
    its = built("ijepa")
    x, teacher = its.batch.views["global"][0], its.method.teacher_backbone
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in teacher.parameters():  # not the student's
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        tokens = teacher.tokens(x)[:, PREFIX:]
    answers = (tokens - tokens.mean(2, keepdim=True)) / (tokens.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()

    def told(order):
        its.method.predicted = lambda h, keep, wanted: order(
            gather_tokens(answers, wanted.flatten(1)).unflatten(1, wanted.shape[1:])
        )
        return its.loss().item()

    assert told(lambda right: right) == pytest.approx(0, abs=1e-9)
    assert told(lambda right: right.flip(2)) > 0.01  # of a block's tokens
    assert told(lambda right: right.roll(1, 0)) > 0.01  # of the images


def test_the_targets_of_masked_language_are_the_true_tokens():
    its = built("masked_language")
    ids = its.batch.views["tokens"][0]
    its.method.backbone.network.tokens = lambda shown: 50 * F.one_hot(ids, VOCABULARY).float()  # knows them all
    its.method.said = lambda tokens: tokens
    out = step(its.method, its.batch)
    assert out["loss"].item() == pytest.approx(0, abs=1e-6)
    assert out["accuracy"] == 1


def test_the_labels_of_relative_patches_are_directions_from_the_first_to_the_second():
    its = built("relative_patch")
    view = its.batch.views["global"]
    side = view.shape[-1]
    places = torch.arange(side * side).float().view(side, side).expand_as(view)  # every pixel says where it is
    dim, pitch = its.method.backbone.embed_dim, its.method.pitch

    def corner(module, args, out):
        first = args[0][:, 0, 0, 0]
        return F.pad(torch.stack([first // side, first % side], 1), (0, dim - 2))

    pairs = []

    def direction(module, args, out):
        row, column = ((args[0][:, dim:] - args[0][:, :dim]) / pitch).round().long().unbind(1)[:2]
        pairs.append(torch.stack([row, column], 1))
        label = torch.tensor([(*NEIGHBOURS, 4).index(place) for place in (4 + 3 * row + column).tolist()])
        return 50 * F.one_hot(label, 8).float()

    its.method.backbone.register_forward_hook(corner)
    its.method.classifier.register_forward_hook(direction)
    out = step(its.method, replace(its.batch, views={"global": places}))
    assert out["loss"].item() == pytest.approx(0, abs=1e-6)
    assert out["accuracy"] == 1
    asked, counts = pairs[0].unique(dim=0, return_counts=True)
    assert len(asked) == 8
    assert set(counts.tolist()) == {2 * ROWS}  # each pair in both orders


# --- What is asked depends on seed, epoch and index ---


def coloured_patches():
    arguments = {"hidden_dim": 4, "view_size": 1.75, "gap": 0.5, "jitter": 0.0, "colour_drop": 1.0}
    return RelativePatch(backbone(3), facts(3), **arguments), a_batch(3, 56)


def blocks_of_one_size():
    its = built("ijepa")
    its.method.block_size = lambda scale, aspect: (1, 2) if scale < 0.5 else (4, 4)
    return its.method, its.batch


def of(name, *words):
    def make():
        its = built(name, *words)
        return its.method, its.batch

    return make


ASKED = {
    **{name: of(name) for name in ("mae", "simmim", "ijepa", "masked_language", "frame_order", "jigsaw", "vae")},
    "ijepa, blocks of one size": blocks_of_one_size,
    "frame_order, orders": of("frame_order", "method.task=order"),
    "relative_patch": of("relative_patch", "method.gap=0.7", "method.jitter=0.3"),
    "relative_patch, colours": coloured_patches,
    "inpainting": of("inpainting", "method.hole=blobs"),
    "autoencoder, noise": of("autoencoder", "method.noise_std=0.3"),
    "autoencoder, black": of("autoencoder", "method.hidden=0.5"),
}
COUPLED = ("ijepa", "inpainting")  # the first image decides the blocks' size, or the hole
LABELLED = ("masked_language", "frame_order", "frame_order, orders", "jigsaw")


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_depends_on_seed_epoch_and_index_only(name, monkeypatch):
    method, batch = ASKED[name]()
    if name == "vae":
        silence(method.mean_head)  # the code is the noise
        silence(method.log_variance_head)
    seen, labels = received(method.decoder if name == "vae" else entrance(method)), []
    places = received(method.predictor) if name.startswith("ijepa") else []
    plain = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda logits, label: labels.append(label) or plain(logits, label))

    def asked(rows, seed=0, epoch=0, torch_seed=0):
        """(B, …) each: what goes in and, where it has labels, the right answers."""
        torch.manual_seed(torch_seed)
        rows = torch.tensor(rows)
        views = {group: view[:, :1].expand_as(view)[:, rows] for group, view in batch.views.items()}  # all alike
        index = batch.index[rows]
        step(method, Batch(views, batch.label[rows], index, Key(seed, epoch, index)))
        found = [seen[-1], labels[-1]] if name in LABELLED else [seen[-1]]
        found += [x[:, method.kept :] for x in places[-1:]]  # the targets'
        return [x.reshape(len(rows), -1) for x in found]

    def same(one, two):
        return one.shape == two.shape and torch.allclose(one, two, atol=1e-4)

    everything = asked(range(ROWS))
    rows = [0, 6, 3, 5] if name in COUPLED else [6, 0, 3, 5]
    for whole, again, part in zip(everything, asked(range(ROWS), torch_seed=1), asked(rows), strict=True):
        assert same(again, whole)
        assert same(part, whole[rows])
    for other in (asked(range(ROWS), epoch=1), asked(range(ROWS), seed=1)):
        assert not any(same(x, whole) for x, whole in zip(other, everything, strict=True))
    if name != "inpainting":  # one hole for all
        assert not any(same(whole, whole[:1].expand_as(whole)) for whole in everything)
