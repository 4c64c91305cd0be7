"""Image files: reading them, and saying which one is bad. Finding them: listing.py."""

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from sslctl.errors import InputError

SIXTEEN_BITS = (0.0, 65535.0)
_SAMPLED = 2_000  # headers that are read of images of several sizes
_MEASURED = 1_000  # images whose values are looked at for their range
# What Pillow raises for files that are damaged, too large, or none of images.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImageError(RuntimeError):
    """An image that cannot be read. Names its path."""


def read(path: str, channels: int, value_range: tuple[float, float] | None = None) -> Tensor:
    """Reads one image file as (C, H, W) uint8, upright as its EXIF orientation says. Raises ImageError with the path.

    value_range: of images of more than 8 bits, see `as_8_bit`.
    """
    try:
        with _opened(path) as image:
            if image.format != "PNG":  # whose orientation may stand behind the pixels
                ImageOps.exif_transpose(image, in_place=True)
            pixels = np.asarray(as_8_bit(image, value_range).convert("L" if channels == 1 else "RGB"))
    except UNREADABLE as error:
        raise ImageError(f"cannot read {path}: {error}") from error
    tensor = torch.from_numpy(pixels.copy())
    return tensor[None] if channels == 1 else tensor.permute(2, 0, 1)


def as_8_bit(image: Image.Image, value_range: Sequence[float] | None) -> Image.Image:
    """Returns an image of more than 8 bits with its range of values, None for 16 bits, as 0 to 255; others as they are."""
    if not is_deep(image.mode):
        return image
    low, high = value_range or SIXTEEN_BITS
    levels = (np.nan_to_num(np.asarray(image, np.float64)) - low) * (255 / (high - low))
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            yield image


def is_deep(mode: str) -> bool:
    """Tells whether one of Pillow's modes holds more than 8 bits a value: integers of 16 or 32, or floating point."""
    return mode.startswith("I") or mode == "F"


def measure_range(paths: list[str]) -> tuple[float, float]:
    """Returns the least and the largest value of images of more than 8 bits, of some 1,000 spread over them.

    Raises ImageError for one that cannot be read.
    """
    low, high = np.inf, -np.inf
    for path in paths[:: max(1, len(paths) // _MEASURED)]:
        try:
            with _opened(path) as image:
                if is_deep(image.mode):
                    values = np.asarray(image, np.float64)
                    values = values[np.isfinite(values)]
                    low, high = min(low, values.min(initial=np.inf)), max(high, values.max(initial=-np.inf))
        except UNREADABLE as error:
            raise ImageError(f"cannot read {path}: {error}") from error
    return (float(low), float(high)) if low < high else SIXTEEN_BITS


@dataclass(frozen=True)
class Headers:
    """What image files say of themselves: (width, height) and Pillow's modes, each with the number of files."""

    sizes: Counter
    modes: Counter

    @property
    def looked_at(self) -> int:
        return self.sizes.total()


def read_headers(paths: list[str]) -> Headers:
    """Reads the headers of all images while they are of one size, else of some 2,000 spread over them.

    Raises InputError for one that cannot be read.
    """
    headers, total = {}, len(paths)
    for row in (*range(0, total, max(1, total // 16)), *range(total)):  # a few first, as they tell most sets apart
        headers[row] = headers.get(row) or _header(paths[row])
        if headers[row][0] != headers[0][0]:
            for other in range(0, total, max(1, total // _SAMPLED)):
                headers[other] = headers.get(other) or _header(paths[other])
            break
    return Headers(Counter(size for size, _ in headers.values()), Counter(mode for _, mode in headers.values()))


def _header(path: str) -> tuple[tuple[int, int], str]:
    try:
        with Image.open(path) as image:
            turned = image.format != "PNG" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size[::-1] if turned else image.size, image.mode
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def read_all(paths: list[str], channels: int, size: tuple[int, int], value_range: tuple[float, float] | None) -> Tensor:
    """Reads all images of one size as (N, C, H, W) uint8; decoding runs in threads."""
    images = torch.empty((len(paths), channels, *size), dtype=torch.uint8)

    def fill(index: int) -> None:
        images[index] = read(paths[index], channels, value_range)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for _ in pool.map(fill, range(len(paths)), chunksize=256):
                pass
        except ImageError as error:
            raise InputError(str(error)) from error
    return images
