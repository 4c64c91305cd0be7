"""MAE: most patches are hidden, a light decoder draws them (He et al. 2022, arXiv:2111.06377)."""

import math

import torch
from torch import Tensor, nn

from sslctl.losses import masked_mse
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather
from sslctl.models.backbones import Backbone
from sslctl.models.vit import blocks, fix_positions_, grid_of, initialize_, patchify, sine_cosine, unpatchify, xavier
from sslctl.ops.image_size import height_width
from sslctl.ops.masks import random_order
from sslctl.transfer import to_device


class MAE(Method):
    """Section 3, for vision transformers: the backbone sees the visible patches only, positions are fixed sines and cosines.

    mask_ratio: share of hidden patches; int(L·(1 - mask_ratio)) stay, as the official code has it. decoder_*: of the blocks
    that see all places. normalize_target: a patch's pixels have mean 0 and variance 1 of their own.
    """

    batch_coupling = None

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        mask_ratio: float,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        normalize_target: bool,
    ):
        super().__init__(backbone, facts)
        model = backbone.vision_transformer()
        self.prefix, self.patch = model.num_prefix_tokens, model.patch_embed.patch_size[0]
        self.patches = math.prod(side // self.patch for side in height_width(facts.image_size))
        self.kept = int(self.patches * (1 - mask_ratio))
        if not 0 < self.kept < self.patches:
            raise ValueError(f"method.mask_ratio={mask_ratio} leaves {self.kept} of {self.patches} patches visible")
        self.embed = nn.Linear(backbone.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, decoder_dim))  # a row: decays as a weight (official code)
        self.decoder = nn.Sequential(
            *blocks(decoder_dim, decoder_depth, decoder_heads), nn.LayerNorm(decoder_dim, 1e-6)
        )
        self.head = nn.Linear(decoder_dim, self.patch**2 * facts.channels)
        self.normalize_target = normalize_target
        fix_positions_(backbone)
        initialize_(backbone, self.embed, self.decoder, self.head, draw=xavier)
        nn.init.normal_(self.mask_token, std=0.02)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.backbone.tokens(images)  # (B, P + L, D), nothing hidden
        return {"mean": tokens[:, self.prefix :].mean(1), "backbone": self.backbone(images)}

    def feature_networks(self) -> dict[str, tuple[Backbone, str]]:
        return super().feature_networks() | {"mean": (self.backbone, "mean")}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x = batch.views["global"][0]  # (B, C, H, W)
        rows, columns = grid_of(self.backbone.vision_transformer(), x)
        keep, mask = random_order(batch.key, "mae", rows * columns, self.kept)  # (B, kept), (B, L)
        h = self.backbone.tokens(x, keep=keep)  # (B, P + kept, D)
        prediction = self.decoded(h, keep, rows, columns)  # (B, L, p²·C)
        target = patchify(self.backbone.normalize(x), self.patch)
        loss = masked_mse(prediction, target, mask, self.normalize_target)
        return {"loss": gather(loss[None]).mean(), "feature_std": feature_std(h[:, self.prefix :].mean(1))}

    def decoded(self, h: Tensor, keep: Tensor, rows: int, columns: int) -> Tensor:
        """Tokens (B, P + kept, D) and where they belong (B, kept) -> (B, L, p²·C) for all places."""
        z = self.embed(h)
        prefix, visible = z[:, : self.prefix], z[:, self.prefix :]
        place = keep[..., None].expand_as(visible)
        full = self.mask_token.to(z.dtype).expand(len(z), rows * columns, -1).scatter(1, place, visible)
        full = full + to_device(sine_cosine(z.shape[-1], rows, columns), z.device).to(full)
        return self.head(self.decoder(torch.cat([prefix, full], 1)))[:, self.prefix :]

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        x = batch.views["global"][0]
        rows, columns = grid_of(self.backbone.vision_transformer(), x)
        keep, mask = random_order(batch.key, "mae", rows * columns, self.kept)
        reconstruction = self.decoded(self.backbone.tokens(x, keep=keep), keep, rows, columns).float()
        target = patchify(self.backbone.normalize(x), self.patch)
        if self.normalize_target:  # back to each patch's own brightness and contrast, which the network never says
            variance, mean = torch.var_mean(target, 2, keepdim=True)
            reconstruction = reconstruction * (variance + 1e-6).sqrt() + mean
        hidden = mask[..., None]
        seen = self.backbone.normalize(torch.full_like(x, 0.5))
        masked = torch.where(hidden, patchify(seen, self.patch), target)
        filled = torch.where(hidden, reconstruction, target)
        images = (self.backbone.denormalize(unpatchify(patches, self.patch, rows)) for patches in (masked, filled))
        masked, filled = (image.clamp(0, 1) for image in images)
        return {"view": x, f"{self.kept} of {rows * columns} patches": masked, "reconstruction": filled}

    def uninformative_loss(self) -> float | None:
        pixels = self.head.out_features  # of a patch
        return (pixels - 1) / pixels if self.normalize_target else None  # its unbiased variance is 1

    def notes(self) -> list[str]:
        return [
            f"{self.kept} of {self.patches} patches stay visible; judge it by fine-tuning, frozen features are poor by design"
        ]
