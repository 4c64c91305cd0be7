"""DINO and iBOT beside official code, by their own training loops."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy
import torch
from parity_crops import crops, images, their_transformer
from parity_harness import Comparison, Side, Sides, copy_weights, shake
from parity_networks import (
    EPSILON,
    PATCH,
    SIDE,
    Encoder,
    Without,
    convolutional,
    facts,
    optimizer_of,
    ours,
    settings,
    transformer,
)
from parity_official import Official, absent
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from sslctl.methods.dino import DINO
from sslctl.methods.ibot import IBOT

LR, DECAY, HIDDEN, DIM, PROTOTYPES = 0.02, 1e-2, 16, 8, 10


TEMPERATURES = {"teacher_temperature_start": 0.04, "teacher_temperature": 0.07, "student_temperature": 0.1}
SELF_DISTILLED = {
    **TEMPERATURES,
    "teacher_temperature_warmup_epochs": 3,
    "center_momentum": 0.9,
    "teacher_momentum": 0.9,
}
SELF_DISTILLED |= {
    "teacher_momentum_end": 1.0,
    "freeze_epochs": 2,
    "clip_grad": 0.3,
    "hidden_dim": HIDDEN,
    "bottleneck_dim": DIM,
}


def loop_of(
    script: ModuleType, student: nn.Module, teacher: nn.Module, loss: nn.Module, kind: str, **arguments: Any
) -> Callable:
    """The official train_one_epoch of DINO or iBOT over a loader of one step."""
    script.utils.is_dist_avail_and_initialized = lambda: False  # its meters would meet on a GPU
    groups = script.utils.get_params_groups(student)
    optimizer = (
        torch.optim.AdamW(groups, eps=EPSILON) if kind == "adamw" else torch.optim.SGD(groups, lr=0, momentum=0.9)
    )
    momenta = script.utils.cosine_scheduler(0.9, 1, 100, 1)
    constant = [numpy.full(100, value) for value in (LR / 10, DECAY)]
    values = settings(
        epochs=100,
        clip_grad=SELF_DISTILLED["clip_grad"],
        freeze_last_layer=SELF_DISTILLED["freeze_epochs"],
        **arguments,
    )
    wrapped = nn.DataParallel(student)

    def step(number: int, data: tuple) -> Tensor:
        out = script.train_one_epoch(
            wrapped, teacher, teacher, loss, [data], optimizer, *constant, momenta, number, None, values
        )
        return torch.tensor(out["loss"])

    return step


def pair(student: nn.Module, teacher: nn.Module, mask: str = "masked_embed") -> tuple[list, list]:
    """Their student's and teacher's parts in our order, without the lengths of the prototypes, which are 1 for ever."""
    token = [getattr(student.backbone, mask)] if hasattr(student.backbone, mask) else []
    return (
        [Without(student.backbone, mask), Without(student.head, "weight_g"), *token],
        [teacher.backbone, Without(teacher.head, "weight_g")],
    )


def dino(official: Official, vit: bool) -> Sides:
    method = DINO(
        transformer() if vit else convolutional(), facts(steps_per_epoch=1), head_layers=3, prototypes=PROTOTYPES,
        head_norm=not vit, **SELF_DISTILLED,
    ).double()  # fmt: skip
    shake(method.teacher_backbone, method.teacher_head)
    method.center.copy_(torch.linspace(-0.1, 0.1, PROTOTYPES))
    script = official.load("dino", "main_dino")
    networks = [their_transformer(script.vits) if vit else Encoder(convolutional()) for _ in range(2)]
    student, teacher = (
        script.utils.MultiCropWrapper(
            network,
            script.DINOHead(network_width(network), PROTOTYPES, use_bn=not vit, hidden_dim=HIDDEN, bottleneck_dim=DIM),
        )
        for network in networks
    )
    teacher.requires_grad_(False)
    loss = script.DINOLoss(PROTOTYPES, 5, 0.04, 0.07, 4, 100)
    loss.center.copy_(method.center)
    parts, slow = pair(student, teacher)
    trained, teachers = [method.backbone, method.head], [method.teacher_backbone, method.teacher_head]
    copy_weights(trained, parts)
    copy_weights(teachers, slow)
    kind = "adamw" if vit else "sgd"
    loop = loop_of(script, student, teacher, loss, kind)

    def step(number: int) -> Tensor:
        data = crops(number)
        seen = images(data, method.backbone) if vit else [x for views in data.views.values() for x in views]
        return loop(number, (seen, None))

    own = optimizer_of(method, kind, lr=LR / 10, weight_decay=DECAY)
    return (
        ours(method, own, crops, trained, teachers, lambda: {"center": method.center}),
        Side(step, parts, slow, lambda: {"center": loss.center}),
    )


def network_width(network: nn.Module) -> int:
    return network.backbone.embed_dim if isinstance(network, Encoder) else network.embed_dim


def ibot(official: Official) -> Sides:
    method = IBOT(
        transformer(), facts(steps_per_epoch=1), prototypes=PROTOTYPES, mask_chance=0.7, mask_ratio_low=0.2, mask_ratio_high=0.6,
        patch_weight=1.5, **SELF_DISTILLED,
    ).double()  # fmt: skip
    shake(method.teacher_backbone, method.teacher_head)
    with torch.no_grad():
        method.mask_token.copy_(torch.linspace(-0.5, 0.5, 16))
        method.centers.copy_(torch.linspace(-0.1, 0.1, 2 * PROTOTYPES).view(2, -1))
    missing = absent("tensorboardX", "evaluation", "evaluation.unsupervised", "evaluation.unsupervised.unsup_cls")
    script = official.load("ibot", "main_ibot", missing)
    script.eval_pred = lambda *_, **__: (0.0,) * 4
    vit = official.load("ibot", "models.vision_transformer")
    wide = {"hidden_dim": HIDDEN, "bottleneck_dim": DIM, "patch_out_dim": PROTOTYPES, "shared_head": True}
    student, teacher = (
        script.utils.MultiCropWrapper(
            their_transformer(vit, return_all_tokens=True, masked_im_modeling=masked),
            script.iBOTHead(16, PROTOTYPES, **wide),
        )
        for masked in (True, False)
    )
    teacher.requires_grad_(False)
    loss = script.iBOTLoss(PROTOTYPES, PROTOTYPES, 2, 3, 0.04, 0.07, 0.04, 0.07, 4, 100, lambda2=1.5)
    loss.center.copy_(method.centers[:1])
    loss.center2.copy_(method.centers[None, 1:])
    parts, slow = pair(student, teacher)
    trained, teachers = (
        [method.backbone, method.head, method.mask_token],
        [method.teacher_backbone, method.teacher_head],
    )
    copy_weights(trained, parts)
    copy_weights(teachers, slow)
    loop = loop_of(script, student, teacher, loss, "adamw", global_crops_number=2, use_masked_im_modeling=True)

    def step(number: int) -> Tensor:
        data = crops(number)
        masks = list(method.masks(data).unflatten(2, (SIDE // PATCH, -1)))
        return loop(number, (images(data, method.backbone), data.label, masks))

    own = optimizer_of(method, "adamw", lr=LR / 10, weight_decay=DECAY)
    return (
        ours(method, own, crops, trained, teachers, lambda: {"centers": method.centers}),
        Side(step, parts, slow, lambda: {"centers": torch.cat([loss.center, loss.center2[0]])}),
    )


def positions(official: Official) -> Sides:
    """Of 6×6 patches from 14×14: what a local crop of 96 pixels sees."""
    network = official.load("dino", "vision_transformer").VisionTransformer(embed_dim=16, depth=1, num_heads=2)
    table = network.pos_embed.detach()
    crop = torch.zeros(1, 1 + 36, 16)
    return (
        Side(
            lambda _: torch.zeros(()),
            [],
            state=lambda: {"positions": resample_abs_pos_embed(table, [6, 6], num_prefix_tokens=1)},
        ),
        Side(
            lambda _: torch.zeros(()), [], state=lambda: {"positions": network.interpolate_pos_encoding(crop, 96, 96)}
        ),
    )


DISTILLED = [
    Comparison(
        "DINO, ViT", "dino", "`VisionTransformer`, `DINOHead`, `DINOLoss`, `train_one_epoch`", partial(dino, vit=True), 6,
        remark="positions of local crops as timm has them; the teacher's temperature at epochs of one step; AdamW",
    ),
    Comparison(
        "DINO, ResNet", "dino", "`DINOHead` with BatchNorm, `DINOLoss`, `train_one_epoch`", partial(dino, vit=False), 6,
        remark="the teacher's temperature at epochs of one step; SGD",
    ),
    Comparison(
        "DINO, positions of a local crop", "dino", "`interpolate_pos_encoding`, 6×6 of 14×14", positions, 0,
        reason="timm's bicubic resampling has an antialiasing filter, theirs has none (these positions are noise)",
    ),
    Comparison(
        "iBOT", "ibot", "`VisionTransformer`, `iBOTHead`, `iBOTLoss`, `train_one_epoch`", ibot, 6,
        remark="shared head; our masks; positions of local crops as timm has them; AdamW",
    ),
]  # fmt: skip
