"""Images that lie one after the other in a file of bytes: in memory where they fit, else read one by one from the mapped file."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.data.source import Source, from_tensors
from sslctl.ops.image_size import ImageSize
from sslctl.runs.file_list import FileList


@dataclass(frozen=True)
class Stored:
    """Images of one file. pixels: (N, …), often of a mapped file. decode: of a part of them, to (n, C, H, W) uint8.

    size: (height, width).
    """

    pixels: np.ndarray
    decode: Callable[[np.ndarray], np.ndarray]
    file: Path
    size: tuple[int, ...]

    def read(self, rows: slice | int) -> Tensor:
        """Returns some images as (n, C, H, W) uint8."""
        part = self.pixels[rows : rows + 1] if isinstance(rows, int) else self.pixels[rows]
        return torch.from_numpy(np.array(self.decode(part)))


@dataclass(frozen=True)
class MappedImages(Source):
    """Images that stay in their files. parts: the files, one after the other; places: (N,) int64, of the images among all of
    theirs. side: that they are resized to, None for as they are."""

    parts: tuple[Stored, ...] = ()
    places: Tensor | None = None
    side: int | None = None
    per_sample: ClassVar[tuple[str, ...]] = (*Source.per_sample, "places")

    def read(self, index: int) -> Tensor:
        """Reads one image as (C, H, W) uint8."""
        place = int(self.places[index])
        for part in self.parts:
            if place < len(part.pixels):
                return as_asked(part.read(place), self.channels, self.side)[0]
            place -= len(part.pixels)
        raise IndexError(index)


def source_of(
    name: str,
    split: str,
    parts: list[Stored],
    labels: Tensor,
    classes: tuple[str, ...],
    channels: int,
    image_size: ImageSize,
    memory_gb: float,
    side: int | None = None,
) -> Source:
    """Returns the images of some files as one source: in memory where they fit into memory_gb, else read as they are asked for.

    labels: (N,) int64, -1 where unknown. side: that images are resized to; None: they are as they are.
    """
    sizes = [(len(part.pixels), *([side] * 2 if side else part.size)) for part in parts]
    if sum(channels * count * height * width for count, height, width in sizes) <= memory_gb * 2**30:
        images = torch.cat([_all(part, channels, side) for part in parts])
        return replace(from_tensors(name, split, images, labels, classes, image_size), file_list=_files(parts))
    stats = [(part.file.name, part.file.stat()) for part in parts]
    text = "\n".join(f"{file}\t{stat.st_size}" for file, stat in stats) + f"\n{channels} {side}"
    digest = hashlib.blake2b(text.encode() + labels.numpy().tobytes(), digest_size=16).hexdigest()
    times = hashlib.blake2b(" ".join(str(s.st_mtime_ns) for _, s in stats).encode(), digest_size=16).hexdigest()
    own = {"file_list": _files(parts), "parts": tuple(parts), "places": torch.arange(len(labels)), "side": side}
    return MappedImages(name, split, None, (), labels, classes, channels, image_size, digest, times, **own)


def _files(parts: list[Stored]) -> FileList:
    """Returns the files, each of which holds many images."""
    return FileList(
        tuple(part.file.name for part in parts), tuple(part.file.stat().st_size for part in parts), are_rows=False
    )


def _all(part: Stored, channels: int, side: int | None) -> Tensor:
    """Reads all images of a file, some at a time: of what is resized, the original need not be in memory as well."""
    starts = range(0, len(part.pixels), 4096)
    return torch.cat([as_asked(part.read(slice(start, start + 4096)), channels, side) for start in starts])


def as_asked(images: Tensor, channels: int, side: int | None) -> Tensor:
    """Returns images (n, C, H, W) uint8 with so many channels, and resized (bilinear, antialiased) where side is another size.

    Grey of colours is Rec. 601's luma, rounded as Pillow does; colours of grey are three equal channels.
    """
    if images.shape[1] == 3 and channels == 1:
        weights = torch.tensor([19595, 38470, 7471]).view(1, 3, 1, 1)
        images = ((images.int() * weights).sum(1, keepdim=True) + 0x8000 >> 16).to(torch.uint8)
    elif images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    if side is None or tuple(images.shape[2:]) == (side, side):
        return images
    resized = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
