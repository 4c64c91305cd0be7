"""Steps of Barlow Twins and VICReg beside steps written from their papers."""

import torch
from torch import nn

from sslctl.methods.barlow_twins import BarlowTwins
from sslctl.methods.vicreg import VICReg
from tests.steps.compare import ROWS, backbone, batch_of, compare, disturbed, facts, of_projector, spread

# --- Barlow Twins, arXiv:2103.03230, algorithm 1 ---


def barlow_projector():
    """Section 2.2: no biases, BatchNorm and ReLU behind the first two Linears."""
    layers = [nn.Linear(7, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU()]
    layers += [nn.Linear(9, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(9, 5, bias=False))


def reference_barlow_twins(its, batch, step, update):
    h_a, h_b = (its.backbone(view) for view in batch.views["global"])
    z_a, z_b = its.projector(h_a), its.projector(h_b)
    a, b = (nn.BatchNorm1d(5, affine=False)(z) for z in (z_a, z_b))
    c = sum(torch.outer(row_a, row_b) for row_a, row_b in zip(a, b, strict=True)) / ROWS
    loss = sum((1 - c[i, i]) ** 2 if i == j else 0.03 * c[i, j] ** 2 for i in range(5) for j in range(5))
    update(0.4 * loss)
    return {"feature_std": spread(h_a), "projector_std": spread(z_a)}


def test_barlow_twins_steps_as_its_paper():
    settings = {"projector_layers": 3, "hidden_dim": 9, "out_dim": 5, "lambda_": 0.03, "scale": 0.4}
    method = disturbed(BarlowTwins(backbone(), facts(), **settings))
    networks = {"backbone": backbone, "projector": barlow_projector}
    compare(method, reference_barlow_twins, [batch_of(0), batch_of(1)], networks=networks, features=of_projector)


# --- VICReg, arXiv:2105.04906, section 4.1, with the factors of the official code ---


def expander():
    """Section 4.2: two hidden layers with BatchNorm and ReLU."""
    layers = [nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(9, 5, bias=False))


def reference_vicreg(its, batch, step, update):
    h, h2 = (its.backbone(view) for view in batch.views["global"])
    z, z2 = its.projector(h), its.projector(h2)
    loss = 3 * (z - z2).square().mean()
    for y in (z, z2):
        centred = y - y.mean(0)
        c = torch.einsum("ni,nj->ij", centred, centred) / (ROWS - 1)  # eq. 3
        hinge = [max(1 - (c[j, j] + 1e-4).sqrt(), torch.zeros(())) for j in range(5)]  # eq. 1 and 2
        loss = loss + 11 * sum(hinge) / 5 / 2
        loss = loss + 0.7 * sum(c[i, j] ** 2 for i in range(5) for j in range(5) if i != j) / 5  # eq. 4
    update(loss)
    return {"feature_std": spread(h), "embedding_std": z.detach().std(0).mean()}


def test_vicreg_steps_as_its_paper():
    settings = {"hidden_dim": 9, "out_dim": 5, "invariance": 3.0, "variance": 11.0, "covariance": 0.7}
    method = disturbed(VICReg(backbone(), facts(), **settings))
    networks = {"backbone": backbone, "projector": expander}
    compare(method, reference_vicreg, [batch_of(0), batch_of(1)], networks=networks, features=of_projector)
