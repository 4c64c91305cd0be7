"""Losses of outputs that say nothing, are as good as can be, or have collapsed: through the methods, which have factors of
their own. And the bounds of losses of correlations where there are more dimensions than images.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from sslctl.losses import barlow_twins, sinkhorn, swav, vicreg
from tests.methods import built, silence, tell


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def told(name, *words, rows=8, prepare=lambda method: None, **outputs):
    """A method's loss where some of its networks say these outputs, one call after the other."""
    its = built(name, *words, rows=rows)
    prepare(its.method)
    for network, values in outputs.items():
        tell(its.method.get_submodule(network), *values)
    return its.loss()


def silent(name, *words, network, prepare=lambda method: None):
    """A method's loss where a network's outputs are 0: no similarity to anything."""
    its = built(name, *words)
    prepare(its.method)
    silence(its.method.get_submodule(network))
    return its.loss()


def dino(logits, prototypes):
    """Student and teacher say the same for all of two images."""
    words = (f"method.prototypes={prototypes}", "method.bottleneck_dim=4", "augmentation.local.count=1")
    return told("dino", *words, rows=2, head=[logits.expand(6, -1)], teacher_head=[logits.expand(4, -1)])


def ibot_half_unmasked():
    def half(method):
        hidden = torch.zeros(8, 16, dtype=torch.bool)
        hidden[::2, :5] = True
        method.masks = lambda batch, view: hidden

    words = ("method.prototypes=8192", "method.bottleneck_dim=4")
    return silent("ibot", *words, network="head.0", prepare=half)


def deepcluster():
    def three_thousand(method):
        method.centroids = F.normalize(normal(3, 3000, 128), dim=2)
        method.assignments.copy_(torch.arange(300).view(3, 100))

    return silent("deepcluster_v2", network="projector", prepare=three_thousand)


def swav_collapsed():
    """All images alike: Sinkhorn balances what it cannot tell apart, and the prediction is any other distribution."""
    scores = normal(1, 1, 30).expand(2, 8, 30)
    return swav(scores, sinkhorn(scores[0], 0.05, 3).expand(2, -1, -1), 0.1)


GOLDEN = {  # name: (loss, value, how far off it may be: as many decimals as are known, rounding, or what noise differs by)
    "w-mse, collapsed": (lambda: told("wmse", projector=[torch.ones(16, 4)]), math.nan, 0.0),  # a run stops there
    "swav, blind": (lambda: silent("swav", "method.prototypes=3000", network="projector"), 8.006, 5e-4),
    "deepcluster v2, blind": (deepcluster, 8.006, 5e-4),
    "dino, blind": (lambda: dino(torch.zeros(65_536), 65_536), 11.090, 5e-4),
    "dino, one prototype for all": (lambda: dino(100 * torch.eye(20)[0], 20), 0.0, 1e-6),
    "ibot, blind, half of the images unmasked": (ibot_half_unmasked, 1.5 * 9.011, 1e-3),
    "msn, blind": (lambda: silent("msn", "method.prototypes=1024", network="projector"), 6.931, 5e-4),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_loss_has_its_golden_value(name):
    loss, expected, tolerance = GOLDEN[name]
    assert loss().item() == pytest.approx(expected, rel=0, abs=tolerance, nan_ok=True)


def test_swav_of_views_that_are_all_alike_is_no_better_than_blind():
    assert swav_collapsed().item() > math.log(30) + 0.1


# --- Bounds: N images span N - 1 dimensions once their mean is taken off ---


def spread_evenly(rows, times):
    """(N, D) of D = (N - 1)·times columns with mean 0 and variance 1, as far from each other as so few rows allow."""
    basis = torch.linalg.qr(torch.cat([torch.ones(rows, 1), normal(rows, rows - 1)], 1).double()).Q[:, 1:]
    turns = [torch.linalg.qr(normal(rows - 1, rows - 1, seed=seed).double()).Q for seed in range(times)]
    return basis @ torch.cat(turns, 1) * math.sqrt(rows - 1)


@pytest.mark.parametrize(("rows", "times"), [(8, 2), (8, 5), (33, 3)])
def test_vicregs_covariances_stop_at_their_bound(rows, times):
    z, bound = spread_evenly(rows, times), 2 * (times - 1)  # 2·(D / (N - 1) - 1)
    torch.testing.assert_close(z.var(0), torch.ones(z.shape[1], dtype=z.dtype))
    assert vicreg(z, z, 25, 0, 1).item() == pytest.approx(bound, rel=1e-9)
    noise = normal(*z.shape).double()
    noise = (noise - noise.mean(0)) / noise.std(0)
    assert vicreg(noise, noise, 25, 0, 1).item() > bound


@pytest.mark.parametrize(("rows", "times", "lambda_"), [(8, 2, 0.05), (8, 5, 0.0051), (8, 5, 0.1)])
def test_barlow_twins_stops_above_its_rank_bound(rows, times, lambda_):
    k = lambda_ * (times - 1)
    z = 1000 * spread_evenly(rows, times)  # BatchNorm's ε is nothing beside it
    dim = z.shape[1]
    bound = dim * k / (1 + k)
    assert barlow_twins(z, z, lambda_).item() == pytest.approx(dim * k, rel=1e-6)  # the bound, to the first order of k
    pair = normal(2, rows, dim).double().requires_grad_()
    optimizer = torch.optim.Adam([pair], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = barlow_twins(*pair, lambda_)
        loss.backward()
        optimizer.step()
    assert bound < loss.item() < 1.02 * dim * k
