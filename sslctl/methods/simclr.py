"""SimCLR: agreement of two views against all other images of the batch (Chen et al. 2020, arXiv:2002.05709)."""

import math

from torch import Tensor

from sslctl.losses import nt_xent
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather, two_views
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp


class SimCLR(Method):
    """Section 2.1 and figure 2: f is the backbone, g the projector; the representation is h, before the projector.

    hidden_dim: None for the backbone's width, as the paper. norm: BatchNorm in the projector, as the official code.
    """

    global_views = 2, 2
    batch_coupling = "its negatives are the other images of the batch"

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        projector_layers: int,
        hidden_dim: int | None,
        out_dim: int,
        norm: bool,
        temperature: float,
    ):
        super().__init__(backbone, facts)
        width = backbone.embed_dim
        self.projector = mlp(
            width, hidden_dim or width, out_dim, projector_layers, norm=norm, last_norm="scale" if norm else ""
        )
        self.temperature = temperature

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        views = two_views(batch)  # (2, B, C, H, W)
        h = self.backbone(views.flatten(0, 1))  # (2B, D), both views in one forward: BatchNorm sees them together
        z1, z2 = self.projector(h).chunk(2)  # (B, out_dim) each
        return {"loss": nt_xent(gather(z1), gather(z2), self.temperature), "feature_std": feature_std(h)}

    def uninformative_loss(self) -> float:
        return math.log(2 * self.facts.batch_size - 1)
