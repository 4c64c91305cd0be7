"""What the values of pixels are: how many bits they have, how they become numbers from 0 to 1, and which bands are channels."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIXTEEN_BITS = (0.0, 65535.0)
MOST_BANDS = 16  # of one image
OF_PAGES = (
    " of pages"  # ends a kind whose bands stand in several pages of a file: these are no colours, and none is alpha
)
_LUMA = (0.299, 0.587, 0.114)  # as Pillow weighs red, green and blue

# Pillow's modes in the words of people who have such files.
_NAMES = {"1": "1-bit", "L": "8-bit grey", "LA": "8-bit grey with alpha", "P": "8-bit palette", "RGB": "8-bit RGB"}
_NAMES |= {"RGBA": "8-bit RGB with alpha", "CMYK": "8-bit CMYK", "YCbCr": "8-bit YCbCr", "I": "32-bit integers"}
_NAMES |= {"F": "floating point"}
_BANDS = {"1": 1, "L": 1, "LA": 2, "P": 3, "RGB": 3, "YCbCr": 3, "HSV": 3, "LAB": 3, "RGBA": 4, "RGBX": 4, "CMYK": 4}


class BandsError(ValueError):
    """An image with other bands than the dataset's keys say."""


@dataclass(frozen=True)
class Reading:
    """How files become tensors of so many channels.

    value_range: (low, high) that become 0 and 1; None for a dataset of 8 bits, which stays uint8. bands: those that are
    taken, in this order, counted from 0; None: all that there are.
    """

    channels: int
    value_range: tuple[float, float] | None = None
    bands: tuple[int, ...] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Returns uint8 or, of values of more than 8 bits, float32."""
        return torch.uint8 if self.value_range is None else torch.float32

    @property
    def takes_colours(self) -> bool:
        """Tells whether any image can be read, as grey or as red, green and blue; else its bands must be as many."""
        return self.channels in (1, 3) and self.bands is None


# --- Kinds of pixels: Pillow's modes, and dtype×bands of what Pillow does not hold, such as uint16×5 ---


def kind_of(array: np.ndarray) -> str:
    """Returns the kind of an array (H, W, C)."""
    return f"{array.dtype}×{array.shape[2]}"


def is_deep(kind: str) -> bool:
    """Tells whether values have more than 8 bits: integers of 16 or 32, or floating point."""
    dtype, _, bands = kind.partition("×")
    return dtype not in ("uint8", "bool") if bands else kind.startswith("I") or kind == "F"


def bands_in(kind: str) -> int:
    """Returns how many bands an image of a kind has; of a palette, those of its colours."""
    bands = kind.removesuffix(OF_PAGES).partition("×")[2]
    return int(bands) if bands else _BANDS.get(kind, 1)


def is_grey(kind: str) -> bool:
    """Tells whether an image has no colours: one band, and perhaps a second that is an alpha channel or no picture."""
    return bands_in(kind) <= 2 and not kind.endswith(OF_PAGES)


def makes_channels(bands: int, reading: Reading, *, of_pages: bool) -> bool:
    """Tells whether an image's bands, of which the keys choose none, make the channels that are asked for: they are as many, or
    they are grey or colours, perhaps with an alpha channel. of_pages: they stand in several pages, as colours do not."""
    return bands == reading.channels or (reading.takes_colours and bands <= 4 and not of_pages)


def name_of(kind: str) -> str:
    """Returns the name of a kind for the plan."""
    dtype, _, bands = kind.removesuffix(OF_PAGES).partition("×")
    if bands:
        return dtype if bands == "1" else f"{bands} bands of {dtype}"
    return _NAMES.get(kind, "16-bit grey" if kind.startswith("I;16") else kind)


# --- Values ---


def finite_range(arrays: Iterable[np.ndarray]) -> tuple[float, float] | None:
    """Returns the least and the largest finite value of arrays; None where they are one."""
    low, high = np.inf, -np.inf
    for array in arrays:
        values = array[np.isfinite(array)] if array.dtype.kind == "f" else array
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    return (low, high) if low < high else None


def from_pillow(image: Image.Image, reading: Reading) -> Tensor:
    """Returns an opened image as (C, H, W), uint8 or float32 in [0, 1] as the reading says. Raises BandsError."""
    if reading.takes_colours and not is_deep(image.mode):
        image = image.convert("L" if reading.channels == 1 else "RGB")
    elif image.mode in ("P", "1"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    array = np.asarray(image)
    return from_array(array if array.ndim == 3 else array[..., None], reading)


def as_bands(array: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (H, W, C). The shorter of the first and the last axis is that of the bands."""
    if array.ndim not in (2, 3) or array.dtype.kind not in "biuf":
        raise BandsError(
            f"{array.dtype} of shape {array.shape}; expected numbers, (H, W), (H, W, bands) or (bands, H, W)"
        )
    if array.ndim == 2:
        return array[..., None]
    return np.moveaxis(array, 0, 2) if array.shape[0] < array.shape[2] else array


def from_array(array: np.ndarray, reading: Reading, *, of_pages: bool = False) -> Tensor:
    """(H, W, bands) of any type -> (C, H, W), uint8 or float32 in [0, 1] as the reading says. Raises BandsError.

    Values that are no numbers become 0; what lies outside the range, its ends. of_pages: see `makes_channels`.
    """
    array, bands = _chosen(array, reading, of_pages), reading.channels
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype == np.uint8:
        if array.shape[2] == 3 and bands == 1:
            array = (array @ np.array(_LUMA)).round().astype(np.uint8)[..., None]
        values = torch.from_numpy(array.copy()).permute(2, 0, 1)  # in memory as in the file, which is torch's fastest
        values = values if reading.value_range is None else values.float().div_(255)
    else:
        low, high = reading.value_range or SIXTEEN_BITS
        exact = np.float32 if array.dtype in (np.uint16, np.int16, np.int8, np.float16) else np.float64
        levels = (np.nan_to_num(array.astype(exact), posinf=high, neginf=low) - exact(low)) / exact(high - low)
        if array.shape[2] == 3 and bands == 1:
            levels = (levels @ np.array(_LUMA))[..., None]
        levels = np.ascontiguousarray(levels.clip(0, 1).transpose(2, 0, 1), np.float32)
        # A deep image that nobody looked at before, in a dataset of 8 bits, is rounded to these.
        values = torch.from_numpy(levels if reading.value_range else (levels * 255).round().astype(np.uint8))
    return values.expand(bands, -1, -1).contiguous() if bands == 3 and len(values) == 1 else values


def _chosen(array: np.ndarray, reading: Reading, of_pages: bool) -> np.ndarray:
    """Returns the bands that become channels, or those of which they are made: grey of red, green and blue, or three of grey."""
    count = array.shape[2]
    if reading.bands is not None:
        if max(reading.bands) >= count:
            raise BandsError(f"{count} bands, dataset.bands={list(reading.bands)} counts from 0")
        return array[..., list(reading.bands)]
    if not makes_channels(count, reading, of_pages=of_pages):
        raise BandsError(f"{count} bands: dataset.channels={count}, or dataset.bands names {reading.channels} of them")
    if reading.takes_colours and count == 2:
        return array[..., :1]  # grey with alpha
    if reading.takes_colours and count == 4:
        return array[..., :3]  # red, green, blue and alpha
    return array
