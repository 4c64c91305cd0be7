"""Steps of DINO, iBOT and LeJEPA beside steps written from their papers."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from sslctl.methods.dino import DINO
from sslctl.methods.ibot import IBOT
from sslctl.methods.lejepa import LeJEPA
from sslctl.ops.masks import block_masks
from tests.steps.compare import (
    ROWS,
    TOTAL_STEPS,
    backbone,
    batch_of,
    compare,
    disturbed,
    facts,
    of_projector,
    spread,
    unit,
)
from tests.steps.transformers import PREFIX, embedded, encoded, of_tokens, vision_transformer


class UnitPrototypes(nn.Module):
    """DINO's last layer: a unit embedding's cosine with each prototype, by a weight norm of 1 (official code)."""

    def __init__(self, dim, count):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, dim))

    def forward(self, z):
        return unit(z) @ unit(self.weight).T


def head(*dims, norm=False):
    """Linears with GELU between them, the hidden ones with BatchNorm for a ResNet, and 8 prototypes (appendix C)."""
    layers = []
    for d_in, d_out in pairwise(dims):
        layers += [nn.Linear(d_in, d_out), *([nn.BatchNorm1d(d_out)] if norm else []), nn.GELU()]
    layers = layers[: -2 if norm else -1]
    return nn.Sequential(nn.Sequential(*layers), UnitPrototypes(dims[-1], 8))


TEACHING = {  # 10 steps an epoch: the prototypes are free from step 14 on, the temperature has risen at step 15
    "hidden_dim": 9,
    "bottleneck_dim": 5,
    "prototypes": 8,
    "student_temperature": 0.2,
    "teacher_temperature_start": 0.05,
    "teacher_temperature": 0.08,
    "teacher_temperature_warmup_epochs": 1.46,
    "center_momentum": 0.7,
    "teacher_momentum": 0.6,
    "teacher_momentum_end": 0.9,
    "freeze_epochs": 1.36,
    "clip_grad": 1.0,
}
STEPS = (13, 14, 15)
TEMPERATURES = {13: 0.05 + 0.03 * 13 / 15, 14: 0.05 + 0.03 * 14 / 15, 15: 0.08}


def cross_entropy(teacher, student, center, step):
    """H(P_t, P_s) of eq. 1, of each row. teacher, student: (…, K)."""
    p = ((teacher - center) / TEMPERATURES[step]).softmax(-1)
    return -(p * (student / 0.2).log_softmax(-1)).sum(-1)


def entropy(teacher, center, step):
    p = ((teacher - center) / TEMPERATURES[step]).softmax(-1)
    return -(p * p.log()).sum(-1).mean()


def freeze_and_clip(its, step, free):
    """The official code's cancel_gradients_last_layer and clip_gradients: of each parameter by itself."""
    if free:
        return lambda: None

    def after_backward():
        if step < 14:
            its.head[-1].weight.grad = None
        clipped = []
        for parameter in its.parameters():
            if parameter.grad is not None:
                factor = 1 / (parameter.grad.norm() + 1e-6)
                clipped.append(bool(factor < 1))
                parameter.grad *= factor if factor < 1 else 1
        assert {True, False} == set(clipped)

    return after_backward


@torch.no_grad()
def move_teacher(its, step):
    momentum = 0.9 + (0.6 - 0.9) * (1 + math.cos(math.pi * step / TOTAL_STEPS)) / 2
    for slow, fast in ((its.teacher_backbone, its.backbone), (its.teacher_head, its.head)):
        for theta_t, theta_s in zip(slow.parameters(), fast.parameters(), strict=True):
            theta_t.copy_(momentum * theta_t + (1 - momentum) * theta_s)


# --- DINO ---


def reference_dino(its, batch, step, update, free):
    """Algorithm 1 with the multi-crop of section 3.1: networks see the crops of one size as one batch, heads all of them."""
    whole, small = batch.views["global"], batch.views.get("local", ())
    h = torch.cat([its.backbone(torch.cat([*views])) for views in batch.views.values()])
    student = its.head(h).split(ROWS)
    with torch.no_grad():
        teacher = its.teacher_head(its.teacher_backbone(torch.cat([*whole]))).split(ROWS)
    pairs = [(t, s) for t in range(len(whole)) for s in range(len(whole) + len(small)) if t != s]
    loss = sum(cross_entropy(teacher[t], student[s], its.center, step).mean() for t, s in pairs) / len(pairs)
    update(loss, after_backward=freeze_and_clip(its, step, free))
    figures = {"teacher_entropy": entropy(torch.cat(teacher), its.center, step), "feature_std": spread(h[:ROWS])}
    its.center = 0.7 * its.center + 0.3 * torch.cat(teacher).mean(0, keepdim=True)
    move_teacher(its, step)
    return figures


def of_teacher(its, x):
    return {"teacher": its.teacher_backbone(x), "backbone": its.backbone(x)}


FREE = {"clip_grad": None, "freeze_epochs": 0.0}  # nothing is done to gradients


@pytest.mark.parametrize(
    ("hidden", "norm", "views", "crops", "more"),
    [((9, 9), False, 2, 3, {}), ((9,), True, 3, 2, {}), ((9, 9), True, 2, 0, FREE)],
)
def test_dino_steps_as_its_paper(hidden, norm, views, crops, more):
    settings = TEACHING | {"head_layers": len(hidden) + 1, "head_norm": norm} | more
    method = disturbed(DINO(backbone(), facts(), **settings), center=torch.linspace(-0.3, 0.3, 8))
    batches = [batch_of(step, views=views, crops=crops) for step in STEPS]
    reference = partial(reference_dino, free=bool(more))
    networks = {"head": lambda: head(7, *hidden, 5, norm=norm)}
    compare(method, reference, batches, networks=networks, first_step=STEPS[0], features=of_teacher)


# --- iBOT ---


def reference_ibot(its, batch, step, update, free):
    """Algorithm 1 with shared heads (section 3.3): hidden patches are told to the student by its mask token alone."""
    whole, small = batch.views["global"], batch.views.get("local", ())
    masks = [hidden(batch.key, view) for view in range(2)]  # (B, 16) each
    h, student, student_patches, teacher, teacher_patches = [], [], [], [], []
    for x, mask in zip(whole, masks, strict=True):
        h.append(encoded(its.backbone, torch.where(mask[..., None], its.mask_token, embedded(its.backbone, x))))
        student.append(its.head(h[-1][:, 0]))
        student_patches.append(its.head(h[-1][:, PREFIX:]))
        with torch.no_grad():
            z = its.teacher_head(encoded(its.teacher_backbone, embedded(its.teacher_backbone, x)))
        teacher.append(z[:, 0])
        teacher_patches.append(z[:, PREFIX:])
    student += [its.head(its.backbone(x)) for x in small]
    pairs = [(t, s) for t in range(2) for s in range(2 + len(small)) if t != s]
    whole_loss = sum(cross_entropy(teacher[t], student[s], its.centers[0], step).mean() for t, s in pairs) / len(pairs)
    patch_loss = 0
    for view in range(2):
        each = cross_entropy(teacher_patches[view], student_patches[view], its.centers[1], step)
        for b in range(ROWS):
            if masks[view][b].any():
                patch_loss = patch_loss + each[b][masks[view][b]].mean() / (2 * ROWS)
    update(whole_loss + 0.6 * patch_loss, after_backward=freeze_and_clip(its, step, free))
    figures = {
        "teacher_entropy": entropy(torch.stack(teacher), its.centers[0], step),
        "feature_std": spread(h[0][:, 0]),
    }
    means = torch.stack([torch.cat(teacher).mean(0), torch.cat(teacher_patches).mean((0, 1))])
    its.centers = 0.7 * its.centers + 0.3 * means
    move_teacher(its, step)
    return figures | {"patch_loss": patch_loss.detach()}


def hidden(key, view):
    """(B, 16): with a chance of 0.7 some blocks, a share drawn from 0.2 to 0.6 of the patches, rounded down."""
    some = key.uniform(f"ibot/{view}/chance") < 0.7
    share = 0.2 + 0.4 * key.uniform(f"ibot/{view}/ratio")
    mask = block_masks(key, [f"ibot/{view}"], 4, 4, torch.where(some, (16 * share).floor(), 0).long()[None])[0]
    assert 0 < some.sum() < ROWS
    return mask


@pytest.mark.parametrize(("crops", "more"), [(3, {}), (0, FREE)])
def test_ibot_steps_as_its_paper(crops, more):
    settings = (
        TEACHING | {"mask_chance": 0.7, "mask_ratio_low": 0.2, "mask_ratio_high": 0.6, "patch_weight": 0.6} | more
    )
    method = IBOT(vision_transformer(8), facts(), **settings)
    assert method.mask_token.numel() == 8
    disturbed(method, centers=torch.linspace(-0.3, 0.3, 16).view(2, 8))
    batches = [batch_of(step, crops=crops) for step in STEPS]
    reference = partial(reference_ibot, free=bool(more))
    networks = {"head": lambda: head(8, 9, 9, 5)}
    compare(method, reference, batches, networks=networks, first_step=STEPS[0], features=of_tokens)


# --- LeJEPA ---


def epps_pulley(x):
    """Section 4.2.3: n ∫ |φ_n(t) - φ(t)|² w(t) dt from -3 to 3 by trapezoids, with w(t) = φ(t) = exp(-t²/2). x: (n,)."""
    t = torch.linspace(-3, 3, 33)  # 17 knots from 0 on
    phi = torch.exp(1j * t[:, None] * x).mean(1)
    gauss = torch.exp(-t * t / 2)
    return len(x) * torch.trapezoid((phi - gauss).abs().square() * gauss, t)


def reference_lejepa(its, batch, step, update):
    """Algorithms 1 and 2, in which λ weighs SIGReg and 1 - λ the agreement of all views with the mean of the global ones."""
    whole = batch.views["global"]
    h = torch.cat([its.backbone(torch.cat([*views])) for views in batch.views.values()])
    z = its.projector(h).split(ROWS)
    center = sum(z[: len(whole)]) / len(whole)
    agreement = sum(((center - view) ** 2).mean() for view in z) / len(z)
    directions = batch.key.of(batch.index[:1]).normal("lejepa/slices", 5, 7)[0]
    projections = [view @ (column / column.norm()) for view in z for column in directions.T]
    gaussian = sum(epps_pulley(x) for x in projections) / len(projections)
    update(0.3 * gaussian + 0.7 * agreement)
    return {"sigreg": gaussian.detach(), "agreement": agreement.detach(), "feature_std": spread(h[:ROWS])}


@pytest.mark.parametrize(("views", "crops"), [(2, 2), (3, 1), (4, 0)])
def test_lejepa_steps_as_its_paper(views, crops):
    method = disturbed(LeJEPA(backbone(), facts(), hidden_dim=9, out_dim=5, slices=7, weight=0.3))
    layers = [
        nn.Linear(7, 9),
        nn.BatchNorm1d(9),
        nn.ReLU(),
        nn.Linear(9, 9),
        nn.BatchNorm1d(9),
        nn.ReLU(),
        nn.Linear(9, 5),
    ]
    batches = [batch_of(step, views=views, crops=crops) for step in (3, 4)]
    networks = {"projector": lambda: nn.Sequential(*layers)}
    compare(method, reference_lejepa, batches, networks=networks, first_step=3, features=of_projector)
