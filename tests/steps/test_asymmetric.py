"""Steps of BYOL and SimSiam beside steps written from their papers."""

import math

import torch
from torch import nn

from sslctl.methods.byol import BYOL
from tests.steps.compare import ROWS, TOTAL_STEPS, backbone, batch_of, compare, disturbed, facts, spread, unit


def head(d_in, hidden, d_out):
    """BYOL, section 3.3: Linear, BatchNorm, ReLU, Linear without bias."""
    return nn.Sequential(
        nn.Linear(d_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, d_out, bias=False)
    )


def reference_byol(its, batch, step, update):
    x, y = batch.views["global"]
    z, w = its.projector(h := its.backbone(x)), its.projector(its.backbone(y))
    target_x = its.teacher_projector(its.teacher_backbone(x)).detach()
    target_y = its.teacher_projector(its.teacher_backbone(y)).detach()
    distance = (unit(its.predictor(z)) - unit(target_y)).square().sum(1)  # eq. 2
    distance = distance + (unit(its.predictor(w)) - unit(target_x)).square().sum(1)
    update(distance.sum() / ROWS)
    tau = 0.9 + (0.7 - 0.9) * (math.cos(math.pi * step / TOTAL_STEPS) + 1) / 2
    with torch.no_grad():
        for target, online in ((its.teacher_backbone, its.backbone), (its.teacher_projector, its.projector)):
            for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
                xi.copy_(tau * xi + (1 - tau) * theta)  # eq. 1
    return {"feature_std": spread(h), "projector_std": spread(z)}


def test_byol_steps_as_its_paper():
    settings = {"hidden_dim": 16, "out_dim": 5, "teacher_momentum": 0.7, "teacher_momentum_end": 0.9}
    method = disturbed(BYOL(backbone(), facts(), **settings))
    networks = {"projector": lambda: head(7, 16, 5), "predictor": lambda: head(5, 16, 5)}
    compare(method, reference_byol, [batch_of(step) for step in (13, 14)], networks=networks, first_step=13)
