"""CPC: patches predict the patches some rows away (van den Oord et al. 2018, arXiv:1807.03748; v2: arXiv:1905.09272)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.distributed import rank
from sslctl.losses import cpc
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather
from sslctl.models.backbones import Backbone
from sslctl.models.batchnorm import takes_batch_statistics
from sslctl.models.vit import patch_size_of


class CPC(Method):
    """v2, section 3: overlapping patches, each through the backbone by itself, are predicted from the rows before them.

    grid: patches a side, half over each other. directions: 1 (downwards, v1) to 4 (also upwards, rightwards, leftwards),
    each with a context network and predictions of its own. skip, reach: first and last row that is predicted, counted from
    the context's last; the one next to it (1) overlaps it. colour_drop: chance that a patch keeps only one of its channels.
    """

    batch_coupling = "its negatives are the patches of the batch"
    squares_only = True

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        grid: int,
        out_dim: int,
        context_blocks: int,
        directions: int,
        skip: int,
        reach: int,
        colour_drop: float,
    ):
        super().__init__(backbone, facts)
        if getattr(backbone.network, "fixed_size", False):
            raise ValueError(
                "CPC feeds patches to the backbone, this one takes whole images only: backbone=small_resnet"
            )
        if not 1 <= skip <= reach < grid:
            raise ValueError(f"skip={skip}, reach={reach}: expected 1 ≤ skip ≤ reach < grid={grid}")
        if directions not in (1, 2, 3, 4):
            raise ValueError(f"directions={directions}: expected 1 to 4")
        self.grid, self.steps, self.colour_drop = grid, range(skip, reach + 1), colour_drop
        self.patch_size(facts.image_size)
        self.projector = nn.Linear(backbone.embed_dim, out_dim)
        self.contexts = nn.ModuleList(Context(out_dim, context_blocks) for _ in range(directions))
        self.predictors = nn.ModuleList(
            nn.ModuleList(nn.Linear(out_dim, out_dim, bias=False) for _ in self.steps) for _ in range(directions)
        )

    def features(self, images: Tensor) -> dict[str, Tensor]:
        patches = self.backbone(cut(images, self.grid, self.patch_size(images.shape[-1])).flatten(0, 1))
        return {"patches": patches.unflatten(0, (-1, self.grid**2)).mean(1), "backbone": self.backbone(images)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x = batch.views["global"][0]  # (B, C, H, W)
        patches = self.colour_dropped(cut(x, self.grid, self.patch_size(x.shape[-1])), batch)  # (B, g², C, p, p)
        h = self.backbone(patches.flatten(0, 1))  # (B·g², D)
        z = self.projector(h).unflatten(0, (len(x), self.grid, self.grid))  # (B, g, g, out_dim)
        everyone = gather(z)  # (G, g, g, out_dim)
        number = torch.arange(everyone[..., 0].numel(), device=z.device).view(everyone.shape[:3])
        number = number[rank() * len(z) :][: len(z)]  # (B, g, g), where this process's patches are among all
        candidates, losses = everyone.flatten(0, 2), []
        for direction, (context, predictors) in enumerate(zip(self.contexts, self.predictors, strict=True)):
            c = context(turned(z, direction))  # (B, g, g, out_dim), of the rows down to each
            place = turned(number[..., None], direction)[..., 0]  # (B, g, g)
            for k, predictor in zip(self.steps, predictors, strict=True):
                prediction = predictor(c[:, :-k]).flatten(0, 2)  # (B·(g - k)·g, out_dim)
                losses.append(cpc(prediction, candidates, place[:, k:].flatten()))
        loss = gather(torch.stack(losses).mean()[None]).mean()
        return {"loss": loss, "feature_std": feature_std(h.unflatten(0, (len(x), -1)).mean(1))}

    def colour_dropped(self, patches: Tensor, batch: Batch) -> Tensor:
        """Some patches as one of their channels, three times: colours that run across a border give neighbours away."""
        count, channels = patches.shape[1:3]
        if channels == 1 or self.colour_drop == 0:
            return patches
        chosen = (batch.key.uniform("cpc/channel", count) * channels).long()[..., None, None, None]  # (B, g², 1, 1, 1)
        single = patches.take_along_dim(chosen, 2).expand_as(patches)
        drop = batch.key.uniform("cpc/colour", count) < self.colour_drop
        return torch.where(drop[..., None, None, None], single, patches)

    def patch_size(self, side: int) -> int:
        """Pixels of a patch, where the grid's patches overlap by half. Raises ValueError where the backbone cannot take it."""
        size = 2 * side // (self.grid + 1)
        if size < 4:
            raise ValueError(f"images of {side} pixels have no room for {self.grid}×{self.grid} patches: method.grid=…")
        inner = patch_size_of(self.backbone.network)
        if size % inner:
            raise ValueError(
                f"a grid of {self.grid}×{self.grid} gives patches of {size} pixels, the backbone takes multiples of {inner}:"
                " method.grid=…, or backbone=small_resnet"
            )
        return size

    def uninformative_loss(self) -> float:
        return math.log(self.facts.batch_size * self.grid**2)

    def notes(self) -> list[str]:
        if not takes_batch_statistics(self.backbone):
            return []
        return [
            "BatchNorm lets a patch see the others' statistics, a short cut: backbone.norm=layer where there is a choice"
        ]


class Context(nn.Module):
    """(B, g, g, D) -> (B, g, g, D): residual blocks that look at their own row and the one above, never below."""

    def __init__(self, dim: int, blocks: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.ZeroPad2d((1, 1, 1, 0)), nn.Conv2d(dim, dim, (2, 3)))
            for _ in range(blocks)
        )
        self.mixers = nn.ModuleList(nn.Conv2d(dim, dim, 1) for _ in range(blocks))

    def forward(self, z: Tensor) -> Tensor:
        x = z.permute(0, 3, 1, 2)  # (B, D, g, g)
        for block, mixer in zip(self.blocks, self.mixers, strict=True):
            x = x + mixer(F.relu(block(x)))
        return F.relu(x).permute(0, 2, 3, 1)


def cut(images: Tensor, grid: int, size: int) -> Tensor:
    """(B, C, H, W) -> (B, grid², C, size, size): patches in rows, as far apart as fills the image."""
    side = images.shape[-1]
    starts = [round(i * (side - size) / max(1, grid - 1)) for i in range(grid)]
    return torch.stack([images[..., top : top + size, left : left + size] for top in starts for left in starts], 1)


def turned(z: Tensor, direction: int) -> Tensor:
    """(B, g, g, D) such that the direction of prediction is downwards: 0 down, 1 up, 2 right, 3 left."""
    z = z.transpose(1, 2) if direction >= 2 else z
    return z.flip(1) if direction % 2 else z
