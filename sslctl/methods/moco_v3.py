"""MoCo v3: a teacher's keys of the batch, a predictor, no queue (Chen, Xie & He 2021, arXiv:2104.02057)."""

import math

import torch
from torch import Tensor

from sslctl.losses import nnclr as cross_view
from sslctl.methods.base import Batch, Facts, Method, ema_update, feature_std, gather, teacher_of, two_views
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp
from sslctl.models.vit import fix_positions_, initialize_, xavier_apart
from sslctl.schedules import cosine_between


class MoCoV3(Method):
    """Algorithm 1. Negatives are the other images' keys of the other view; the loss is scaled by 2·temperature.

    projector_layers: 2 with ResNets, 3 with ViTs. predictor_norm: a BatchNorm at the predictor's end, as with ViTs.
    freeze_patches: a ViT's patch projection stays random (section 4.2), its positions are fixed sines (section 5), and its
    weights begin as the official code's: what the projection makes of an image stays in that proportion to the positions.
    """

    global_views = 2, 2
    batch_coupling = "its negatives are the other images of the batch"

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        projector_layers: int,
        hidden_dim: int,
        out_dim: int,
        predictor_norm: bool,
        freeze_patches: bool,
        temperature: float,
        teacher_momentum: float,
        teacher_momentum_end: float,
    ):
        super().__init__(backbone, facts)
        width = backbone.embed_dim
        if freeze_patches:
            backbone.vision_transformer().patch_embed.requires_grad_(False)
            fix_positions_(backbone)
            initialize_(backbone, draw=xavier_apart, token_std=1e-6)
        self.projector = mlp(width, hidden_dim, out_dim, projector_layers, norm=True, last_norm="plain")
        self.predictor = mlp(
            out_dim, hidden_dim, out_dim, 2, norm=True, last_norm="plain" if predictor_norm else "", last_bias=False
        )
        self.teacher_backbone = teacher_of(backbone)
        self.teacher_projector = teacher_of(self.projector)
        self.temperature = temperature
        self.teacher_momentum, self.teacher_momentum_end = teacher_momentum, teacher_momentum_end

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h), "teacher": self.teacher_backbone(images)}

    def feature_networks(self) -> dict[str, tuple[Backbone, str]]:
        return super().feature_networks() | {"teacher": (self.teacher_backbone, "own")}

    def schedules(self, step: int) -> dict[str, float]:
        start, end = self.teacher_momentum, self.teacher_momentum_end
        return {"teacher_momentum": cosine_between(start, end, step, self.facts.total_steps)}

    def before_step(self, schedules: dict) -> None:
        ema_update(self.teacher_backbone, self.backbone, schedules["teacher_momentum"])
        ema_update(self.teacher_projector, self.projector, schedules["teacher_momentum"])

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x1, x2 = two_views(batch)
        h1, h2 = self.backbone(x1), self.backbone(x2)  # (B, D)
        q1, q2 = (gather(self.predictor(self.projector(h))) for h in (h1, h2))  # (G, out_dim)
        with torch.no_grad():
            k1, k2 = (gather(self.teacher_projector(self.teacher_backbone(x))) for x in (x1, x2))
        loss = 2 * self.temperature * (self.contrast(q1, k2) + self.contrast(q2, k1))
        return {"loss": loss, "feature_std": feature_std(h1)}

    def contrast(self, query: Tensor, key: Tensor) -> Tensor:
        """Each query picks its own key among the batch's. (G, out_dim) each."""
        return cross_view(key, query, self.temperature)

    def uninformative_loss(self) -> float:
        return 4 * self.temperature * math.log(self.facts.batch_size)
