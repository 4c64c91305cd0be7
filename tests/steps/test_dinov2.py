"""Steps of DINOv2 and DINOv3 beside steps written from their papers and official codes."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from sslctl.data.batch import Batch
from sslctl.methods.dinov2 import DINOv2
from sslctl.methods.dinov3 import DINOv3
from sslctl.ops.masks import block_masks
from tests.steps.compare import ROWS, TOTAL_STEPS, batch_of, compare, disturbed, facts, rate_at, spread, unit
from tests.steps.transformers import PREFIX, embedded, encoded, of_tokens, vision_transformer


class Learnt(nn.Module):
    """DINOv2's last layer: torch's weight norm of a plain layer behind unit embeddings, its lengths trained too."""

    def __init__(self, dim, count):
        super().__init__()
        self.weight, self.lengths = nn.Parameter(torch.zeros(count, dim)), nn.Parameter(torch.zeros(count, 1))

    def forward(self, z):
        return unit(z) @ (self.lengths * self.weight / self.weight.norm(dim=1, keepdim=True)).T


class Free(nn.Module):
    """DINOv3's: a plain layer behind unit embeddings."""

    def __init__(self, dim, count):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, dim))

    def forward(self, z):
        return unit(z) @ self.weight.T


def head(hidden, dim, count, last):
    layers = [nn.Linear(8, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, dim)]
    return nn.Sequential(nn.Sequential(*layers), last(dim, count))


def heads(last, separate=True):
    return nn.ModuleList([head(9, 5, 8, last), head(6, 4, 7, last)] if separate else [head(9, 5, 8, last)])


SETTINGS = {  # 10 steps an epoch: the prototypes are free from step 14 on, the temperature has risen at step 15
    "hidden_dim": 9,
    "bottleneck_dim": 5,
    "prototypes": 8,
    "patch_hidden_dim": 6,
    "patch_bottleneck_dim": 4,
    "patch_prototypes": 7,
    "mask_chance": 0.7,
    "mask_ratio_low": 0.2,
    "mask_ratio_high": 0.6,
    "patch_weight": 0.6,
    "koleo_weight": 0.3,
    "sinkhorn_iterations": 2,
    "student_temperature": 0.2,
    "teacher_temperature_start": 0.2,
    "teacher_temperature": 0.5,
    "teacher_temperature_warmup_epochs": 1.46,
    "teacher_momentum": 0.6,
    "teacher_momentum_end": 0.9,
    "freeze_epochs": 1.36,
    "patch_lr_scale": 0.4,
    "clip_grad": 0.5,
}
OF_DINOV2 = SETTINGS | {"separate_heads": True, "centered": False, "center_momentum": 0.7}
SHARED = {"separate_heads": False, "patch_hidden_dim": 9, "patch_bottleneck_dim": 5, "patch_prototypes": 8}
FREE = {"clip_grad": None, "freeze_epochs": 0.0}  # nothing is done to gradients
STEPS = (13, 14, 15)
TEMPERATURES = {13: 0.2 + 0.3 * 13 / 15, 14: 0.2 + 0.3 * 14 / 15, 15: 0.5}


def hidden(key, view):
    """(B, 16): with a chance of 0.7 some blocks, a share drawn from 0.2 to 0.6 of the patches, rounded down."""
    some = key.uniform(f"dinov2/{view}/chance") < 0.7
    share = 0.2 + 0.4 * key.uniform(f"dinov2/{view}/ratio")
    return block_masks(key, [f"dinov2/{view}"], 4, 4, torch.where(some, (16 * share).floor(), 0).long()[None])[0]


def balanced(logits, temperature):
    """Two rounds of the official sinkhorn_knopp_teacher: prototypes share the samples, then each sample is one."""
    q = (logits / temperature).exp()
    q = q / q.sum()
    for _ in range(2):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / len(q)
    return q * len(q)


def apart(z):
    """KoLeo (section 4): the logarithm of the distance to the nearest neighbour, of unit class tokens."""
    z = unit(z)
    each = []
    for i in range(len(z)):
        distances = [((z[i] - z[j] + 1e-8) ** 2).sum().sqrt() for j in range(len(z)) if j != i]
        each.append(-(min(distances) + 1e-8).log())
    return sum(each) / len(each)


def clip_and_freeze(its, step, free):
    """The official train.py: one norm for the backbone, with its mask token, and one for each head."""
    if free:
        return lambda: None

    def after_backward():
        for part in ([*its.backbone.parameters(), its.mask_token], *(head.parameters() for head in its.heads)):
            part = list(part)
            norm = sum((p.grad**2).sum() for p in part).sqrt()
            for p in part:
                p.grad *= min(1, 0.5 / (norm + 1e-6))
        assert step >= 14 or norm > 0
        if step < 14:
            for head in its.heads:
                for p in head[1].parameters():
                    p.grad = None

    return after_backward


@torch.no_grad()
def move_teacher(its, step):
    momentum = 0.9 + (0.6 - 0.9) * (1 + math.cos(math.pi * step / TOTAL_STEPS)) / 2
    for slow, fast in ((its.teacher_backbone, its.backbone), (its.teacher_heads, its.heads)):
        for theta_t, theta_s in zip(slow.parameters(), fast.parameters(), strict=True):
            theta_t.copy_(momentum * theta_t + (1 - momentum) * theta_s)


def reference(its, batch, step, update, *, free, centred=False, gram=None, local_weight=1.0):
    """Section 4: class tokens and hidden patches by heads of their own, KoLeo on each global view's class tokens.

    gram: of the student's patches, (2B, L, D), the term that DINOv3 adds.
    """
    whole, small, temperature = batch.views["global"], batch.views.get("local", ()), TEMPERATURES[step]
    masks = [hidden(batch.key, view) for view in range(2)]  # (B, 16) each
    assert {True, False} == {bool(each.any()) for mask in masks for each in mask}
    h, teacher, patches, teacher_patches, weights = [], [], [], [], []
    for x, mask in zip(whole, masks, strict=True):
        h.append(encoded(its.backbone, torch.where(mask[..., None], its.mask_token, embedded(its.backbone, x))))
        with torch.no_grad():
            z = encoded(its.teacher_backbone, embedded(its.teacher_backbone, x))
            teacher.append(its.teacher_heads[0](z[:, 0]))
        for b in range(ROWS):
            for place in mask[b].nonzero().flatten().tolist():
                patches.append(its.heads[-1](h[-1][b, PREFIX + place]))
                with torch.no_grad():
                    teacher_patches.append(its.teacher_heads[-1](z[b, PREFIX + place]))
                weights.append(1 / (mask[b].sum() * 2 * ROWS))
    teacher, teacher_patches = torch.cat(teacher), torch.stack(teacher_patches)
    if centred:
        p = ((teacher - its.center) / temperature).softmax(1)
        p_patches = ((teacher_patches - its.patch_center) / temperature).softmax(1)
    else:
        p, p_patches = balanced(teacher, temperature), balanced(teacher_patches, temperature)
    student = [its.heads[0](z[:, 0]) for z in h] + [its.heads[0](its.backbone(x)) for x in small]
    loss, pairs = 0, 0
    for t, target in enumerate(p.split(ROWS)):
        for s, logits in enumerate(student):
            if s != t:
                weight = 1.0 if s < 2 else local_weight
                loss = loss - weight * (target * (logits / 0.2).log_softmax(1)).sum(1).mean()
                pairs += 1
    cross = -(p_patches * (torch.stack(patches) / 0.2).log_softmax(1)).sum(1)
    patch_loss = (cross * torch.stack(weights)).sum()
    koleo = sum(apart(z[:, 0]) for z in h)
    total = loss / pairs + 0.6 * patch_loss + 0.3 * koleo
    figures = {"patch_loss": patch_loss.detach(), "koleo_loss": koleo.detach(), "feature_std": spread(h[0][:, 0])}
    figures["teacher_entropy"] = -(p * p.log()).sum(1).mean()
    if gram is not None:
        total, figures["gram_loss"] = gram(total, torch.cat([z[:, PREFIX:] for z in h]))
    patch_rate = {"backbone.network.model.patch_embed": 0.4 * rate_at(step)}
    update(total, rates=patch_rate, after_backward=clip_and_freeze(its, step, free))
    if centred:
        its.center = 0.7 * its.center + 0.3 * teacher.mean(0, keepdim=True)
        its.patch_center = 0.7 * its.patch_center + 0.3 * teacher_patches.mean(0, keepdim=True)
    move_teacher(its, step)
    return figures


@pytest.mark.parametrize(("crops", "more"), [(3, {}), (0, FREE), (2, SHARED), (1, {"centered": True})], ids=str)
def test_dinov2_steps_as_its_paper(crops, more):
    settings = OF_DINOV2 | more
    method, centers = DINOv2(vision_transformer(8), facts(), **settings), {}
    if settings["centered"]:
        centers = {"center": torch.linspace(-0.3, 0.3, 8)[None], "patch_center": torch.linspace(0.2, -0.4, 7)[None]}
    disturbed(method, **centers)
    batches = [batch_of(step, crops=crops) for step in STEPS]
    step = partial(reference, free="clip_grad" in more, centred=settings["centered"])
    networks = {"heads": lambda: heads(Learnt, settings["separate_heads"])}
    compare(method, step, batches, networks=networks, first_step=STEPS[0], features=of_tokens)


def test_dinov2_centres_of_patches_stay_where_nothing_is_hidden():
    method = DINOv2(vision_transformer(8), facts(), **OF_DINOV2 | {"centered": True, "mask_chance": 0.0})
    disturbed(method.float(), center=torch.ones(1, 8), patch_center=torch.ones(1, 7)).float()
    batch, schedules = batch_of(13), method.schedules(13)
    out = method(batch, schedules)
    assert out["patch_loss"] == 0
    method.after_step(schedules, out["carry"])
    assert torch.equal(method.patch_center, torch.ones(1, 7))
    assert not torch.equal(method.center, torch.ones(1, 8))


# --- DINOv3 ---

ANCHORED = SETTINGS | {  # of 40 steps: anchored after 12, in full from 14 on, taken anew after 13 and 14 are done
    "gram_weight": 1.7,
    "local_weight": 0.4,
    "gram_teacher_from": 11 / 40,
    "gram_start": 12 / 40,
    "gram_ramp": 2 / 40,
    "gram_refresh": 1 / 40,
    "gram_refreshes": 2,
}


def with_gram_views(batch):
    """The batch with its two global views at twice the size as well, and noise on top."""
    generator = torch.Generator().manual_seed(int(batch.index.sum()))
    larger = torch.nn.functional.interpolate(batch.views["global"].flatten(0, 1), scale_factor=2).unflatten(
        0, (2, ROWS)
    )
    views = batch.views | {"gram": 0.7 * larger + 0.3 * torch.rand(larger.shape, generator=generator)}
    return Batch(views, batch.label, batch.index, batch.key)


def reference_dinov3(its, batch, step, update, free):
    """Section 4.2: cosines of the student's patches and of the Gram teacher's, whose map is twice as large and resampled."""
    grown = {13: 0.5, 14: 1.0, 15: 1.0}[step]

    def gram(total, patches):
        with torch.no_grad():
            maps = its.gram_teacher.tokens(batch.views["gram"].flatten(0, 1))[:, PREFIX:]
            maps = maps.transpose(1, 2).reshape(2 * ROWS, 8, 8, 8)
            target = unit(torch.nn.functional.interpolate(maps, (4, 4), mode="bicubic").flatten(2).transpose(1, 2))
        own, value = unit(patches), 0
        for image in range(2 * ROWS):
            value = value + ((own[image] @ own[image].T - target[image] @ target[image].T) ** 2).sum() / (16**2)
        return total + 1.7 * grown * value / (2 * ROWS), (value / (2 * ROWS)).detach()

    figures = reference(its, batch, step, update, free=free, gram=gram, local_weight=1 - 0.6 * grown)
    if step == 13:
        its.gram_teacher.load_state_dict(its.teacher_backbone.state_dict())
    return figures


@pytest.mark.parametrize(("crops", "more"), [(2, {}), (0, FREE)], ids=str)
def test_dinov3_steps_as_its_paper(crops, more):
    method = disturbed(DINOv3(vision_transformer(8), facts(), **ANCHORED | more))
    batches = [with_gram_views(batch_of(step, crops=crops)) for step in STEPS]
    networks = {"heads": lambda: heads(Free)}
    step = partial(reference_dinov3, free=bool(more))
    compare(method, step, batches, networks=networks, first_step=STEPS[0], features=of_tokens)
