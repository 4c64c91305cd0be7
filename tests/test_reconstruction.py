"""Autoencoders, colours, holes: known values of Lab and of divergences, exact targets, masks of exact areas."""

import math

import pytest
import torch

from sslctl.losses import gaussian_kl, soft_cross_entropy, squared_error
from sslctl.methods import colorization
from sslctl.methods.autoencoder import Autoencoder
from sslctl.methods.colorization import Colorization
from sslctl.methods.inpainting import Inpainting
from sslctl.models.backbones import MLP, Backbone
from sslctl.models.decoders import ConvDecoder, image_decoder
from sslctl.ops.color_space import colour_bins, lab_to_rgb, lightness, rgb_to_lab
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
    actual = gaussian_kl(zero, torch.full((2, 3), 2 * math.log(sigma)))
    torch.testing.assert_close(actual, torch.full((2, 3), expected))


def test_divergence_equals_torchs_own():
    mean, log_variance = torch.randn(2, 4, 5, dtype=torch.float64).unbind()
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(gaussian_kl(mean, log_variance), torch.distributions.kl_divergence(q, p))


def test_weights_are_weights_of_a_mean():
    x, y = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    assert squared_error(x, y) == pytest.approx(((x - y) ** 2).mean().item())
    assert squared_error(x, y, torch.ones(3, 4)) == pytest.approx(squared_error(x, y).item())
    weight = torch.tensor([0.0, 0.0, 1.0, 4.0])  # whose own mean is not 1
    expected = (((x - y) ** 2)[..., 2:] * weight[2:]).sum() / (5 * 6)
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
    actual = rgb_to_lab(torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(actual, torch.tensor(lab), atol=0.02, rtol=0)


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


def test_building_it_teaches_batchnorm_nothing():
    network = colours().backbone
    assert network.training
    counts = [tensor for name, tensor in network.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert not any(counts)


def test_soft_targets_are_ten_bins_that_sum_to_1():
    method = colours()
    target, nearest = method.soft_targets(torch.tensor([[0.0, 0.0], [12.0, -33.0], [60.0, 55.0]]))
    torch.testing.assert_close(target.sum(1), torch.ones(3))
    assert ((target > 0).sum(1) <= 10).all()
    assert torch.equal(target.argmax(1), nearest)
    assert method.bins[nearest].tolist() == [[0, 0], [10, -30], [60, 50]]  # a tie: the first


@pytest.mark.parametrize(("annealing", "expected"), [(0.38, (11.269, -27.970)), (1.0, (20.0, -14.0))])
def test_annealed_mean_of_two_colours(annealing, expected):
    """0.8 and 0.2 at a temperature of 0.38 are 0.8^(1/0.38) = 0.5559 and 0.2^(1/0.38) = 0.0145: 0.9746 and 0.0254."""
    method = colours(annealing=annealing)
    logits = torch.full((1, len(method.bins), 1, 1), -1e4)
    for colour, share in (((10, -30), 0.8), ((60, 50), 0.2)):
        logits[:, (method.bins == torch.tensor(colour)).all(1)] = (
            math.log(share) + 3
        )  # a softmax takes no notice of the 3
    actual = method.annealed_mean(logits).flatten().tolist()
    assert actual == pytest.approx(expected, abs=2e-3)


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
    printed = (method.bins == torch.tensor(PLAIN[rgb])).all(1)
    with torch.no_grad():
        method.head[-1].weight.zero_()
        method.head[-1].bias.copy_(50.0 * printed)
        shown = method.pictures(a_batch(3, images=plain(rgb)))["coloured"]
        torch.testing.assert_close(shown, plain(rgb), atol=0.1, rtol=0)
        method.bins.copy_(method.bins.flip(1))
        swapped = method.pictures(a_batch(3, images=plain(rgb)))["coloured"]
    assert (swapped - plain(rgb)).abs().max() > 0.15


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
    built = method.pictures(a_batch(images=x))["filled"]
    assert torch.equal(built[..., ~predicted], x[..., ~predicted])
