"""Steps of BYOL and SimSiam beside steps written from their papers."""

import math

import pytest
import torch
from torch import nn

from sslctl.methods.byol import BYOL
from sslctl.methods.simsiam import SimSiam
from tests.steps.compare import (
    LR,
    ROWS,
    TOTAL_STEPS,
    backbone,
    batch_of,
    begun,
    compare,
    disturbed,
    facts,
    of_projector,
    of_projector_and_teacher,
    spread,
    unit,
)

# --- BYOL, arXiv:2006.07733, section 3.1 ---


def byol_head(d_in):
    """Section 3.3: Linear, BatchNorm, ReLU, Linear without bias."""
    return nn.Sequential(nn.Linear(d_in, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5, bias=False))


def reference_byol(its, batch, step, update):
    x, y = batch.views["global"]
    z, w = its.projector(h := its.backbone(x)), its.projector(its.backbone(y))
    target_x = its.teacher_projector(its.teacher_backbone(x)).detach()
    target_y = its.teacher_projector(its.teacher_backbone(y)).detach()
    distance = (unit(its.predictor(z)) - unit(target_y)).square().sum(1)  # eq. 2
    distance = distance + (unit(its.predictor(w)) - unit(target_x)).square().sum(1)
    update(distance.sum() / ROWS)
    tau = 0.9 - (0.9 - 0.7) * (math.cos(math.pi * step / TOTAL_STEPS) + 1) / 2
    with torch.no_grad():
        for target, online in ((its.teacher_backbone, its.backbone), (its.teacher_projector, its.projector)):
            for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
                xi.copy_(tau * xi + (1 - tau) * theta)  # eq. 1
    return {"feature_std": spread(h), "projector_std": spread(z)}


def test_byol_steps_as_its_paper():
    settings = {"hidden_dim": 16, "out_dim": 5, "teacher_momentum": 0.7, "teacher_momentum_end": 0.9}
    method = disturbed(begun(BYOL(backbone(), facts(), **settings)))
    networks = {"backbone": backbone, "projector": lambda: byol_head(7), "predictor": lambda: byol_head(5)}
    batches = [batch_of(step) for step in (13, 14)]
    compare(method, reference_byol, batches, networks=networks, first_step=13, features=of_projector_and_teacher)


# --- SimSiam, arXiv:2011.10566, algorithm 1 ---


def simsiam_projector(layers, hidden):
    """Section 3: BatchNorm behind every Linear, that of the output without weights."""
    modules, d_in = [], 7
    for _ in range(layers - 1):
        modules += [nn.Linear(d_in, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
        d_in = hidden
    return nn.Sequential(*modules, nn.Linear(d_in, 5, bias=False), nn.BatchNorm1d(5, affine=False))


def simsiam_predictor():
    """Section 3: no BatchNorm behind its output."""
    return nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))


@pytest.mark.parametrize(("layers", "hidden", "constant"), [(3, 9, True), (2, None, False)])
def test_simsiam_steps_as_its_paper(layers, hidden, constant):
    def reference(its, batch, step, update):
        x1, x2 = batch.views["global"]
        f1, f2 = its.backbone(x1), its.backbone(x2)
        z1, z2 = its.projector(f1), its.projector(f2)
        p1, p2 = its.predictor(z1), its.predictor(z2)
        d1 = -sum(torch.dot(p / p.norm(), z / z.norm()) for p, z in zip(p1, z2.detach(), strict=True)) / ROWS
        d2 = -sum(torch.dot(p / p.norm(), z / z.norm()) for p, z in zip(p2, z1.detach(), strict=True)) / ROWS
        update(d1 / 2 + d2 / 2, rates={"predictor": LR} if constant else {})
        return {"feature_std": spread(f1), "projector_std": spread(z1), "predictor_std": spread(p1)}

    settings = {"projector_layers": layers, "hidden_dim": hidden, "out_dim": 5, "predictor_dim": 6}
    method = disturbed(SimSiam(backbone(), facts(), **settings, constant_predictor_lr=constant))
    networks = {
        "backbone": backbone,
        "projector": lambda: simsiam_projector(layers, hidden or 7),
        "predictor": simsiam_predictor,
    }
    batches = [batch_of(step) for step in (3, 4)]
    compare(method, reference, batches, networks=networks, first_step=3, features=of_projector)
