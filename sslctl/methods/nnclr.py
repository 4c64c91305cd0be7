"""NNCLR: the positive is the nearest neighbour, in a queue, of the other view (Dwibedi et al. 2021, arXiv:2104.14548)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.losses import nnclr
from sslctl.losses.exact import exact, unit
from sslctl.methods.base import Batch, Facts, Method, enqueue, feature_std, gather, random_units, two_views
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp


class NNCLR(Method):
    """Section 3.2. The projector has a BatchNorm after all its layers, the predictor after its first only.

    State: queue (K, D) of unit projections of first views, the place of the next write.
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
        predictor_dim: int,
        queue_size: int,
        temperature: float,
    ):
        super().__init__(backbone, facts)
        self.projector = mlp(backbone.embed_dim, hidden_dim, out_dim, projector_layers, norm=True, last_norm="affine")
        self.predictor = mlp(out_dim, predictor_dim, out_dim, 2, norm=True)
        self.register_buffer("queue", random_units(queue_size, out_dim))  # (K, D)
        self.register_buffer("queue_pointer", torch.tensor(0))
        self.temperature = temperature

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x1, x2 = two_views(batch)
        h1, h2 = self.backbone(x1), self.backbone(x2)  # (B, D)
        z1, z2 = self.projector(h1), self.projector(h2)  # (B, out_dim)
        p1, p2 = gather(self.predictor(z1)), gather(self.predictor(z2))  # (G, out_dim)
        z1, z2 = gather(z1.detach()), gather(z2.detach())
        loss = (nnclr(p2, self.nearest(z1), self.temperature) + nnclr(p1, self.nearest(z2), self.temperature)) / 2
        carry = {"keys": F.normalize(z1.float(), dim=1)}
        return {"loss": loss, "feature_std": feature_std(h1), "carry": carry}

    @exact
    def nearest(self, z: Tensor) -> Tensor:
        """(G, out_dim) -> the queue's rows most like them, (G, out_dim)."""
        return self.queue[(unit(z) @ self.queue.T).argmax(1)]

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        enqueue(self.queue, self.queue_pointer, carry["keys"])

    def uninformative_loss(self) -> float:
        return math.log(self.facts.batch_size)
