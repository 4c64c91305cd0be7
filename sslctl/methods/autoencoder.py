"""Autoencoder: the image through a bottleneck; denoising: the clean image from a spoilt one (Vincent et al. 2008)."""

import torch
from torch import Tensor, nn

from sslctl.losses import squared_error
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather
from sslctl.models.backbones import Backbone
from sslctl.models.decoders import image_decoder


class Autoencoder(Method):
    """Mean squared error in [0, 1], over images and pixels, of the clean view (Vincent et al. 2010, section 3).

    code_dim: width of the bottleneck behind the features. noise_std: of Gaussian noise, in [0, 1]. hidden: chance of a square
    of hidden_size pixels a side to be black.
    """

    batch_coupling = None

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        code_dim: int,
        noise_std: float,
        hidden: float,
        hidden_size: int,
    ):
        super().__init__(backbone, facts)
        if noise_std < 0 or not 0 <= hidden < 1 or hidden_size < 1:
            raise ValueError(
                f"noise_std={noise_std}, hidden={hidden}, hidden_size={hidden_size}: expected ≥ 0, in [0, 1), ≥ 1"
            )
        self.bottleneck = nn.Linear(backbone.embed_dim, code_dim)
        self.decoder = image_decoder(backbone, code_dim, facts.channels, facts.image_size)
        self.noise_std, self.hidden, self.hidden_size = noise_std, hidden, hidden_size

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "code": self.bottleneck(h)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x = batch.views["global"][0]  # (B, C, H, W)
        h = self.backbone(self.spoilt(x, batch))  # (B, D)
        loss = squared_error(self.reconstruction(h), x)
        blind = self.backbone.std.square().mean()  # error of the dataset's mean colour
        return {
            "loss": gather(loss[None]).mean(),
            "unexplained": gather(loss.detach()[None]).mean() / blind,
            "feature_std": feature_std(h),
        }

    def reconstruction(self, h: Tensor) -> Tensor:
        """(B, D) -> (B, C, H, W), about in [0, 1]."""
        return self.backbone.denormalize(self.decoder(self.bottleneck(h)).float())

    def spoilt(self, x: Tensor, batch: Batch) -> Tensor:
        """The corrupted view; the view itself where nothing is to be done."""
        if self.hidden:
            squares = [-(-side // self.hidden_size) for side in x.shape[-2:]]
            black = batch.key.uniform("autoencoder/hidden", 1, *squares) < self.hidden
            black = black.repeat_interleave(self.hidden_size, 2).repeat_interleave(self.hidden_size, 3)
            x = x.masked_fill(black[..., : x.shape[-2], : x.shape[-1]], 0.0)
        if self.noise_std:
            x = x + self.noise_std * batch.key.normal("autoencoder/noise", *x.shape[1:])
        return x

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        x = batch.views["global"][0]
        spoilt = self.spoilt(x, batch)
        reconstruction = self.reconstruction(self.backbone(spoilt)).clamp(0, 1)
        seen = {} if torch.equal(x, spoilt) else {"spoilt": spoilt.clamp(0, 1)}
        return {"view": x, **seen, "reconstruction": reconstruction}
