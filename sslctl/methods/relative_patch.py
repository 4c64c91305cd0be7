"""Relative patch location: where does the second patch lie? (Doersch et al. 2015, arXiv:1505.05192)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.methods.base import Batch, Facts, Method, feature_std, gather
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp
from sslctl.models.vit import patch_size_of
from sslctl.ops.tiles import cut_tiles, mosaic, refuse_small_tiles

MIDDLE, DIRECTIONS = 4, 8  # of a 3×3 grid, row by row; 7 - label is the opposite direction


class RelativePatch(Method):
    """Section 3. A view gives a patch and its eight neighbours; both orders of each of the eight pairs are asked for.

    view_size: side of a view, of dataset.image_size. gap, jitter: of a patch's side; with gap > 2·jitter no patches touch.
    colour_drop: chance that an image keeps one channel and gets noise for the others, so that chromatic aberration does not
    give places away. Not done: the paper's shrinking of a third of the patches, which small images have no room for.
    """

    batch_coupling = None
    squares_only = True

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        hidden_dim: int,
        view_size: float,
        gap: float,
        jitter: float,
        colour_drop: float,
    ):
        super().__init__(backbone, facts)
        if not gap > 2 * jitter >= 0:
            raise ValueError(f"method.gap={gap}, method.jitter={jitter}: patches never touch only with gap > 2·jitter")
        side = round(view_size * facts.image_size)
        multiple = patch_size_of(backbone.network)
        sizes = range(int(side / (3 + 2 * gap + 2 * jitter)) // multiple * multiple, 0, -multiple)
        self.size = next((size for size in sizes if _room(size, gap, jitter)[2] <= side), 0)
        refuse_small_tiles(backbone.network, self.size, side)
        self.jitter, self.pitch, _ = _room(self.size, gap, jitter)
        self.colour_drop = colour_drop
        self.classifier = mlp(2 * backbone.embed_dim, hidden_dim, DIRECTIONS, 2, norm=True)

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        patches = self.patches(batch)  # (B, 9, C, p, p)
        h = self.backbone(patches.flatten(0, 1)).unflatten(0, (-1, 9))  # (B, 9, D)
        middle = h[:, MIDDLE : MIDDLE + 1].expand(-1, DIRECTIONS, -1)  # (B, 8, D)
        around = torch.cat([h[:, :MIDDLE], h[:, MIDDLE + 1 :]], 1)  # (B, 8, D)
        pairs = torch.cat([torch.cat([middle, around], 2), torch.cat([around, middle], 2)], 1)  # (B, 16, 2D)
        label = torch.arange(8, device=h.device)
        label = torch.cat([label, 7 - label]).repeat(len(h))  # seen from the other patch, the direction is opposite
        logits = gather(self.classifier(pairs.flatten(0, 1)).float())  # (16G, 8)
        label = gather(label)
        hits = (logits.argmax(1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label), "accuracy": hits, "feature_std": feature_std(h[:, 4])}

    def patches(self, batch: Batch) -> Tensor:
        """(B, 9, C, p, p), row by row, each a few pixels off its place."""
        x = self.colour_dropped(batch.views["global"][0], batch)
        spread = 2 * self.jitter + 1
        cells = torch.arange(9, device=x.device)
        start = (x.shape[-1] - 2 * self.pitch - self.size - 2 * self.jitter) // 2  # in the middle of the view
        corners = [
            start + self.pitch * place + (batch.key.uniform(name, 9) * spread).long()
            for name, place in (("relative_patch/top", cells // 3), ("relative_patch/left", cells % 3))
        ]
        return cut_tiles(x, *corners, self.size)

    def colour_dropped(self, x: Tensor, batch: Batch) -> Tensor:
        """The two dropped channels become noise of a hundredth of the third one's standard deviation (section 3.1)."""
        channels = x.shape[1]
        if channels == 1 or self.colour_drop == 0:
            return x
        kept = (batch.key.uniform("relative_patch/channel") * channels).long()[:, None, None, None]  # (B, 1, 1, 1)
        noise = batch.key.normal("relative_patch/noise", *x.shape[1:])
        std = x.take_along_dim(kept, 1).std((2, 3), keepdim=True)
        only = torch.where(
            torch.arange(channels, device=x.device).view(1, -1, 1, 1) == kept, x, 0.5 + 0.01 * std * noise
        )
        drop = batch.key.chance("relative_patch/drop", self.colour_drop)
        return torch.where(drop[:, None, None, None], only, x)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"view": batch.views["global"][0], "patches": mosaic(self.patches(batch), 3).clamp(0, 1)}

    def uninformative_loss(self) -> float:
        return math.log(DIRECTIONS)

    def notes(self) -> list[str]:
        return [
            f"patches of {self.size} pixels, {self.pitch - self.size} apart, up to {self.jitter} off their place;"
            f" chance is a loss of {math.log(8):.3f}"
        ]


def _room(size: int, gap: float, jitter: float) -> tuple[int, int, int]:
    """(jitter, pitch, side of the whole grid) in pixels, of patches of `size` that never touch."""
    moved = int(jitter * size)
    pitch = max(size + 2 * moved + 1, int((1 + gap) * size))  # from patch to patch
    return moved, pitch, 2 * pitch + size + 2 * moved
