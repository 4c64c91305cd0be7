"""Losses of embeddings that have collapsed, and bounds of losses of correlations of more dimensions than images."""

import math

import pytest
import torch

from sslctl.losses import barlow_twins, sinkhorn, swav, vicreg
from tests.methods import built, tell


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Collapse ---


def test_swav_of_views_that_are_all_alike_is_no_better_than_blind():
    """Sinkhorn balances what it cannot tell apart, and the prediction is any other distribution."""
    scores = normal(1, 1, 30).expand(2, 8, 30)
    assert swav(scores, sinkhorn(scores[0], 0.05, 3).expand(2, -1, -1), 0.1).item() > math.log(30) + 0.1


def test_wmse_of_views_that_are_all_alike_is_no_number():
    """A run stops there."""
    its = built("wmse")
    tell(its.method.projector, torch.ones(16, 4))
    assert its.loss().isnan()


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
