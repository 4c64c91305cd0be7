"""LeJEPA: views that agree, embeddings that are an isotropic Gaussian (Balestriero & LeCun 2025, arXiv:2511.08544)."""

import torch
from torch import Tensor

from sslctl.losses import sigreg
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather, gather_views, multi_crop, over_crops
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp


class LeJEPA(Method):
    """Algorithm 2. Every view, global or local, is drawn to the mean of the global ones; SIGReg keeps them from collapse.

    weight: of SIGReg against agreement, the paper's λ. slices: random directions of a step, the same in all processes.
    The projector's BatchNorms see all views as one batch, as in the algorithm and in the authors' minimal code, whose views
    have one size; lightly runs it once for each size.
    """

    global_views = 2, None
    batch_coupling = "SIGReg compares the distribution of the batch with a Gaussian"

    def __init__(self, backbone: Backbone, facts: Facts, *, hidden_dim: int, out_dim: int, slices: int, weight: float):
        super().__init__(backbone, facts)
        self.projector = mlp(backbone.embed_dim, hidden_dim, out_dim, 3, norm=True, hidden_bias=True)
        self.slices, self.weight = slices, weight

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        h = multi_crop(self.backbone, batch)  # (V, B, D), the global views first
        z = gather_views(over_crops(self.projector, h)).float()  # (V, G, out_dim)
        center = z[: len(batch.views["global"])].mean(0)  # (G, out_dim)
        agreement = (center - z).square().mean()
        first = batch.key.of(gather(batch.index)[:1])  # of the global batch: the same directions in all processes
        columns = first.normal("lejepa/slices", z.shape[2], self.slices)[0]  # (out_dim, slices)
        gaussian = torch.stack([sigreg(view, columns) for view in z]).mean()
        loss = self.weight * gaussian + (1 - self.weight) * agreement
        return {"loss": loss, "sigreg": gaussian, "agreement": agreement, "feature_std": feature_std(h[0])}
