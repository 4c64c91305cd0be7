"""W-MSE: views that are alike after whitening (Ermolov et al. 2021, arXiv:2007.06346)."""

import torch
from torch import Tensor

from sslctl.losses import whitening_mse
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather, gather_views, over_crops
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp


class WMSE(Method):
    """Section 3. Each of two or more views is whitened in random parts of the batch, drawn anew at every step.

    whitening_size: images a part; at least twice out_dim. draws: how often the batch is cut into parts.
    """

    global_views = 2, None
    batch_coupling = "the covariance that is whitened is the batch's"

    def __init__(
        self, backbone: Backbone, facts: Facts, *, hidden_dim: int, out_dim: int, whitening_size: int, draws: int
    ):
        super().__init__(backbone, facts)
        if facts.batch_size % whitening_size or whitening_size < 2 * out_dim:
            raise ValueError(
                f"whitening_size={whitening_size} must divide trainer.batch_size={facts.batch_size} and be at least twice"
                f" out_dim={out_dim}"
            )
        self.projector = mlp(backbone.embed_dim, hidden_dim, out_dim, 2, norm=True, hidden_bias=True)
        self.whitening_size, self.draws = whitening_size, draws

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        views = batch.views["global"]  # (V, B, C, H, W)
        h = torch.stack([self.backbone(x) for x in views])  # (V, B, D); BatchNorms see one view each (official code)
        z = gather_views(over_crops(self.projector, h))  # (V, G, out_dim)
        bits = batch.key.of(gather(batch.index)).bits("wmse/parts", self.draws)  # (G, draws)
        parts = bits.argsort(dim=0).T.reshape(self.draws, -1, self.whitening_size)  # (draws, pieces, size)
        return {"loss": whitening_mse(z, parts), "feature_std": feature_std(h.flatten(0, 1))}

    def uninformative_loss(self) -> float:
        return 2.0  # right angles
