"""SupCon: all views of a class are positives; the supervised reference (Khosla et al. 2020, arXiv:2004.11362)."""

import math

import torch
from torch import Tensor

from sslctl.errors import InputError
from sslctl.losses import supcon
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather, two_views
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp


class SupCon(Method):
    """Section 3.2.2, equation 2 (L_out). hidden_dim: None for the backbone's width."""

    global_views = 2, 2
    batch_coupling = "its positives and negatives are the other images of the batch"

    def __init__(self, backbone: Backbone, facts: Facts, *, hidden_dim: int | None, out_dim: int, temperature: float):
        super().__init__(backbone, facts)
        if not facts.num_classes:
            raise InputError("method=supcon needs labels; this dataset does not have one for each image")
        width = backbone.embed_dim
        self.projector = mlp(width, hidden_dim or width, out_dim, 2, norm=False)
        self.temperature = temperature

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        views = two_views(batch)
        h = self.backbone(views.flatten(0, 1))  # (2B, D)
        z = torch.cat([gather(z) for z in self.projector(h).chunk(2)])  # (2G, out_dim)
        loss = supcon(z, gather(batch.label).repeat(2), self.temperature)
        return {"loss": loss, "feature_std": feature_std(h)}

    def uninformative_loss(self) -> float:
        return math.log(2 * self.facts.batch_size - 1) * self.temperature / 0.07  # the scale of its loss
