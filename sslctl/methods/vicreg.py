"""VICReg: variance, invariance, covariance (Bardes et al. 2022, arXiv:2105.04906)."""

from torch import Tensor

from sslctl.losses import vicreg
from sslctl.methods.base import Batch, Facts, Method, embedding_std, feature_std, gather, two_views
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp


class VICReg(Method):
    """Section 4. The expander's embeddings are not normalised. The three weights are the paper's λ, μ and ν."""

    global_views = 2, 2
    batch_coupling = "variance and covariance are taken over the batch"

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        hidden_dim: int,
        out_dim: int,
        invariance: float,
        variance: float,
        covariance: float,
    ):
        super().__init__(backbone, facts)
        self.projector = mlp(backbone.embed_dim, hidden_dim, out_dim, 3, norm=True, hidden_bias=True, last_bias=False)
        self.weights = {"invariance": invariance, "variance": variance, "covariance": covariance}

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x1, x2 = two_views(batch)
        h1, h2 = self.backbone(x1), self.backbone(x2)  # (B, D)
        z1, z2 = gather(self.projector(h1)), gather(self.projector(h2))  # (G, out_dim)
        loss = vicreg(z1, z2, **self.weights)
        return {"loss": loss, "feature_std": feature_std(h1), "embedding_std": embedding_std(z1)}
