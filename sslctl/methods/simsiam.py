"""SimSiam: BYOL without a teacher; the stopped gradient is what prevents collapse (Chen & He 2021, arXiv:2011.10566)."""

from torch import Tensor

from sslctl.losses import negative_cosine
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather, two_views
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp


class SimSiam(Method):
    """Algorithm 1. projector_layers: 3 on ImageNet, 2 on CIFAR (section 3 and appendix D), the last with a BatchNorm
    without weights; hidden_dim None: the backbone's width. The predictor is a bottleneck whose learning rate is constant.
    """

    global_views = 2, 2
    batch_coupling = None

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        projector_layers: int,
        hidden_dim: int | None,
        out_dim: int,
        predictor_dim: int,
        constant_predictor_lr: bool,
    ):
        super().__init__(backbone, facts)
        width = backbone.embed_dim
        self.projector = mlp(width, hidden_dim or width, out_dim, projector_layers, norm=True, last_norm="plain")
        self.predictor = mlp(out_dim, predictor_dim, out_dim, 2, norm=True)
        self.constant_predictor_lr = constant_predictor_lr

    def parameter_groups(self) -> list[dict]:
        predictor = list(self.predictor.parameters())
        return [
            {"params": [*self.backbone.parameters(), *self.projector.parameters()]},
            {"params": predictor, "scheduled": not self.constant_predictor_lr},
        ]

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x1, x2 = two_views(batch)
        h1, h2 = self.backbone(x1), self.backbone(x2)  # (B, D)
        z1, z2 = self.projector(h1), self.projector(h2)  # (B, out_dim)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        spread = {"projector_std": feature_std(z1), "predictor_std": feature_std(p1)}  # BatchNorm spreads z even then
        z1, z2, p1, p2 = gather(z1), gather(z2), gather(p1), gather(p2)
        loss = (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2  # -1 to 1; no gradient through z
        return {"loss": loss, "feature_std": feature_std(h1), **spread}

    def uninformative_loss(self) -> float:
        return 0.0  # right angles
