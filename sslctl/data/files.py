"""Image files: reading them, and saying which one is bad. Finding them: listing.py."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslctl.errors import InputError


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


def common_size(paths: list[str]) -> tuple[int, int] | None:
    """Returns the (height, width) that all images share by their headers, or None. A few are looked at first."""
    common: tuple[int, int] | None = None
    for path in paths[:: max(1, len(paths) // 16)] + paths:
        try:
            with Image.open(path) as image:
                size = (image.height, image.width)
        except (OSError, Image.DecompressionBombError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
        if common is not None and size != common:
            return None
        common = size
    return common


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
