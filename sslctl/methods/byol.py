"""BYOL: predicting a slow teacher's projection of the other view (Grill et al. 2020, arXiv:2006.07733)."""

import torch
from torch import Tensor

from sslctl.losses import negative_cosine
from sslctl.methods.base import Batch, Facts, Method, ema_update, feature_std, gather, teacher_of, two_views
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp
from sslctl.schedules import cosine_between


class BYOL(Method):
    """Section 3.1 and figure 2. The projectors and the predictor are Linear-BatchNorm-ReLU-Linear, the last without bias.

    State: student (backbone, projector, predictor) and teacher (backbone, projector), which starts as the student; the
    official code draws it anew and reports no difference.
    """

    global_views = 2, 2
    batch_coupling = None  # but for BatchNorm, which a network may have

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        hidden_dim: int,
        out_dim: int,
        teacher_momentum: float,
        teacher_momentum_end: float,
    ):
        super().__init__(backbone, facts)
        self.projector = mlp(backbone.embed_dim, hidden_dim, out_dim, 2, norm=True, hidden_bias=True, last_bias=False)
        self.predictor = mlp(out_dim, hidden_dim, out_dim, 2, norm=True, hidden_bias=True, last_bias=False)
        self.teacher_backbone = teacher_of(backbone)
        self.teacher_projector = teacher_of(self.projector)
        self.teacher_momentum, self.teacher_momentum_end = teacher_momentum, teacher_momentum_end

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h), "teacher": self.teacher_backbone(images)}

    def feature_networks(self) -> dict[str, tuple[Backbone, str]]:
        return super().feature_networks() | {"teacher": (self.teacher_backbone, "own")}

    def schedules(self, step: int) -> dict[str, float]:
        start, end = self.teacher_momentum, self.teacher_momentum_end
        return {"teacher_momentum": cosine_between(start, end, step, self.facts.total_steps)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x1, x2 = two_views(batch)
        h1, h2 = self.backbone(x1), self.backbone(x2)  # (B, D)
        z1, z2 = self.projector(h1), self.projector(h2)  # (B, out_dim)
        p1, p2 = gather(self.predictor(z1)), gather(self.predictor(z2))  # (G, out_dim)
        with torch.no_grad():
            t1, t2 = (gather(self.teacher_projector(self.teacher_backbone(x))) for x in (x1, x2))
        loss = 4 + 2 * (negative_cosine(p1, t2) + negative_cosine(p2, t1))  # eq. 2 in both directions, 0 to 8
        return {"loss": loss, "feature_std": feature_std(h1), "projector_std": feature_std(z1)}

    def after_step(self, schedules: dict, carry: dict) -> None:
        ema_update(self.teacher_backbone, self.backbone, schedules["teacher_momentum"])
        ema_update(self.teacher_projector, self.projector, schedules["teacher_momentum"])

    def uninformative_loss(self) -> float:
        return 4.0  # right angles
