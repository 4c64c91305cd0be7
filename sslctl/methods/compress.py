"""CompRess: the student ranks earlier images as a frozen teacher ranks them (Koohpayegani et al. 2020, arXiv:2010.14713)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.losses import memory_distillation
from sslctl.methods.base import Batch, Facts, Method, ema_update, enqueue, feature_std, gather, random_units, teacher_of
from sslctl.models.backbones import Backbone
from sslctl.models.teacher import Teacher


class CompRess(Method):
    """Section 3. variant "2q": each network compares with a memory of its own, filled by the teacher and by a slow copy of
    the student (key); "1q": the student compares with the teacher's memory, for backbones of equal width.

    State: student, key_backbone, memories (K, D) and (K, d), one place of the next write for both.
    """

    batch_coupling = None  # images are compared with earlier ones

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        teacher: Teacher,
        variant: str,
        memory_size: int,
        temperature: float,
        key_momentum: float,
    ):
        super().__init__(backbone, facts)
        if variant not in ("1q", "2q"):
            raise ValueError(f"variant={variant}: expected 1q or 2q")
        if variant == "1q" and backbone.embed_dim != teacher.embed_dim:
            raise ValueError(
                f"variant=1q compares the student's {backbone.embed_dim} features with the teacher's {teacher.embed_dim}:"
                " take variant=2q, or backbones of equal width"
            )
        self.teacher, self.temperature, self.key_momentum = teacher, temperature, key_momentum
        self.key_backbone = teacher_of(backbone) if variant == "2q" else None
        self.register_buffer("teacher_memory", random_units(memory_size, teacher.embed_dim))
        if variant == "2q":
            self.register_buffer("student_memory", random_units(memory_size, backbone.embed_dim))
        self.register_buffer("memory_pointer", torch.tensor(0))

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return {"backbone": self.backbone(images), "teacher": self.teacher(images)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x = batch.views["global"][0]  # (B, C, H, W)
        h, t = self.backbone(x), self.teacher(x)  # (B, d), (B, D)
        t = gather(t)  # (G, D)
        carry = {"teacher": F.normalize(t, dim=1)}
        memory = self.teacher_memory
        if self.key_backbone is not None:
            with torch.no_grad():
                carry["student"] = F.normalize(gather(self.key_backbone(x)).float(), dim=1)  # (G, d)
            memory = self.student_memory
        loss = memory_distillation(gather(h), t, memory, self.teacher_memory, self.temperature)
        return {"loss": loss, "feature_std": feature_std(h), "carry": carry}

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        if self.key_backbone is not None:
            enqueue(self.student_memory, self.memory_pointer.clone(), carry["student"])  # the pointer moves once
            ema_update(self.key_backbone, self.backbone, self.key_momentum)
        enqueue(self.teacher_memory, self.memory_pointer, carry["teacher"])
