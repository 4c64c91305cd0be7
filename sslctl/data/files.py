"""Image files: reading them, and saying which one is bad. Finding them: listing.py."""

import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslctl.errors import InputError

_SAMPLED = 2_000  # headers that are read of images of several sizes


class ImageError(RuntimeError):
    """An image that cannot be read. Names its path."""


def read(path: str, channels: int) -> Tensor:
    """Reads one image file as (C, H, W) uint8. Raises ImageError with the path."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode.startswith("I"):  # 16 bits: PIL's own conversion would cut them off at 255
                    image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"cannot read {path}: {error}") from error
    tensor = torch.from_numpy(pixels.copy())
    return tensor[None] if channels == 1 else tensor.permute(2, 0, 1)


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
            return image.size, image.mode
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def read_all(paths: list[str], channels: int, size: tuple[int, int]) -> Tensor:
    """Reads all images of one size as (N, C, H, W) uint8; decoding runs in threads."""
    images = torch.empty((len(paths), channels, *size), dtype=torch.uint8)

    def fill(index: int) -> None:
        images[index] = read(paths[index], channels)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for _ in pool.map(fill, range(len(paths)), chunksize=256):
                pass
        except ImageError as error:
            raise InputError(str(error)) from error
    return images
