"""Autoencoders, colours, holes: known values of Lab and of divergences, exact targets, masks of exact areas."""

import math
from dataclasses import replace

import pytest
import torch

from sslctl.losses import gaussian_kl, soft_cross_entropy, squared_error
from sslctl.methods import colorization
from sslctl.methods.autoencoder import Autoencoder
from sslctl.methods.colorization import SPREAD, Colorization, smoothing
from sslctl.methods.inpainting import Inpainting
from sslctl.methods.vae import VAE
from sslctl.models.backbones import MLP, Backbone
from sslctl.models.decoders import ConvDecoder, image_decoder
from sslctl.ops.color_space import colour_bins, lab_to_rgb, lightness, rgb_to_lab
from tests.methods import ROWS, SIDE, built, inputs_of, other_pixels, step_of, tell
from tests.one_view import a_batch, backbone, facts

AUTOENCODER = {"code_dim": 8, "noise_std": 0.0, "hidden": 0.0, "hidden_size": 2}
VARIATIONAL = {"code_dim": 8, "likelihood_std": 0.2, "beta": 1.0, "beta_warmup_epochs": 2.0}
INPAINTING = {"hole": "centre", "overlap": 0.0, "adversarial": 0.0, "code_dim": 8}
COLOURS = {"form": "classification", "resolution": 0.5, "hidden_dim": 8, "rebalance": 0.5, "annealing": 0.38}


# --- Losses ---


def test_divergence_from_the_prior_at_known_values():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(gaussian_kl(zero, zero), zero)
    assert torch.equal(gaussian_kl(one, zero), torch.full((2, 3), 0.5))
    sigma = 2.0
    expected = -math.log(sigma) + (sigma**2 - 1) / 2
    found = gaussian_kl(zero, torch.full((2, 3), 2 * math.log(sigma)))
    torch.testing.assert_close(found, torch.full((2, 3), expected))


def test_divergence_equals_torchs_own():
    mean, log_variance = torch.randn(2, 4, 5, dtype=torch.float64).unbind()
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(gaussian_kl(mean, log_variance), torch.distributions.kl_divergence(q, p))


def test_weights_are_weights_of_a_mean():
    x, y = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    assert squared_error(x, y) == pytest.approx(((x - y) ** 2).mean().item())
    assert squared_error(x, y, torch.ones(3, 4)) == pytest.approx(squared_error(x, y).item())
    weight = torch.tensor([0.0, 0.0, 1.0, 3.0])
    expected = (((x - y) ** 2)[..., 2:] * weight[2:]).sum() / (4 * 6)
    assert squared_error(x, y, weight) == pytest.approx(expected.item())


def test_uniform_colours_have_the_blind_value():
    target = torch.rand(5, 313).softmax(1)
    value = soft_cross_entropy(torch.zeros(5, 313), target, torch.ones(5))
    assert value.item() == pytest.approx(math.log(313), rel=1e-5)
    assert soft_cross_entropy(torch.randn(5, 313), target, torch.zeros(5)) == 0


# --- Decoders ---


@pytest.mark.parametrize("size", [8, 16, 28, 32, 50, 96])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_decoder_gives_images_of_the_size(size, channels):
    assert ConvDecoder(5, channels, size)(torch.rand(2, 5)).shape == (2, channels, size, size)


def test_an_mlps_decoder_is_its_mirror_image():
    network = Backbone(MLP([64, 32, 16], 1, 8), [0.5], [0.2])
    decoder = image_decoder(network, 4, 1, 8)
    widths = [layer.out_features for layer in decoder.layers if isinstance(layer, torch.nn.Linear)]
    assert widths == [32, 64, 64]  # 4 -> 32 -> 64 -> 8·8
    assert decoder(torch.rand(3, 4)).shape == (3, 1, 8, 8)


# --- Autoencoders ---


def test_without_corruption_the_view_goes_in_as_it_is():
    method, batch = Autoencoder(backbone(), facts(), **AUTOENCODER), a_batch()
    x = batch.views["global"][0]
    assert method.spoilt(x, batch) is x


def test_corruption_leaves_the_target_alone_and_is_as_strong_as_it_says():
    batch = a_batch(count=64)
    x = batch.views["global"][0]
    before = x.clone()
    noisy = Autoencoder(backbone(), facts(), **AUTOENCODER | {"noise_std": 0.2})
    assert (noisy.spoilt(x, batch) - x).std().item() == pytest.approx(0.2, abs=0.005)
    black = Autoencoder(backbone(), facts(), **AUTOENCODER | {"hidden": 0.25, "hidden_size": 4}).spoilt(x, batch)
    squares = (black == 0).view(64, 8, 4, 8, 4).float().mean((2, 4))
    assert set(squares.unique().tolist()) == {0.0, 1.0}  # whole squares
    assert squares.mean().item() == pytest.approx(0.25, abs=0.03)
    noisy(batch, {})["loss"].backward()
    assert torch.equal(x, before)
    assert sum(p.grad.abs().sum() for p in noisy.backbone.parameters()) > 0


def test_the_blind_value_is_the_datasets_variance():
    images = torch.full((8, 1, 32, 32), 0.4)
    images[:, :, ::2] += 0.3
    images[:, :, 1::2] -= 0.3  # mean 0.4, deviation 0.3, as the backbone was told
    method = Autoencoder(backbone(), facts(), **AUTOENCODER)
    with torch.no_grad():
        method.decoder.last.weight.zero_()
        method.decoder.last.bias.zero_()  # says the mean
    out = method(a_batch(images=images), {})
    assert out["loss"].item() == pytest.approx(0.09, rel=1e-5)
    assert out["unexplained"].item() == pytest.approx(1, rel=1e-5)


def test_the_vae_sums_over_dimensions_and_is_calm_in_evaluation():
    method, batch = VAE(backbone(), facts(), **VARIATIONAL), a_batch()
    x = batch.views["global"][0]
    with torch.no_grad():
        for head in (method.mean_head, method.log_variance_head, method.decoder.last):
            head.weight.zero_()
            head.bias.zero_()
    out = method(batch, {"beta": 1.0})
    expected = (x - 0.4).square().sum((1, 2, 3)).mean() / (2 * 0.2**2)
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert out["kl"] == 0
    assert out["codes_in_use"] == 0
    method.eval()
    with torch.no_grad():
        one, two = method.features(x), method.features(x)
    assert all(torch.equal(one[name], two[name]) for name in ("backbone", "mean"))


def test_the_gradient_reaches_both_heads_of_the_vae_and_beta_grows():
    method, batch = VAE(backbone(), facts(), **VARIATIONAL), a_batch()
    assert [round(method.schedules(step)["beta"], 3) for step in (0, 10, 20, 90)] == [0.048, 0.524, 1.0, 1.0]
    method(batch, method.schedules(0))["loss"].backward()
    assert method.mean_head.weight.grad.abs().sum() > 0
    assert method.log_variance_head.weight.grad.abs().sum() > 0


# --- Lab ---


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((1, 1, 1), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 1, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
        ((0.5, 0.5, 0.5), (53.39, 0.0, 0.0)),
    ],
)
def test_colours_known_in_lab(rgb, lab):
    found = rgb_to_lab(torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(found, torch.tensor(lab), atol=0.02, rtol=0)


@pytest.mark.parametrize("level", [1, 5, 10, 11, 30])
def test_lightness_of_dark_greys_is_cies(level):
    """116 times the cube root less 16 of the luminance; 903.3 times it below 0.008856 (CIE 15:2004)."""
    linear = level / 255 / 12.92 if level <= 10 else ((level / 255 + 0.055) / 1.055) ** 2.4
    expected = 24389 / 27 * linear if linear <= 216 / 24389 else 116 * linear ** (1 / 3) - 16
    images = torch.full((1, 3, 2, 2), level / 255)
    torch.testing.assert_close(rgb_to_lab(images)[0, 0], torch.full((2, 2), expected), atol=1e-3, rtol=0)
    torch.testing.assert_close(lightness(images), torch.full((1, 3, 2, 2), expected / 100), atol=1e-5, rtol=0)
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(images)), images, atol=1e-5, rtol=0)


def test_lab_and_back():
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(images)), images, atol=1e-3, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(lab_to_rgb(rgb_to_lab(images)), images, atol=1e-3, rtol=0)


def test_colour_bins_hold_every_colour():
    bins = colour_bins(10)
    assert 250 < len(bins) < 300
    ab = rgb_to_lab(torch.rand(64, 3, 16, 16))[:, 1:].permute(0, 2, 3, 1).flatten(0, 2)
    assert (torch.cdist(ab, bins).min(1).values <= math.sqrt(50) + 0.5).all()  # half a diagonal away at most


# --- Colourisation ---


def colours(**changes):
    return Colorization(backbone(3), facts(3), **COLOURS | changes)


def test_soft_targets_are_ten_bins_that_sum_to_1():
    method = colours()
    target, nearest = method.soft_targets(torch.tensor([[0.0, 0.0], [12.0, -33.0], [60.0, 55.0]]))
    torch.testing.assert_close(target.sum(1), torch.ones(3))
    assert ((target > 0).sum(1) <= 10).all()
    assert torch.equal(target.argmax(1), nearest)
    assert method.bins[nearest].tolist() == [[0, 0], [10, -30], [60, 50]]  # a tie: the first


def gaussian(one, two):
    return math.exp(-((one[0] - two[0]) ** 2 + (one[1] - two[1]) ** 2) / (2 * 5.0**2))


def test_frequencies_are_smoothed_by_a_gaussian_over_the_bins_there_are():
    bins = [(0, 0), (0, 10), (10, 10), (-50, 30)]
    frequency = [0.5, 0.2, 0.0, 0.3]
    expected = [0.0] * 4
    for one, share in zip(bins, frequency, strict=True):
        total = sum(gaussian(one, other) for other in bins)
        for place, other in enumerate(bins):
            expected[place] += share * gaussian(one, other) / total
    found = torch.tensor(frequency) @ smoothing(torch.tensor(bins).float(), SPREAD)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert expected[3] == pytest.approx(0.3, abs=1e-6)  # alone
    assert 0.02 < expected[2] < 0.05  # a neighbour's
    method = colours()
    torch.testing.assert_close(method.smoothing.sum(1), torch.ones(len(method.bins)))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_weights_of_classes_equal_equation_4(share):
    method = colours(rebalance=share)
    frequency = torch.rand(len(method.bins), generator=torch.Generator().manual_seed(0)) ** 8
    method.frequency.copy_(frequency / frequency.sum())
    bins, count = method.bins.tolist(), len(method.bins)
    smooth = [0.0] * count
    for one, its in zip(bins, method.frequency.tolist(), strict=True):
        near = [gaussian(one, other) for other in bins]
        for place in range(count):
            smooth[place] += its * near[place] / sum(near)
    weight = [1 / ((1 - share) * p + share / count) for p in smooth]
    expected = sum(p * w for p, w in zip(smooth, weight, strict=True))
    slow = torch.tensor([w / expected for w in weight])
    torch.testing.assert_close(method.weights(), slow, rtol=1e-3, atol=1e-5)
    assert (torch.tensor(smooth) * method.weights()).sum().item() == pytest.approx(1, rel=1e-4)
    rare_first = torch.tensor(smooth).argsort()
    assert (method.weights()[rare_first].diff() <= 1e-5 * slow.max()).all()


@pytest.mark.parametrize(("annealing", "expected"), [(0.38, (11.269, -27.970)), (1.0, (20.0, -14.0))])
def test_annealed_mean_of_two_colours(annealing, expected):
    """0.8 and 0.2 at a temperature of 0.38 are 0.8^(1/0.38) = 0.5559 and 0.2^(1/0.38) = 0.0145: 0.9746 and 0.0254."""
    method = colours(annealing=annealing)
    logits = torch.full((1, len(method.bins), 1, 1), -1e4)
    for colour, share in (((10, -30), 0.8), ((60, 50), 0.2)):
        logits[:, (method.bins == torch.tensor(colour)).all(1)] = (
            math.log(share) + 3
        )  # a softmax takes no notice of the 3
    found = method.annealed_mean(logits).flatten().tolist()
    assert found == pytest.approx(expected, abs=2e-3)


PLAIN = {(1, 0, 0): (80, 70), (0, 0, 1): (80, -110), (0, 1, 0): (-90, 80)}  # sRGB -> the bin of its a and b


def plain(rgb):
    return torch.tensor(rgb).float().view(1, 3, 1, 1).expand(8, -1, 32, 32)


def counted_bin(method, rgb):
    """The bin that a step counts for images of one colour."""
    counts = method(a_batch(3, images=plain(rgb)), {})["carry"]["counts"]  # (B, Q)
    assert (counts.max(1).values == 1).all()
    return tuple(method.bins[counts[0].argmax()].int().tolist())


def test_red_has_a_positive_a_and_blue_a_negative_b(monkeypatch):
    for rgb, bin in PLAIN.items():
        assert counted_bin(colours(), rgb) == bin
    plainly = rgb_to_lab
    monkeypatch.setattr(colorization, "rgb_to_lab", lambda images: plainly(images)[:, [0, 2, 1]])
    assert all(counted_bin(colours(), rgb) != bin for rgb, bin in PLAIN.items())


@pytest.mark.parametrize("rgb", [(1, 0, 0), (0, 0, 1)], ids=["red", "blue"])
def test_a_predicted_bin_is_shown_in_its_colour(rgb):
    method = colours().eval()
    said = (method.bins == torch.tensor(PLAIN[rgb])).all(1)
    with torch.no_grad():
        method.head[-1].weight.zero_()
        method.head[-1].bias.copy_(50.0 * said)
        shown = method.pictures(a_batch(3, images=plain(rgb)))["coloured"]
        torch.testing.assert_close(shown, plain(rgb), atol=0.1, rtol=0)
        method.bins.copy_(method.bins.flip(1))
        swapped = method.pictures(a_batch(3, images=plain(rgb)))["coloured"]
    assert (swapped - plain(rgb)).abs().max() > 0.15


def test_grey_images_say_nothing_about_colours():
    method = colours()
    grey = torch.rand(8, 1, 32, 32).expand(-1, 3, -1, -1)
    assert method(a_batch(3, images=grey), {})["loss"] == 0
    assert method(a_batch(3), {})["loss"] > 0


def test_the_backbone_sees_lightness_only_in_training_and_evaluation():
    method, batch = colours().eval(), a_batch(3)
    seen = []
    method.backbone.network.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    method(batch, {})
    with torch.no_grad():
        method.features(batch.views["global"][0])
    for x in seen:
        x = method.backbone.denormalize(x)
        torch.testing.assert_close(x[:, 0], x[:, 1])
        torch.testing.assert_close(x[:, 0], x[:, 2])
    assert torch.equal(seen[0], seen[1])


def test_frequencies_are_the_mean_over_all_batches():
    method = colours()
    counts = [torch.rand(8, len(method.bins)).softmax(1) for _ in range(3)]
    for each in counts:
        method.after_step({}, {"counts": each})
    torch.testing.assert_close(method.frequency, torch.stack(counts).mean((0, 1)))
    assert method.counted == 3


def test_regression_of_a_grey_prediction_explains_nothing():
    method = colours(form="regression")
    with torch.no_grad():
        method.head[-1].weight.zero_()
        method.head[-1].bias.zero_()
    assert method(a_batch(3), {})["unexplained"].item() == pytest.approx(1)


# --- Inpainting ---


@pytest.mark.parametrize("hole", ["centre", "blobs"])
def test_a_hole_is_exactly_a_quarter(hole):
    predicted, hidden = Inpainting(backbone(), facts(), **INPAINTING | {"hole": hole}).holes(a_batch())
    assert predicted.sum() == 32 * 32 // 4
    assert torch.equal(predicted, hidden)


def test_blobs_are_other_ones_in_every_step_and_smooth():
    method = Inpainting(backbone(), facts(), **INPAINTING | {"hole": "blobs"})
    one, two = (method.holes(a_batch(start=start))[0] for start in (0, 40))
    assert not torch.equal(one, two)
    edges = (one[1:] != one[:-1]).sum() + (one[:, 1:] != one[:, :-1]).sum()
    assert edges < 0.25 * 2 * 32 * 31  # scattered pixels would have 0.375 of all


def test_the_edge_of_the_hole_stays_visible_and_weighs_ten_times():
    method = Inpainting(backbone(), facts(), **INPAINTING | {"overlap": 2 / 32})
    predicted, hidden = method.holes(a_batch())
    assert (predicted.sum(), hidden.sum()) == (16 * 16, 12 * 12)
    assert not (hidden & ~predicted).any()
    x = torch.zeros(8, 1, 32, 32)
    with torch.no_grad():
        method.decoder.last.weight.zero_()
        method.decoder.last.bias.fill_(-0.4 / 0.3)  # says 0
    at = torch.zeros(32, 32)
    at[8, 8] = 1.0  # one pixel of the edge that is wrong by 1
    ring = 16 * 16 - 12 * 12
    out = method(a_batch(images=x + at), {})
    assert out["loss"].item() == pytest.approx(10 / (10 * ring + 12 * 12), rel=1e-4)


def test_what_lies_outside_the_hole_does_not_count():
    method = Inpainting(backbone(), facts(), **INPAINTING)
    predicted, hidden = method.holes(a_batch())
    x = torch.rand(8, 1, 32, 32)
    pierced = method.pierced(x, hidden)
    assert torch.equal(pierced[..., ~hidden], x[..., ~hidden])
    assert (pierced[..., hidden] == 0.4).all()
    other = torch.where(hidden, torch.rand(8, 1, 32, 32), x)
    with torch.no_grad():
        method.eval()
        one, two = (method.filling(method.backbone(seen)) for seen in (pierced, method.pierced(other, hidden)))
    assert torch.equal(one, two)
    made = method.pictures(a_batch(images=x))["filled"]
    assert torch.equal(made[..., ~predicted], x[..., ~predicted])


def test_the_judge_and_the_painter_get_their_own_gradients():
    method = Inpainting(backbone(), facts(), **INPAINTING | {"adversarial": 0.5})
    batch = a_batch()
    method(batch, {})["loss"].backward()
    judge = torch.cat([p.grad.flatten() for p in method.discriminator.parameters()])
    method.zero_grad()
    x, (predicted, hidden) = batch.views["global"][0], method.holes(batch)
    made = method.filling(method.backbone(method.pierced(x, hidden))).detach()
    real, fake = method.discriminator(x * predicted), method.discriminator(made * predicted)
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    (loss(real, torch.ones_like(real)) + loss(fake, torch.zeros_like(fake))).backward()
    alone = torch.cat([p.grad.flatten() for p in method.discriminator.parameters()])
    torch.testing.assert_close(judge, alone, atol=1e-5, rtol=1e-3)
    groups = method.parameter_groups()
    assert [group.get("lr_scale", 1.0) for group in groups] == [1.0, 0.1]
    assert sum(len(group["params"]) for group in groups) == len(list(method.parameters()))
    assert Inpainting(backbone(), facts(), **INPAINTING).discriminator is None


# --- Hidden parts do not go in ---


@pytest.mark.parametrize("hole", ["centre", "blobs"])
def test_the_backbone_does_not_see_what_lies_in_the_hole(hole):
    its = built("inpainting", f"method.hole={hole}", "method.overlap=0.0")
    seen = inputs_of(its.method.backbone)
    _, hidden = its.method.holes(its.batch)
    for batch in (its.batch, other_pixels(its.batch, hidden), other_pixels(its.batch, ~hidden)):
        step_of(its.method, batch)
    assert torch.equal(seen[1], seen[0])
    assert (seen[2] != seen[0]).all(0).all(0).equal(~hidden)


def test_the_backbone_does_not_see_what_an_autoencoder_blackens():
    its = built("autoencoder", "method.hidden=0.5")
    batch = replace(its.batch, views={"global": 0.2 + 0.6 * its.batch.views["global"]})  # no pixel is black
    seen = inputs_of(its.method.backbone)
    step_of(its.method, batch)
    black = seen[0] == 0
    assert 0.3 < black.float().mean() < 0.7
    step_of(its.method, other_pixels(batch, black))
    assert torch.equal(seen[1], seen[0])


def test_the_backbone_sees_the_noise_of_a_denoising_autoencoder():
    its = built("autoencoder", "method.noise_std=0.2")
    seen = inputs_of(its.method.backbone)
    step_of(its.method, its.batch)
    noise = seen[0] - its.batch.views["global"][0]
    assert noise.std().item() == pytest.approx(0.2, rel=0.1)


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
    codes = inputs_of(its.method.decoder)
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
