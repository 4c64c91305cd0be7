"""SimMIM: hidden patches are tokens in the network, one layer draws their pixels (Xie et al. 2022, arXiv:2111.09886)."""

import math

import torch
from torch import Tensor, nn

from sslctl.methods.base import Batch, Facts, Method, feature_std, gather
from sslctl.models.backbones import Backbone
from sslctl.models.vit import grid_of, patchify, unpatchify
from sslctl.ops.image_size import height_width, in_words
from sslctl.ops.masks import random_order


class SimMIM(Method):
    """Section 3, for vision transformers: a mask token where patches are hidden, absolute error of the normalised pixels there.

    mask_size: side of the squares that are hidden as a whole, in pixels; mask_ratio of them, rounded up. The official code
    trains for 800 epochs with a tenth of the learning rate from 700 on; the cosine is the recipe's for any length.
    """

    batch_coupling = None

    def __init__(self, backbone: Backbone, facts: Facts, *, mask_ratio: float, mask_size: int):
        super().__init__(backbone, facts)
        model = backbone.vision_transformer()
        self.prefix, self.patch = model.num_prefix_tokens, model.patch_embed.patch_size[0]
        sides = height_width(facts.image_size)
        if mask_size % self.patch or any(side % mask_size for side in sides):
            raise ValueError(
                f"method.mask_size={mask_size}: expected a multiple of the patch ({self.patch} pixels) that divides the image"
                f" ({in_words(facts.image_size)})"
            )
        self.unit = mask_size // self.patch  # patches a side
        self.squares = math.prod(side // mask_size for side in sides)
        self.hidden = math.ceil(mask_ratio * self.squares)
        if not 0 < self.hidden < self.squares:
            raise ValueError(f"method.mask_ratio={mask_ratio} hides {self.hidden} of {self.squares} squares")
        self.mask_token = nn.Parameter(torch.empty(1, backbone.embed_dim))  # a row: decays as a weight (official code)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(backbone.embed_dim, self.patch**2 * facts.channels)

    def parameter_groups(self) -> list[dict]:
        model = self.backbone.vision_transformer()
        plain = [p for p in (model.cls_token, model.pos_embed) if p is not None]  # without weight decay (official code)
        rest = [p for p in self.parameters() if all(p is not other for other in plain)]
        return [{"params": rest}, {"params": plain, "weight_decay_scale": 0.0}]

    def features(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.backbone.tokens(images)  # (B, P + L, D), nothing hidden
        return {"mean": tokens[:, self.prefix :].mean(1), "backbone": self.backbone(images)}

    def feature_networks(self) -> dict[str, tuple[Backbone, str]]:
        return super().feature_networks() | {"mean": (self.backbone, "mean")}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x = batch.views["global"][0]  # (B, C, H, W)
        mask = self.mask(batch, x)  # (B, L)
        h = self.backbone.tokens(x, mask=mask, mask_token=self.mask_token)[:, self.prefix :]  # (B, L, D)
        target = patchify(self.backbone.normalize(x), self.patch)  # (B, L, p²·C)
        error = (self.head(h).float() - target).abs().mean(2)  # (B, L)
        loss = (error * mask).sum() / mask.sum()
        return {"loss": gather(loss[None]).mean(), "feature_std": feature_std(h.mean(1))}

    def mask(self, batch: Batch, x: Tensor) -> Tensor:
        """(B, L) bool, True in hidden squares."""
        rows, columns = (side // self.unit for side in grid_of(self.backbone.vision_transformer(), x))
        _, mask = random_order(batch.key, "simmim", rows * columns, rows * columns - self.hidden)
        mask = mask.view(-1, rows, columns)
        return mask.repeat_interleave(self.unit, 1).repeat_interleave(self.unit, 2).flatten(1)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        x = batch.views["global"][0]
        rows, _ = grid_of(self.backbone.vision_transformer(), x)
        mask = self.mask(batch, x)
        h = self.backbone.tokens(x, mask=mask, mask_token=self.mask_token)[:, self.prefix :]
        reconstruction = self.backbone.denormalize(unpatchify(self.head(h).float(), self.patch, rows)).clamp(0, 1)
        hidden = unpatchify(mask[..., None].expand(-1, -1, self.patch**2).float(), self.patch, rows) > 0  # (B, 1, H, W)
        grey = torch.full_like(x, 0.5)
        return {
            "view": x,
            "masked": torch.where(hidden, grey, x),
            "reconstruction": torch.where(hidden, reconstruction, x),
        }

    def notes(self) -> list[str]:
        return [
            f"{self.hidden} of {self.squares} squares of {self.unit * self.patch} pixels are hidden;"
            " judge it by fine-tuning, frozen features are poor by design"
        ]
