"""DCL: SimCLR with the positive taken out of the denominator (Yeh et al. 2022, arXiv:2110.06848)."""

import math

from torch import Tensor

from sslctl.losses import dcl
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather, two_views
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp


class DCL(Method):
    """Section 3. sigma: weights the positives by their difficulty (DCLW); None for plain DCL. The rest is SimCLR."""

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
        sigma: float | None,
    ):
        super().__init__(backbone, facts)
        width = backbone.embed_dim
        self.projector = mlp(
            width, hidden_dim or width, out_dim, projector_layers, norm=norm, last_norm="scale" if norm else ""
        )
        self.temperature, self.sigma = temperature, sigma

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        views = two_views(batch)
        h = self.backbone(views.flatten(0, 1))  # (2B, D)
        z1, z2 = (gather(z) for z in self.projector(h).chunk(2))  # (G, out_dim)
        return {"loss": dcl(z1, z2, self.temperature, self.sigma), "feature_std": feature_std(h)}

    def uninformative_loss(self) -> float:
        return math.log(2 * self.facts.batch_size - 2)
