"""What was inferred of a split's files: for the plan and data.json of a run."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from sslctl.data.files import Headers, ImageError, is_deep, measure_range
from sslctl.data.layout import Layout
from sslctl.errors import InputError

# Pillow's modes in the words of people who have such files.
_PIXELS = {"1": "1-bit", "L": "8-bit grey", "LA": "8-bit grey with alpha", "P": "8-bit palette", "RGB": "8-bit RGB"}
_PIXELS |= {"RGBA": "8-bit RGB with alpha", "CMYK": "8-bit CMYK", "YCbCr": "8-bit YCbCr", "I": "32-bit integers"}
_PIXELS |= {"F": "floating point"}


@dataclass(frozen=True)
class Description:
    """origin: where the split comes from. files: images of it. left_out: entries of the folder that are none, by kind.

    looked_at: files whose headers were read; sizes: their (width, height); pixels: their types, both with counts. warnings:
    what may not be meant, each with the key that answers it.
    """

    origin: str
    files: int
    left_out: dict[str, int]
    looked_at: int
    sizes: Counter
    pixels: Counter
    warnings: tuple[str, ...]
    value_range: tuple[float, float] | None = None
    unreadable: tuple[str, ...] = ()  # files that others stand in for

    def lines(self) -> list[str]:
        """Returns what the plan says of it."""
        lines = [self.origin]
        of = "" if self.looked_at == self.files else f" (of {self.looked_at:,} looked at)"
        sizes = {f"{width}×{height}": count for (width, height), count in self.sizes.items()}
        low, high = self.value_range or (0, 255)
        other = "; dataset.range=[low,high] or bits" if self.value_range else ""
        lines.append(f"sizes {_listed(sizes)}{of}; {_listed(self.pixels)}, {low:g}–{high:g} as 0–1{other}")
        if self.left_out:
            lines.append("left out " + ", ".join(f"{count:,} {kind}" for kind, count in self.left_out.items()))
        return lines

    def as_json(self) -> dict[str, Any]:
        """Returns plain values."""
        sizes = {f"{width}x{height}": count for (width, height), count in self.sizes.items()}
        return asdict(self) | {"sizes": sizes, "pixels": dict(self.pixels), "warnings": list(self.warnings)}


def describe(
    layout: Layout,
    headers: Headers,
    images: Tensor | None,
    channels: int,
    image_size: int,
    values: tuple[float, float] | None,
) -> Description:
    """Describes a split's files. images: (N, C, H, W) uint8 where they are in memory. values: the range of deep ones."""
    pixels = Counter()
    for mode, count in headers.modes.items():
        pixels[pixel_type(mode)] += count
    warnings = [*layout.warnings, *_pixel_doubts(headers.modes, channels), *_size_doubts(headers, image_size)]
    if images is not None:
        flat = images.flatten(1)
        constant = int((flat.amin(1) == flat.amax(1)).sum())
        if constant:
            warnings.append(f"{constant:,} of {len(images):,} images have one value throughout")
    return Description(
        layout.origin,
        len(layout.names),
        layout.listing.left_out,
        headers.looked_at,
        headers.sizes,
        pixels,
        tuple(warnings),
        values,
        tuple(layout.names[row] for row in layout.stand_ins),
    )


def value_range(
    asked: int | list[float] | None, modes: Counter, trained: Callable[[], list[str]]
) -> tuple[float, float] | None:
    """Returns the (low, high) of values that become 0 and 1, of images of more than 8 bits; None where there are none.

    asked: dataset.range, so many bits or two numbers; None: the least and the largest value of training images, whose paths
    `trained` gives. Images of 8 bits are always 0 to 255.
    """
    if isinstance(asked, int | float) and asked in range(1, 33):
        asked = (0, 2**asked - 1)
    if asked is not None:
        numbers = list(asked) if isinstance(asked, Sequence) and not isinstance(asked, str) else []
        if len(numbers) != 2 or not all(isinstance(n, int | float) for n in numbers) or not numbers[0] < numbers[1]:
            raise InputError(f"dataset.range={asked}: expected a number of bits, from 1 to 32, or [low,high]")
    if not any(map(is_deep, modes)):
        return None
    if asked is None:
        try:
            return measure_range(trained())
        except ImageError as error:
            raise InputError(str(error)) from error
    return float(numbers[0]), float(numbers[1])


def _pixel_doubts(modes: Counter, channels: int) -> list[str]:
    """Says what reading as so many 8-bit channels loses, or invents."""
    doubts, total = [], modes.total()
    grey = sum(count for mode, count in modes.items() if mode in ("1", "L", "LA", "F", "I") or mode.startswith("I;16"))
    if channels == 3 and grey == total:
        doubts.append("every image is grey and is read as three equal channels: dataset.channels=1 reads one")
    if channels == 1 and grey < total:
        doubts.append(
            f"{total - grey:,} of {total:,} images have colours, which are dropped: dataset.channels=3 keeps them"
        )
    alpha = modes["RGBA"] + modes["LA"]
    if alpha:
        doubts.append(f"{alpha:,} of {total:,} images have an alpha channel, which is dropped")
    return doubts


def _size_doubts(headers: Headers, image_size: int) -> list[str]:
    """Says where the network's size is far from that of most images."""
    (width, height), most = headers.sizes.most_common(1)[0]
    if 2 * most > headers.looked_at and width == height <= 96 and image_size != width:
        return [f"most images have {width}×{height} pixels, the network sees {image_size}: dataset.image_size={width}"]
    return []


def pixel_type(mode: str) -> str:
    """Returns what one of Pillow's modes holds."""
    return _PIXELS.get(mode, "16-bit grey" if mode.startswith("I;16") else mode)


def _listed(counts: Iterable) -> str:
    """Lists the most frequent, each with its count where there are several."""
    if len(counts) == 1:
        return next(iter(counts))
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    more = len(ordered) - 3
    return ", ".join(f"{name} ({count:,})" for name, count in ordered[:3]) + (
        f" and {more:,} others" if more > 0 else ""
    )
