"""Images for the page: sheets of equal tiles, one data address each, so that the page needs no other file."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sslctl.data.loader import clean_batches
from sslctl.data.sampler import permuted
from sslctl.data.sources import Source
from sslctl.ops.color_space import visible
from sslctl.ops.image_size import ImageSize, height_width
from sslctl.views.maker import clean

MAP_SIDE, LARGE_SIDE = 40, 96  # pixels of a tile: many together, and few
_QUALITY = {MAP_SIDE: 70, LARGE_SIDE: 82}


@dataclass(frozen=True)
class Sheet:
    """Tiles of one size in rows. uri: the picture of all. name: of its class in the page's style."""

    name: str
    uri: str
    columns: int
    rows: int
    side: int
    count: int

    def place(self, index: int) -> str:
        """Returns where a tile lies, as a CSS background-position."""
        row, column = divmod(index, self.columns)
        return f"{100 * column / max(1, self.columns - 1):.4g}% {100 * row / max(1, self.rows - 1):.4g}%"

    @property
    def pixelated(self) -> bool:
        """Tells whether its pixels are to be seen as squares when it is enlarged."""
        return self.side <= 32


def sheet(name: str, tiles: Tensor) -> Sheet:
    """Packs tiles into one picture. tiles: (N, C, side, side) uint8."""
    count, channels, side, _ = tiles.shape
    columns = min(count, max(1, 2000 // side))
    rows = math.ceil(count / columns)
    padded = torch.cat([tiles, tiles.new_zeros(rows * columns - count, channels, side, side)])
    picture = padded.view(rows, columns, channels, side, side).permute(0, 3, 1, 4, 2).reshape(rows * side, -1, channels)
    image = Image.fromarray(picture.squeeze(2).numpy() if channels == 1 else picture.numpy())
    return Sheet(name, address(image, _QUALITY.get(side, 80)), columns, rows, side, count)


def address(image: Image.Image, quality: int) -> str:
    """Returns a data address: PNG, or JPEG where that is much smaller."""
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": quality, "subsampling": 0})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded.append((kind, buffer.getvalue()))
    kind, data = encoded[0] if len(encoded[0][1]) <= 1.5 * len(encoded[1][1]) else encoded[1]
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def side_for(image_size: ImageSize, most: int) -> int:
    """Returns a tile's side for images of a size: their own where they are small, so that no pixel is invented."""
    return min(most, max(height_width(image_size)))


def tile(image: Tensor, side: int) -> Tensor:
    """Makes a tile, (C, h, w) float in [0, 1] -> (C, side, side) uint8: the whole image, in a grey square."""
    image = visible(image)
    height, width = image.shape[1:]
    scale = side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    resized = F.interpolate(image[None].float(), size, mode="nearest" if scale >= 1 else "area")[0]
    pad = ((side - size[1]) // 2, side - size[1] - (side - size[1]) // 2)
    pad += ((side - size[0]) // 2, side - size[0] - (side - size[0]) // 2)
    return (F.pad(resized, pad, value=0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def thumbnails(source: Source, rows: Tensor, *, resize: int, side: int, workers: int) -> Tensor:
    """Returns the images at some rows as the backbone sees them, (n, C, side, side) uint8."""
    parts = []
    for images in clean_batches(source, rows, resize=resize, batch_size=256, workers=workers):
        parts += [tile(clean(image), side) for image in images]
    return torch.stack(parts)


@dataclass(frozen=True)
class ImageGrid:
    """Tiles in rows and columns. heads: words above the columns; alts: of each tile, row by row."""

    sheet: Sheet
    heads: list[str]
    alts: list[list[str]]

    @property
    def width(self) -> int:
        return len(self.alts[0])


def grid(name: str, lines: Sequence[Sequence[Tensor]], heads: list[str], alts: list[list[str]]) -> ImageGrid:
    """Packs images into a grid. lines: rows of (C, h, w) in [0, 1], as many in each."""
    largest = max(max(image.shape[1:]) for line in lines for image in line)
    channels = max(image.shape[0] for line in lines for image in line)
    side = side_for(largest, LARGE_SIDE)
    tiles = [tile(image.expand(channels, -1, -1), side) for line in lines for image in line]
    return ImageGrid(sheet(name, torch.stack(tiles)), heads, alts)


def spread(size: int, most: int, seed: int) -> np.ndarray:
    """Returns at most so many rows of a dataset, the same for every run on it, ascending. (n,) int64."""
    return np.sort(permuted(np.arange(min(size, most)), size, seed=seed, epoch=-4))
