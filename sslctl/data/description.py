"""What was inferred of a split's files: for the plan and data.json of a run."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from sslctl.data.files import Headers, ImageError
from sslctl.data.layout import Layout
from sslctl.data.pixels import MOST_BANDS, OF_PAGES, Reading, bands_in, is_deep, is_grey, makes_channels, name_of
from sslctl.errors import InputError
from sslctl.ops.image_size import ImageSize, in_words


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
    bands: tuple[int, ...] | None = None  # that are taken, where not all are
    tiles: str | None = None  # of these images, if they are the samples
    cut: str | None = None  # how most images are seen, if they are no squares and the network's are

    def lines(self) -> list[str]:
        """Returns what the plan says of it."""
        lines = [self.origin]
        of = "" if self.looked_at == self.files else f" (of {self.looked_at:,} looked at)"
        sizes = {f"{width}×{height}": count for (width, height), count in self.sizes.items()}
        low, high = self.value_range or (0, 255)
        other = "; dataset.range=[low,high] or bits" if self.value_range else ""
        lines.append(f"sizes {_listed(sizes)}{of}; {_listed(self.pixels)}, {low:g}–{high:g} as 0–1{other}")
        if self.tiles is not None:
            lines.append(self.tiles)
        if self.bands is not None:
            lines.append(f"bands {', '.join(map(str, self.bands))}, counted from 0; dataset.bands=[…]")
        if self.cut is not None:
            lines.append(self.cut)
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
    reading: Reading,
    image_size: ImageSize,
    tiles: str | None = None,
) -> Description:
    """Describes a split's files. images: (N, C, H, W) where they are in memory. tiles: a sentence on those that are samples."""
    # Several of Pillow's modes are one kind to people who have such files.
    pixels = Counter()
    for kind, count in headers.kinds.items():
        pixels[name_of(kind)] += count
    # What may not be meant: of the folders, of the pixels, of the network's size, and images that show nothing.
    warnings = [*layout.warnings, *_pixel_doubts(headers.kinds, reading), *_size_doubts(headers, image_size)]
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
        reading.value_range,
        tuple(layout.names[row] for row in layout.stand_ins),
        reading.bands,
        tiles,
        _cut(headers, image_size) if tiles is None else None,
    )


def value_range(
    setting: int | list[float] | None, kinds: Counter, measure: Callable[[], tuple[float, float]]
) -> tuple[float, float] | None:
    """Returns the (low, high) of values that become 0 and 1, of images of more than 8 bits; None where there are none.

    setting: dataset.range, so many bits or two numbers; None: what `measure` returns, the least and the largest value of
    training images. Images of 8 bits are always 0 to 255.
    """
    # The setting is checked first, also where images of 8 bits do not need it.
    if isinstance(setting, int | float) and setting in range(1, 33):
        setting = (0, 2**setting - 1)
    if setting is not None:
        numbers = list(setting) if isinstance(setting, Sequence) and not isinstance(setting, str) else []
        if len(numbers) != 2 or not all(isinstance(n, int | float) for n in numbers) or not numbers[0] < numbers[1]:
            raise InputError(f"dataset.range={setting}: expected a number of bits, from 1 to 32, or [low,high]")
    if not any(map(is_deep, kinds)):
        return None
    if setting is None:
        try:
            return measure()
        except ImageError as error:
            raise InputError(str(error)) from error
    return float(numbers[0]), float(numbers[1])


def refuse_bands(kinds: Counter, reading: Reading) -> None:
    """Raises InputError where most images have other bands than the keys say, and no rule makes channels of them."""
    bands = Counter()
    for kind, count in kinds.items():
        bands[bands_in(kind), kind.endswith(OF_PAGES)] += count
    ((most, of_pages), _), *_ = bands.most_common(1)
    if reading.bands is not None:
        if max(reading.bands) >= most:
            raise InputError(f"dataset.bands={list(reading.bands)}: images have {most} bands, counted from 0")
    elif not makes_channels(most, reading, of_pages=of_pages):
        all_of_them = f"dataset.channels={most} takes all, " if most <= MOST_BANDS else ""
        raise InputError(
            f"images have {most} bands: {all_of_them}dataset.bands=[…] with as many dataset.channels some of them"
        )


def _pixel_doubts(kinds: Counter, reading: Reading) -> list[str]:
    """Says what reading as grey or as colours loses, or invents."""
    if not reading.takes_colours:
        return []
    doubts, total = [], kinds.total()
    grey = sum(count for kind, count in kinds.items() if is_grey(kind))
    if reading.channels == 3 and grey == total:
        doubts.append("every image is grey and is read as three equal channels: dataset.channels=1 reads one")
    if reading.channels == 1 and grey < total:
        doubts.append(
            f"{total - grey:,} of {total:,} images have colours, which are dropped: dataset.channels=3 keeps them"
        )
    alpha = kinds["RGBA"] + kinds["LA"]
    if alpha:
        doubts.append(f"{alpha:,} of {total:,} images have an alpha channel, which is dropped")
    for bands, last in ((2, "second"), (4, "fourth")):
        more = sum(count for kind, count in kinds.items() if kind.endswith(f"×{bands}"))
        if more:
            doubts.append(
                f"{more:,} of {total:,} images have a {last} band, which is dropped: dataset.channels={bands} keeps it"
            )
    return doubts


def _cut(headers: Headers, image_size: ImageSize) -> str | None:
    """Says what becomes of most images, where they have one shape that is no square."""
    (width, height), most = headers.sizes.most_common(1)[0]
    if isinstance(image_size, tuple) or width == height or 2 * most <= headers.looked_at:
        return None
    return f"images are cut to squares of {image_size}; dataset.image_size=[height,width] sees their whole shape"


def _size_doubts(headers: Headers, image_size: ImageSize) -> list[str]:
    """Says where the network's size is far from that of most images."""
    side = headers.small_square()
    if side in (None, image_size):
        return []
    return [
        f"most images have {side}×{side} pixels, the network sees {in_words(image_size)}: dataset.image_size={side}"
    ]


def _listed(counts: Iterable) -> str:
    """Lists the most frequent, each with its count where there are several."""
    if len(counts) == 1:
        return next(iter(counts))
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    more = len(ordered) - 3
    return ", ".join(f"{name} ({count:,})" for name, count in ordered[:3]) + (
        f" and {more:,} others" if more > 0 else ""
    )
