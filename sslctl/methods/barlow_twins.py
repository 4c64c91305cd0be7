"""Barlow Twins: the cross-correlation of two views is taken to the identity (Zbontar et al. 2021, arXiv:2103.03230)."""

from torch import Tensor

from sslctl.losses import barlow_twins
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather, two_views
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp


class BarlowTwins(Method):
    """Algorithm 1. scale: of the whole loss, which only matters to optimizers that are not LARS or Adam."""

    global_views = 2, 2
    batch_coupling = "the correlation of two dimensions is taken over the batch"

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        projector_layers: int,
        hidden_dim: int,
        out_dim: int,
        lambda_: float,
        scale: float,
    ):
        super().__init__(backbone, facts)
        self.projector = mlp(backbone.embed_dim, hidden_dim, out_dim, projector_layers, norm=True, last_bias=False)
        self.lambda_, self.scale = lambda_, scale

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x1, x2 = two_views(batch)
        h1, h2 = self.backbone(x1), self.backbone(x2)  # (B, D)
        z1, z2 = self.projector(h1), self.projector(h2)  # (B, out_dim)
        loss = self.scale * barlow_twins(gather(z1), gather(z2), self.lambda_)  # of (G, out_dim)
        return {"loss": loss, "feature_std": feature_std(h1), "projector_std": feature_std(z1)}

    def uninformative_loss(self) -> float:
        dim, batch_size = self.projector[-1].out_features, self.facts.batch_size  # correlations are 0 ± 1 / √batch_size
        return self.scale * dim * (1 + 1 / batch_size + self.lambda_ * (dim - 1) / batch_size)
