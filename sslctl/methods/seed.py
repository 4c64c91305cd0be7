"""SEED: a small network sees the similarities that a frozen teacher sees (Fang et al. 2021, arXiv:2101.04731)."""

import math

import torch.nn.functional as F
from torch import Tensor, tensor

from sslctl.losses import similarity_distillation
from sslctl.methods.base import Batch, Facts, Method, enqueue, feature_std, gather, random_units
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp
from sslctl.models.teacher import Teacher


class SEED(Method):
    """Section 3.2. Student and teacher see the same view; the student's projection has the teacher's width.

    teacher: gives its backbone's features. State: queue (K, D) of unit teacher embeddings, the place of the next write.
    """

    batch_coupling = None  # similarities are those to earlier images

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        teacher: Teacher,
        queue_size: int,
        student_temperature: float,
        teacher_temperature: float,
    ):
        super().__init__(backbone, facts)
        self.teacher = teacher
        self.projector = mlp(backbone.embed_dim, backbone.embed_dim, teacher.embed_dim, 2, norm=False)
        self.register_buffer("queue", random_units(queue_size, teacher.embed_dim))  # (K, D)
        self.register_buffer("queue_pointer", tensor(0))
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, d)
        return {"backbone": h, "projector": self.projector(h), "teacher": self.teacher(images)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x = batch.views["global"][0]  # (B, C, H, W)
        h, t = self.backbone(x), self.teacher(x)  # (B, d), (B, D)
        z, t = gather(self.projector(h)), gather(t)  # (G, D)
        loss = similarity_distillation(z, t, self.queue, self.student_temperature, self.teacher_temperature)
        t = F.normalize(t, dim=1)
        agreement = F.cosine_similarity(z.detach().float(), t).mean()
        return {"loss": loss, "agreement": agreement, "feature_std": feature_std(h), "carry": {"keys": t}}

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        enqueue(self.queue, self.queue_pointer, carry["keys"])

    def uninformative_loss(self) -> float:
        return math.log(1 + len(self.queue))
