"""Steps of W-MSE (arXiv:2007.06346, section 3) beside a step written from its paper."""

import itertools

import torch
from torch import nn

from sslctl.methods.wmse import WMSE
from tests.steps.compare import backbone, batch_of, compare, disturbed, facts, of_projector, spread


def whitening_head():
    """Section 5.1: one hidden layer with BatchNorm."""
    return nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))


def whitened(v):
    """Equations 5 and 6: mean 0, and the identity as covariance."""
    v = v - v.mean(0)
    return v @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(v.T))).T


def reference_wmse(its, batch, step, update):
    h = torch.cat([its.backbone(view) for view in batch.views["global"]])  # (3·12, 7)
    v = its.projector(h).view(3, 12, 3)
    shuffled = batch.key.bits("wmse/parts", 2).argsort(0)  # (12, draws)
    distances = []
    for draw, half in itertools.product((0, 1), (slice(0, 6), slice(6, 12))):
        z = [whitened(view[shuffled[half, draw]]) for view in v]
        for a, b in itertools.combinations(z, 2):
            distances += (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).square().sum(1)
    update(sum(distances) / len(distances))
    return {"feature_std": spread(h)}


def test_wmse_steps_as_its_paper():
    settings = {"hidden_dim": 9, "out_dim": 3, "whitening_size": 6, "draws": 2}
    method = disturbed(WMSE(backbone(), facts(batch_size=12), **settings))
    batches = [batch_of(step, views=3, rows=12) for step in (0, 1)]
    networks = {"backbone": backbone, "projector": whitening_head}
    compare(method, reference_wmse, batches, networks=networks, features=of_projector)
