"""DINO: every crop imitates a slow teacher's view of the whole (Caron et al. 2021, arXiv:2104.14294)."""

import math

import torch
from torch import Tensor

from sslctl.losses import dino
from sslctl.methods.base import (
    Batch,
    Facts,
    Method,
    clip_each_,
    ema_update,
    feature_std,
    gather,
    global_mean,
    multi_crop,
    over_crops,
    teacher_of,
)
from sslctl.models.backbones import Backbone
from sslctl.models.heads import prototype_head
from sslctl.schedules import cosine_between, warmed_up


class DINO(Method):
    """Algorithm 1 and section 3.1. The head is head_layers Linears, a unit embedding, and unit prototypes.

    head_norm: BatchNorm in the head, for ResNets. State: student, teacher, center (1, K) of the teacher's outputs.
    teacher_temperature rises from its start over teacher_temperature_warmup_epochs. freeze_epochs: the prototypes stay as
    they are. clip_grad: the most that each parameter's gradient may have as norm, each by itself; None for no clipping.
    """

    global_views = 2, None
    batch_coupling = None  # the centre is that of earlier batches

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        head_layers: int,
        hidden_dim: int,
        bottleneck_dim: int,
        prototypes: int,
        head_norm: bool,
        student_temperature: float,
        teacher_temperature_start: float,
        teacher_temperature: float,
        teacher_temperature_warmup_epochs: float,
        center_momentum: float,
        teacher_momentum: float,
        teacher_momentum_end: float,
        freeze_epochs: float,
        clip_grad: float | None,
    ):
        super().__init__(backbone, facts)
        self.head = prototype_head(
            backbone.embed_dim, hidden_dim, bottleneck_dim, prototypes, layers=head_layers, norm=head_norm
        )
        self.teacher_backbone, self.teacher_head = teacher_of(backbone), teacher_of(self.head)
        self.register_buffer("center", torch.zeros(1, prototypes))
        self.student_temperature, self.center_momentum = student_temperature, center_momentum
        self.teacher_temperatures = teacher_temperature_start, teacher_temperature
        self.warmup_steps = round(teacher_temperature_warmup_epochs * facts.steps_per_epoch)
        self.teacher_momentum, self.teacher_momentum_end = teacher_momentum, teacher_momentum_end
        self.frozen_steps, self.clip_grad = round(freeze_epochs * facts.steps_per_epoch), clip_grad

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return {"teacher": self.teacher_backbone(images), "backbone": self.backbone(images)}

    def feature_networks(self) -> dict[str, tuple[Backbone, str]]:
        return super().feature_networks() | {"teacher": (self.teacher_backbone, "own")}

    def schedules(self, step: int) -> dict[str, float]:
        momentum = cosine_between(self.teacher_momentum, self.teacher_momentum_end, step, self.facts.total_steps)
        temperature = warmed_up(*self.teacher_temperatures, step, self.warmup_steps)
        return {
            "teacher_momentum": momentum,
            "teacher_temperature": temperature,
            "prototypes_frozen": float(step < self.frozen_steps),
        }

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        h = multi_crop(self.backbone, batch)  # (V, B, D), the global views first
        student = over_crops(self.head, h)  # (V, B, K)
        with torch.no_grad():
            views = batch.views["global"]  # (2, B, C, H, W)
            teacher = self.teacher_head(self.teacher_backbone(views.flatten(0, 1)))  # (2B, K)
            teacher = teacher.float().unflatten(0, views.shape[:2])  # (2, B, K)
        loss = dino(student, teacher, self.center, self.student_temperature, schedules["teacher_temperature"])
        p = ((teacher - self.center) / schedules["teacher_temperature"]).softmax(-1)
        entropy = torch.special.entr(p).sum(-1).mean()  # ln K: uniform; 0: one prototype for each image
        return {
            "loss": global_mean(loss),  # each image's stands alone: K numbers an image need not travel
            "teacher_entropy": global_mean(entropy),
            "feature_std": feature_std(h[0]),
            "carry": {"logits": gather(teacher.mean((0, 1))[None])},  # (processes, K)
        }

    def after_backward(self, schedules: dict) -> None:
        if schedules["prototypes_frozen"]:
            self.head[-1].weight.grad = None
        if self.clip_grad is not None:
            clip_each_(self.parameters(), self.clip_grad)

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        self.center.lerp_(carry["logits"].mean(0), 1 - self.center_momentum)
        ema_update(self.teacher_backbone, self.backbone, schedules["teacher_momentum"])
        ema_update(self.teacher_head, self.head, schedules["teacher_momentum"])

    def uninformative_loss(self) -> float:
        return math.log(self.center.shape[1])
