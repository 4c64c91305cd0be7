"""Jigsaw: which permutation shuffled the tiles? (Noroozi & Favaro 2016, arXiv:1603.09246)."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.methods.base import Batch, Facts, Method, feature_std, gather
from sslctl.models.backbones import Backbone
from sslctl.models.vit import patch_size_of
from sslctl.ops.tiles import cut_tiles, mosaic, refuse_small_tiles

TILE = 64 / 85  # of a cell's side (the official code: 64 of 85 pixels)


class Jigsaw(Method):
    """Section 3. A tile from each cell of a 3×3 grid, moved in its cell, with mean 0 and deviation 1 of its own; shuffled.

    permutations: number of classes, far apart in Hamming distance (algorithm 1). view_size: side of a view, of
    dataset.image_size. State: table (permutations, 9). Not done: the official code's shift of each channel by itself.
    """

    batch_coupling = None
    squares_only = True

    def __init__(self, backbone: Backbone, facts: Facts, *, permutations: int, tile_dim: int, view_size: float):
        super().__init__(backbone, facts)
        side = round(view_size * facts.image_size)
        multiple = patch_size_of(backbone.network)
        self.cell = side // 3
        self.size = round(TILE * self.cell) // multiple * multiple
        refuse_small_tiles(backbone.network, self.size, side)
        self.register_buffer("table", far_permutations(permutations))  # (P, 9)
        self.tile_head = nn.Sequential(
            nn.Linear(backbone.embed_dim, tile_dim, bias=False), nn.BatchNorm1d(tile_dim), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(9 * tile_dim, permutations)

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        tiles, label = self.puzzle(batch)  # (B, 9, C, p, p), (B,)
        h = self.backbone(tiles.flatten(0, 1))  # (9B, D), one tower for all tiles
        z = self.tile_head(h).unflatten(0, (-1, 9))  # (B, 9, tile_dim)
        logits, label = gather(self.classifier(z.flatten(1)).float()), gather(label)  # (G, P), (G,)
        hits = (logits.argmax(1) == label).float().mean()
        std = feature_std(h.unflatten(0, (-1, 9)).mean(1))
        return {"loss": F.cross_entropy(logits, label), "accuracy": hits, "feature_std": std}

    def puzzle(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Shuffled tiles (B, 9, C, p, p) in [0, 1], as the backbone takes them, and the permutations' numbers (B,)."""
        tiles = self.tiles(batch)
        label = (batch.key.uniform("jigsaw/permutation") * len(self.table)).long()
        order = self.table[label]  # (B, 9)
        tiles = tiles.take_along_dim(order[..., None, None, None], 1)
        std, mean = torch.std_mean(tiles, (2, 3, 4), keepdim=True)
        alone = (tiles - mean) / (std + 1e-3)  # no tile gives its place away by its brightness
        return alone * self.backbone.std + self.backbone.mean, label  # the backbone takes the data's own off again

    def tiles(self, batch: Batch) -> Tensor:
        """(B, 9, C, p, p), row by row."""
        room = self.cell - self.size + 1
        cells = torch.arange(9, device=batch.index.device)
        corners = [
            self.cell * place + (batch.key.uniform(name, 9) * room).long()
            for name, place in (("jigsaw/top", cells // 3), ("jigsaw/left", cells % 3))
        ]
        return cut_tiles(batch.views["global"][0], *corners, self.size)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        tiles, label = self.puzzle(batch)
        z = self.tile_head(self.backbone(tiles.flatten(0, 1))).unflatten(0, (-1, 9))
        order = self.table[self.classifier(z.flatten(1)).argmax(1)]  # (B, 9)
        whole = self.tiles(batch)
        shuffled = whole.take_along_dim(self.table[label][..., None, None, None], 1)
        solved = shuffled.take_along_dim(order.argsort(1)[..., None, None, None], 1)
        return {
            "view": batch.views["global"][0],
            "shuffled": mosaic(shuffled, 3),
            "as the network puts it": mosaic(solved, 3),
        }

    def uninformative_loss(self) -> float:
        return math.log(len(self.table))

    def notes(self) -> list[str]:
        return [
            f"nine tiles of {self.size} pixels, up to {self.cell - self.size} from their cell's corner;"
            f" chance is a loss of {math.log(len(self.table)):.3f}"
        ]


def far_permutations(count: int) -> Tensor:
    """(count, 9) permutations of 0..8, the identity first, each next one as far from all before as there is.

    Algorithm 1, without its dice: the largest least Hamming distance, then the largest sum, then the first in order.
    """
    everything = torch.tensor(list(itertools.permutations(range(9))), dtype=torch.uint8)  # (362880, 9)
    if not 2 <= count <= 10_000:
        raise ValueError(f"method.permutations={count}: expected 2 to 10,000")
    least, total = torch.full((len(everything),), 9, dtype=torch.int32), torch.zeros(len(everything), dtype=torch.int32)
    chosen = [0]
    while len(chosen) < count:
        distance = (everything != everything[chosen[-1]]).sum(1, dtype=torch.int32)
        least, total = torch.minimum(least, distance), total + distance
        chosen.append(int((least.long() * (1 << 20) + total).argmax()))
    return everything[chosen].long()
