"""Steps of inpainting, colourisation and autoencoders beside steps written from their papers."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslctl.methods.autoencoder import Autoencoder
from sslctl.methods.colorization import Colorization
from sslctl.methods.inpainting import Inpainting
from sslctl.methods.vae import VAE
from sslctl.models.backbones import MLP, Backbone
from sslctl.ops.color_space import colour_bins, rgb_to_lab
from tests.steps.compare import ROWS, backbone, batch_of, compare, disturbed, facts, rate_at, spread
from tests.steps.transformers import MEAN, STD

BLIND = STD.square().mean()  # error of a network that always says the data's mean colour


def images(side, steps=2):
    """Batches of which only the first view counts."""
    return [batch_of(step, side=side) for step in range(3, 3 + steps)]


# --- Inpainting ---


def opinion(discriminator, image, real):
    """Binary cross entropy of a discriminator that gives logits."""
    p = torch.sigmoid(discriminator(image))
    return -(p if real else 1 - p).log().mean()


def reference_inpainting(its, batch, step, update, hole, adversarial):
    """Section 3.2: eq. 1 with the official code's weight of 10 where the hole's edge is seen, eq. 2 and 3."""
    x = batch.views["global"][0]
    hole = hole(batch)
    seen = torch.zeros_like(hole)  # what of the hole lies within two pixels of its outside
    for row, column in hole.nonzero().tolist():
        seen[row, column] = not hole[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3].all()
    h = its.backbone(torch.where(hole & ~seen, MEAN, x))
    drawn = its.decoder(its.bottleneck(h)) * STD + MEAN
    weight = (hole.double() + 9 * seen).expand_as(x)
    error = (weight * (drawn - x) ** 2).sum() / weight.sum()
    figures = {"feature_std": spread(h), "unexplained": ((drawn - x) ** 2)[..., hole].mean().detach() / BLIND}
    if not adversarial:
        update(error)
        return figures
    judge = opinion(its.discriminator, x * hole, True) + opinion(its.discriminator, drawn.detach() * hole, False)
    painter = 0.7 * error + 0.3 * opinion(its.discriminator, drawn * hole, True)
    judged = list(its.discriminator.parameters())
    own = torch.autograd.grad(judge, judged)

    def judge_by_its_own_loss():
        for parameter, gradient in zip(judged, own, strict=True):
            parameter.grad = gradient

    loss = painter + judge.detach()
    update(loss, rates={"discriminator": rate_at(step) / 10}, after_backward=judge_by_its_own_loss)
    return figures | {"discriminator_loss": judge.detach()}


def centre(batch):
    hole = torch.zeros(16, 16, dtype=torch.bool)
    hole[4:12, 4:12] = True
    return hole


def blobs(batch):
    """Where smooth noise, of 6 points on 100 pixels, is among its highest quarter; one for the batch."""
    noise = batch.key.of(batch.index[:1]).uniform("inpainting/blobs", 4, 4)
    smooth = F.interpolate(noise[None], (64, 64), mode="bicubic")[0, 0]
    return smooth > smooth.flatten().sort().values[3 * 32 * 32 - 1]


def discriminator():
    """DCGAN's, with norms that do not mix images, for 16×16 pixels."""
    down = [nn.Conv2d(3, 32, 4, 2, 1), nn.GroupNorm(1, 32), nn.LeakyReLU(0.2)]
    down += [nn.Conv2d(32, 64, 4, 2, 1), nn.GroupNorm(1, 64), nn.LeakyReLU(0.2)]
    return nn.Sequential(*down, nn.Flatten(), nn.Linear(64 * 4 * 4, 1))


@pytest.mark.parametrize("adversarial", [0.0, 0.3])
def test_inpainting_of_the_centre_steps_as_its_paper(adversarial):
    settings = {"hole": "centre", "overlap": 0.1, "adversarial": adversarial, "code_dim": 5}
    method = disturbed(Inpainting(backbone((2, 5)), facts(image_size=16), **settings))
    reference = partial(reference_inpainting, hole=centre, adversarial=adversarial)
    compare(method, reference, images(16), networks={"discriminator": discriminator}, first_step=3)


def test_inpainting_of_blobs_steps_as_its_paper():
    settings = {"hole": "blobs", "overlap": 0.03, "adversarial": 0.0, "code_dim": 5}
    network = Backbone(MLP([6, 7], 3, 64), MEAN.flatten().tolist(), STD.flatten().tolist())
    method = disturbed(Inpainting(network, facts(image_size=64), **settings))
    compare(method, partial(reference_inpainting, hole=blobs, adversarial=False), images(64), first_step=3)


# --- Colourisation ---


def coloured():
    """Images of noise, of which the first has no colour, the second hardly any and the third a little."""
    batches = images(16)
    for batch in batches:
        x = batch.views["global"][0]
        x[:3] = x[:3].mean(1, keepdim=True)
        x[1, 0] += 0.01
        x[2, 0] += 0.06
    return batches


def colour_map(its, x):
    """What colours a step is asked for, (B, 2, s, s), how it answers, (B, Q, s, s), and its features."""
    lab, side = rgb_to_lab(x), its.side
    h = its.backbone.network.feature_map((lab[:, :1] / 100 - MEAN) / STD)  # a grey image
    answer = F.interpolate(its.head(h), (side, side), mode="bilinear")
    return F.adaptive_avg_pool2d(lab[:, 1:], side), answer, h


def reference_classes(its, batch, step, update):
    """Section 2.2: eq. 2 to 4 with the 10 nearest bins of the official code, which leaves grey images out."""
    its.side = 12
    colours, answer, h = colour_map(its, batch.views["global"][0])
    colours, logits = (z.permute(0, 2, 3, 1).flatten(0, 2) for z in (colours, answer))
    between = (its.bins[:, None] - its.bins).square().sum(2)
    gaussian = (-between / (2 * 5.0**2)).exp()
    smooth = (its.frequency[:, None] * gaussian / gaussian.sum(1, keepdim=True)).sum(0)
    weight = 1 / (0.7 * smooth + 0.3 / len(smooth))
    weight = weight / (smooth * weight).sum()
    loss, hits, counts = 0, 0, torch.zeros(len(its.bins))
    log_p = logits.log_softmax(1)
    for row, colour in enumerate(colours):
        distance = (its.bins - colour).square().sum(1)
        nearest = distance.argsort()[:10]
        target = (-distance[nearest] / (2 * 5.0**2)).exp()
        counts[nearest[0]] += 1
        hits += logits[row].argmax() == nearest[0]
        image = colours[row // 144 * 144 : (row // 144 + 1) * 144]
        if (image.abs() > 5).any():
            loss -= weight[nearest[0]] * (target / target.sum() * log_p[row, nearest]).sum()
    update(loss / len(colours))
    figures = {
        "accuracy": hits / len(colours),
        "most_frequent": its.frequency.max(),
        "feature_std": spread(h.mean((2, 3))),
    }
    its.frequency = (its.counted * its.frequency + counts / len(colours)) / (its.counted + 1)
    its.counted = its.counted + 1
    most = colours.view(ROWS, -1).abs().max(1).values
    assert most[0] < 1e-3 < most[1] < 5 < most[2] < 30
    return figures


def doubling(d_in, d_out):
    """Twice as many pixels a side."""
    layers = [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(d_in, d_out, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(d_out), nn.ReLU())


def test_colorization_by_classes_steps_as_its_paper():
    settings = {"form": "classification", "resolution": 0.75, "hidden_dim": 5, "rebalance": 0.3, "annealing": 0.38}
    method = Colorization(backbone((3, 4, 7)), facts(image_size=16), **settings)
    assert torch.equal(method.bins, colour_bins(10))
    frequency = torch.rand(len(method.bins), generator=torch.Generator().manual_seed(0)).double() ** 4
    disturbed(method, frequency=frequency / frequency.sum(), counted=torch.tensor(3))
    head = nn.Sequential(doubling(7, 5), doubling(5, 5), nn.Conv2d(5, len(method.bins), 1))
    compare(method, reference_classes, coloured(), networks={"head": lambda: head}, first_step=3)


def reference_regression(its, batch, step, update):
    """Eq. 1, with a and b divided by 110 as in the official network."""
    its.side = 8
    colours, answer, h = colour_map(its, batch.views["global"][0])
    loss = (answer - colours / 110).square().mean()
    update(loss)
    unexplained = loss.detach() / (colours / 110).square().mean()
    return {"unexplained": unexplained, "feature_std": spread(h.mean((2, 3)))}


def test_colorization_by_regression_steps_as_its_paper():
    settings = {"form": "regression", "resolution": 0.5, "hidden_dim": 5, "rebalance": 0.3, "annealing": 0.38}
    method = disturbed(Colorization(backbone(), facts(image_size=16), **settings))
    head = nn.Sequential(nn.Conv2d(7, 2, 1))
    compare(method, reference_regression, coloured(), networks={"head": lambda: head}, first_step=3)


# --- Autoencoders ---


def reference_autoencoder(its, batch, step, update):
    """Section 3 of Vincent et al. 2010: of a corrupted image the clean one. Squares of 5 pixels are black, then noise."""
    key, x = batch.key, batch.views["global"][0]
    black, noise = key.uniform("autoencoder/hidden", 1, 4, 4) < 0.3, key.normal("autoencoder/noise", 3, 16, 16)
    spoilt = x.clone()
    for b, _, row, column in black.nonzero().tolist():
        spoilt[b, :, 5 * row : 5 * (row + 1), 5 * column : 5 * (column + 1)] = 0
    h = its.backbone(spoilt + 0.4 * noise)
    error = ((its.decoder(its.bottleneck(h)) * STD + MEAN - x) ** 2).mean()
    update(error)
    return {"unexplained": error.detach() / BLIND, "feature_std": spread(h)}


def test_autoencoder_steps_as_its_paper():
    settings = {"code_dim": 5, "noise_std": 0.4, "hidden": 0.3, "hidden_size": 5}
    method = disturbed(Autoencoder(backbone((2, 5)), facts(image_size=16), **settings))

    def features(its, x):
        return {"backbone": its.backbone(x), "code": its.bottleneck(its.backbone(x))}

    compare(method, reference_autoencoder, images(16), first_step=3, features=features)


def reference_vae(its, batch, step, update):
    """Eq. 7 and 10 and appendix B, with a Gaussian decoder (appendix C.2) of a fixed deviation, and β that grows to 0.8."""
    x = batch.views["global"][0]
    h = its.backbone(x)
    mu, log_variance = its.mean_head(h), its.log_variance_head(h)
    z = mu + log_variance.exp().sqrt() * batch.key.normal("vae/noise", 6)
    squares = ((its.decoder(z) * STD + MEAN - x) ** 2).sum((1, 2, 3))
    divergence = -0.5 * (1 + log_variance - mu**2 - log_variance.exp())
    beta = {3: 0.8 * 4 / 5, 4: 0.8, 5: 0.8}[step]
    update((squares / (2 * 9.0**2) + beta * divergence.sum(1)).sum() / ROWS)
    figures = {
        "kl": divergence.detach().sum() / ROWS,
        "unexplained": squares.detach().sum() / (ROWS * 3 * 16 * 16) / BLIND,
    }
    used = (divergence.detach().sum(0) / ROWS > 0.01).sum()
    return figures | {"codes_in_use": used, "feature_std": spread(h)}


def test_vae_steps_as_its_paper():
    settings = {"code_dim": 6, "likelihood_std": 9.0, "beta": 0.8, "beta_warmup_epochs": 0.36}
    method = disturbed(VAE(backbone((2, 5)), facts(image_size=16), **settings))
    with torch.no_grad():
        for head in (method.mean_head, method.log_variance_head):
            head.weight[:2] *= 1e-4  # a code that nearly nobody uses, and one that is used a little …
            head.bias[:2] = torch.tensor([0.0, 0.2])
        method.log_variance_head.weight[2] *= 1e-4  # … and one for some images more than for others
        method.mean_head.bias[2], method.log_variance_head.bias[2] = 0.12, 0.0

    def features(its, x):
        return {"backbone": its.backbone(x), "mean": its.mean_head(its.backbone(x))}

    compare(method, reference_vae, images(16, 3), first_step=3, features=features)
