"""Steps of SimCLR, DCL, SupCon, NNCLR, MoCo v3 and CPC beside steps written from their papers."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from sslctl.methods.cpc import CPC
from sslctl.methods.dcl import DCL
from sslctl.methods.moco_v3 import MoCoV3
from sslctl.methods.nnclr import NNCLR
from sslctl.methods.simclr import SimCLR
from sslctl.methods.supcon import SupCon
from tests.steps.compare import (
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
    transformer,
    unit,
    units,
)

PARTNER = [*range(ROWS, 2 * ROWS), *range(ROWS)]  # of 2N views, the first ones and then the second ones


def similarities(its, batch):
    """Cosines of all 2N views (2N, 2N), and the features h (2N, D); both views are one batch to the BatchNorms."""
    h = its.backbone(torch.cat([*batch.views["global"]]))
    z = unit(its.projector(h))
    return z @ z.T, h


# --- SimCLR, arXiv:2002.05709, algorithm 1; DCL, arXiv:2110.06848, section 3 ---


def simclr_projector(layers, hidden, norm):
    """Appendix B.9; with BatchNorm behind every Linear as in the official code, whose last one has no shift."""
    modules, d_in = [], 7
    for _ in range(layers - 1):
        modules += [nn.Linear(d_in, hidden, bias=not norm), *([nn.BatchNorm1d(hidden)] if norm else []), nn.ReLU()]
        d_in = hidden
    modules.append(nn.Linear(d_in, 5, bias=not norm))
    if norm:
        modules.append(nn.BatchNorm1d(5))
        modules[-1].bias.requires_grad_(False)
    return nn.Sequential(*modules)


HEADS = [(2, None, True), (3, 9, True), (2, 9, False)]  # layers, hidden width, BatchNorm


@pytest.mark.parametrize(("layers", "hidden", "norm"), HEADS)
def test_simclr_steps_as_its_paper(layers, hidden, norm):
    def reference(its, batch, step, update):
        s, h = similarities(its, batch)
        powers = (s / 0.3).exp()
        losses = []
        for i, j in enumerate(PARTNER):
            whole = sum(powers[i, k] for k in range(2 * ROWS) if k != i)
            losses.append(-torch.log(powers[i, j] / whole))  # eq. 1
        update(sum(losses) / (2 * ROWS))
        return {"feature_std": spread(h)}

    settings = {"projector_layers": layers, "hidden_dim": hidden, "out_dim": 5, "norm": norm, "temperature": 0.3}
    method = disturbed(SimCLR(backbone(), facts(), **settings))
    networks = {"backbone": backbone, "projector": lambda: simclr_projector(layers, hidden or 7, norm)}
    compare(method, reference, [batch_of(0), batch_of(1)], networks=networks, features=of_projector)


@pytest.mark.parametrize(("layers", "hidden", "norm", "sigma"), [(*HEADS[0], None), (*HEADS[1], 0.5), (*HEADS[2], 0.9)])
def test_dcl_steps_as_its_paper(layers, hidden, norm, sigma):
    def reference(its, batch, step, update):
        s, h = similarities(its, batch)
        own = torch.stack([s[i, j] for i, j in enumerate(PARTNER)])
        weight = torch.ones(2 * ROWS)
        if sigma:
            hardness = (own.detach() / sigma).exp()
            weight = 2 - hardness / hardness.mean()  # of DCLW
        losses = []
        for i, j in enumerate(PARTNER):
            others = sum((s[i, k] / 0.3).exp() for k in range(2 * ROWS) if k not in (i, j))
            losses.append(-weight[i] * own[i] / 0.3 + others.log())  # eq. 6
        update(sum(losses) / (2 * ROWS))
        return {"feature_std": spread(h)}

    settings = {"projector_layers": layers, "hidden_dim": hidden, "out_dim": 5, "norm": norm}
    method = disturbed(DCL(backbone(), facts(), **settings, temperature=0.3, sigma=sigma))
    networks = {"backbone": backbone, "projector": lambda: simclr_projector(layers, hidden or 7, norm)}
    compare(method, reference, [batch_of(0), batch_of(1)], networks=networks, features=of_projector)


# --- SupCon, arXiv:2004.11362, section 3.2.2 ---


@pytest.mark.parametrize("hidden", [None, 9])
def test_supcon_steps_as_its_paper(hidden):
    def reference(its, batch, step, update):
        s, h = similarities(its, batch)
        label = batch.label.tolist() * 2
        assert len(set(Counter(label).values())) > 1, "classes of one size would not tell how anchors are averaged"
        losses = []
        for i in range(2 * ROWS):
            a = [k for k in range(2 * ROWS) if k != i]
            p = [k for k in a if label[k] == label[i]]
            whole = torch.logsumexp(s[i, a] / 0.2, 0)
            losses.append(-sum(s[i, k] / 0.2 - whole for k in p) / len(p))  # eq. 2
        update(sum(losses) / (2 * ROWS) * 0.2 / 0.07)  # the official code's scale
        return {"feature_std": spread(h)}

    method = disturbed(SupCon(backbone(), facts(), hidden_dim=hidden, out_dim=5, temperature=0.2))
    networks = {"backbone": backbone, "projector": lambda: simclr_projector(2, hidden or 7, norm=False)}
    compare(method, reference, [batch_of(0), batch_of(1)], networks=networks, features=of_projector)


# --- NNCLR, arXiv:2104.14548, section 3.2 and algorithm 1 ---


def nnclr_projector(layers):
    """Appendix: BatchNorm behind every Linear, ReLU behind all but the last."""
    modules, d_in = [], 7
    for _ in range(layers - 1):
        modules += [nn.Linear(d_in, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU()]
        d_in = 9
    return nn.Sequential(*modules, nn.Linear(d_in, 5, bias=False), nn.BatchNorm1d(5))


def nnclr_predictor():
    return nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))


@pytest.mark.parametrize("layers", [2, 3])
def test_nnclr_steps_as_its_paper(layers):
    def nearest(z, queue):
        return torch.stack([max(queue, key=lambda row, z=z_i: float(row @ z)) for z_i in z])

    def reference(its, batch, step, update):
        x1, x2 = batch.views["global"]
        h1, h2 = its.backbone(x1), its.backbone(x2)
        z1, z2 = its.projector(h1), its.projector(h2)
        p1, p2 = unit(its.predictor(z1)), unit(its.predictor(z2))
        nn1, nn2 = nearest(unit(z1.detach()), its.queue), nearest(unit(z2.detach()), its.queue)
        assert not torch.equal(nn1, nn2), "views with the same neighbours would not tell which is whose"
        loss_12 = -torch.log(torch.softmax(nn1 @ p2.T / 0.3, 1).diagonal()).mean()  # eq. 3
        loss_21 = -torch.log(torch.softmax(nn2 @ p1.T / 0.3, 1).diagonal()).mean()
        update(loss_12 / 2 + loss_21 / 2)
        for row in unit(z1.detach()):
            its.queue[its.queue_pointer] = row
            its.queue_pointer.copy_((its.queue_pointer + 1) % 10)
        return {"feature_std": spread(h1)}

    settings = {"projector_layers": layers, "hidden_dim": 9, "out_dim": 5, "predictor_dim": 8, "queue_size": 10}
    method = NNCLR(backbone(), facts(), **settings, temperature=0.3)
    disturbed(begun(method), queue=units(10, 5), queue_pointer=torch.tensor(7))
    networks = {"backbone": backbone, "projector": lambda: nnclr_projector(layers), "predictor": nnclr_predictor}
    compare(method, reference, [batch_of(0), batch_of(1)], networks=networks, features=of_projector)


# --- MoCo v3, arXiv:2104.02057, algorithm 1 ---


def moco_v3_head(d_in, layers, last_norm):
    """Section 4.1: no biases; the last BatchNorm, where there is one, has no weights (official code)."""
    modules = []
    for _ in range(layers - 1):
        modules += [nn.Linear(d_in, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU()]
        d_in = 9
    modules.append(nn.Linear(d_in, 5, bias=False))
    return nn.Sequential(*modules, *([nn.BatchNorm1d(5, affine=False)] if last_norm else []))


def reference_moco_v3(its, batch, step, update):
    x1, x2 = batch.views["global"]
    m = 0.9 - (0.9 - 0.7) * (math.cos(math.pi * step / TOTAL_STEPS) + 1) / 2
    with torch.no_grad():
        for slow, fast in ((its.teacher_backbone, its.backbone), (its.teacher_projector, its.projector)):
            for k, q in zip(slow.parameters(), fast.parameters(), strict=True):
                k.copy_(m * k + (1 - m) * q)
        h_k1, h_k2 = its.teacher_backbone(x1), its.teacher_backbone(x2)
        k1, k2 = unit(its.teacher_projector(h_k1)), unit(its.teacher_projector(h_k2))
    h1, h2 = its.backbone(x1), its.backbone(x2)
    q1, q2 = unit(its.predictor(its.projector(h1))), unit(its.predictor(its.projector(h2)))
    ctr = [2 * 0.3 * -torch.log_softmax(q @ k.T / 0.3, 1).diagonal().mean() for q, k in ((q1, k2), (q2, k1))]
    update(ctr[0] + ctr[1])
    return {"feature_std": spread(h1)}


MOMENTA = {"teacher_momentum": 0.7, "teacher_momentum_end": 0.9}


def test_moco_v3_steps_as_its_paper():
    settings = {"projector_layers": 2, "hidden_dim": 9, "out_dim": 5, "predictor_norm": False, "freeze_patches": False}
    method = disturbed(begun(MoCoV3(backbone(), facts(), **settings, temperature=0.3, **MOMENTA)))
    networks = {
        "backbone": backbone,
        "projector": lambda: moco_v3_head(7, 2, True),
        "predictor": lambda: moco_v3_head(5, 2, False),
    }
    batches = [batch_of(step) for step in (17, 18)]
    compare(method, reference_moco_v3, batches, networks=networks, first_step=17, features=of_projector_and_teacher)


def still_transformer():
    """Its patch projection stays random (section 4.2), its positions are sines (section 5)."""
    body = transformer()
    for name, parameter in body.named_parameters():
        parameter.requires_grad_("patch_embed" not in name and "pos_embed" not in name)
    return body


def test_moco_v3_steps_as_its_paper_with_a_vision_transformer():
    settings = {"projector_layers": 3, "hidden_dim": 9, "out_dim": 5, "predictor_norm": True, "freeze_patches": True}
    method = MoCoV3(transformer(), facts(), **settings, temperature=0.3, **MOMENTA)
    assert not method.backbone.network.model.pos_embed[0, 0].any()  # sines leave the class token where it is
    networks = {"projector": lambda: moco_v3_head(8, 3, True), "predictor": lambda: moco_v3_head(5, 2, True)}
    networks["backbone"] = still_transformer
    compare(disturbed(method), reference_moco_v3, [batch_of(0), batch_of(1)], networks=networks)


# --- CPC, arXiv:1807.03748 and arXiv:1905.09272, section 3 and appendix ---


class MaskedContext(nn.Module):
    """Residual blocks of masked convolutions: of its own row and the one above."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"0": nn.Conv2d(5, 5, 1), "3": nn.Conv2d(5, 5, (2, 3))}) for _ in range(blocks)
        )
        self.mixers = nn.ModuleList(nn.Conv2d(5, 5, 1) for _ in range(blocks))

    def forward(self, z):
        for block, mixer in zip(self.blocks, self.mixers, strict=True):
            inner = torch.relu(block["0"](z))
            inner = nn.functional.pad(inner, (1, 1, 1, 0))  # a column on both sides, a row above
            z = z + mixer(torch.relu(block["3"](inner)))
        return torch.relu(z)


def patches_of(images):
    """3×3 patches of 4×4 pixels, half over each other: (B, 9, C, 4, 4)."""
    return torch.stack([images[:, :, r : r + 4, c : c + 4] for r in (0, 2, 4) for c in (0, 2, 4)], 1)


TO_DOWNWARDS = {  # a grid (B, g, g, …) turned such that the rows that are predicted come last
    "down": lambda grid: grid,
    "up": lambda grid: grid.flip(1),
    "right": lambda grid: grid.transpose(1, 2),
    "left": lambda grid: grid.transpose(1, 2).flip(1),
}


@pytest.mark.parametrize(
    ("directions", "skip", "reach", "blocks", "drop"),
    [(1, 1, 1, 1, 0.0), (2, 2, 2, 2, 1.0), (3, 1, 1, 1, 0.5), (4, 1, 2, 2, 0.5)],
)
def test_cpc_steps_as_its_paper(directions, skip, reach, blocks, drop):
    def one_channel(patches, batch):
        """With a chance of `drop` one channel of a patch stands for all."""
        patches = patches.clone()
        dropped, channel = batch.key.uniform("cpc/colour", 9) < drop, batch.key.uniform("cpc/channel", 9) * 3
        for b, p in dropped.nonzero().tolist():
            patches[b, p] = patches[b, p, int(channel[b, p])].expand(3, -1, -1)
        return patches

    def reference(its, batch, step, update):
        patches = one_channel(patches_of(batch.views["global"][0]), batch)
        h = torch.stack([its.backbone(image) for image in patches])  # (B, 9, D)
        z = its.projector(h).view(ROWS, 3, 3, 5)
        everything, losses = z.view(-1, 5), []
        for number, direction in enumerate(list(TO_DOWNWARDS)[:directions]):
            grid = TO_DOWNWARDS[direction](z)
            c = its.contexts[number](grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            for k in range(skip, reach + 1):
                w = its.predictors[number][k - skip].weight
                terms = []
                for b, row, column in torch.cartesian_prod(*map(torch.arange, (ROWS, 3 - k, 3))).tolist():
                    prediction, target = w @ c[b, row, column], grid[b, row + k, column]
                    terms.append(torch.logsumexp(everything @ prediction, 0) - target @ prediction)  # eq. 4
                losses.append(sum(terms) / len(terms))
        update(sum(losses) / len(losses))
        return {"feature_std": spread(h.mean(1))}

    def features(its, images):
        return {
            "patches": its.backbone(patches_of(images).flatten(0, 1)).view(-1, 9, 7).mean(1),
            "backbone": its.backbone(images),
        }

    settings = {
        "grid": 3,
        "out_dim": 5,
        "context_blocks": blocks,
        "directions": directions,
        "skip": skip,
        "reach": reach,
    }
    method = disturbed(CPC(backbone(norm="layer"), facts(), **settings, colour_drop=drop))
    networks = {
        "backbone": lambda: backbone(norm="layer"),
        "projector": lambda: nn.Linear(7, 5),
        "contexts": lambda: nn.ModuleList(MaskedContext(blocks) for _ in range(directions)),
        "predictors": lambda: nn.ModuleList(
            nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(skip, reach + 1)) for _ in range(directions)
        ),
    }
    batches = [batch_of(0, views=1), batch_of(1, views=2)]  # of two views the first
    compare(method, reference, batches, networks=networks, features=features)
