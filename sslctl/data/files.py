"""Image files: reading them, and saying which one is bad. Finding them: listing.py; what their values mean: pixels.py."""

import contextlib
import importlib.util
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sslctl.data import arrays
from sslctl.data.encoded import ImageFile, stream
from sslctl.data.listing import ARRAYS
from sslctl.data.pixels import SIXTEEN_BITS, Reading, finite_range, from_array, from_pillow, is_deep
from sslctl.errors import InputError, reason_of

_SAMPLED = 2_000  # headers that are read of images of several sizes
_PNG_EXIF = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}  # what of a PNG's header may say an orientation
_MEASURED = 1_000  # images whose values are looked at for their range
# What is raised for files that are damaged, too large, or none of images.
UNREADABLE = (OSError, ValueError, SyntaxError)


class ImageError(RuntimeError):
    """An image that cannot be read. Names its path."""


def read(path: ImageFile, reading: Reading) -> Tensor:
    """Reads one image file as (C, H, W), upright as its EXIF orientation says. Raises ImageError with the path.

    uint8 or, of values of more than 8 bits, float32 in [0, 1]: see Reading.
    """
    try:
        if not _is_array(path, reading.takes_colours):
            with contextlib.suppress(_OtherTiff), opened(path) as image:
                if not _is_cut(image, path):
                    ImageOps.exif_transpose(image, in_place=True)
                    return from_pillow(image, reading)
        array = arrays.read(path)
        may_be_pages = array.shape[2] != reading.channels and path.lower().endswith(arrays.TIFF)
        return from_array(array, reading, of_pages=may_be_pages and arrays.pages_in(path) > 1)
    except UNREADABLE as error:
        raise ImageError(f"cannot read {path}: {reason_of(error)}") from error


class _OtherTiff(Exception):
    """A TIFF file of more bands or bits than Pillow has modes for."""


@contextlib.contextmanager
def opened(path: ImageFile) -> Iterator[Image.Image]:
    """Opens an image by Pillow; one that is too large to be meant raises, and a TIFF that Pillow does not know _OtherTiff."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(stream(path))
        except UnidentifiedImageError as error:
            if not path.lower().endswith(arrays.TIFF):
                raise
            if importlib.util.find_spec("tifffile") is None:
                raise OSError(f"{error}; it may have other bands or bits: pip install 'sslctl[tiff]'") from None
            raise _OtherTiff from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise OSError(f"{error} dataset.tiles={{size: 256}} takes huge images as tiles") from None
        with image:
            yield image


def _is_array(path: ImageFile, takes_colours: bool) -> bool:
    """Tells whether a file is none that Pillow opens, or has bands of which Pillow might leave some out."""
    name = path.lower()
    return name.endswith(ARRAYS) or (not takes_colours and name.endswith(arrays.TIFF))


def _is_cut(image: Image.Image, path: ImageFile) -> bool:
    """Tells whether Pillow would give less of a file than it holds: 8 of 16 bits of its colours, three bands of four, or one of
    several pages, which are bands."""
    if image.format == "TIFF" and image.mode == "RGB" and image.tag_v2.get(277) not in (None, 3):
        return True
    if image.format == "TIFF" and _has_pages(image) and arrays.pages_in(path) > 1:
        return True
    return image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile[3]) for tile in image.tile)


def _has_pages(image: Image.Image) -> bool:
    """Tells whether a second picture of the same size and mode follows the first; another one is a thumbnail, or a mask.

    Even those of one mode may be stored in different ways, which is for tifffile to tell.
    """
    size, mode = image.size, image.mode
    try:
        image.seek(1)
        alike = (image.size, image.mode) == (size, mode)
    except (EOFError, *UNREADABLE, *arrays.DAMAGED):  # there is none, or nothing that can be read
        alike = False
    image.seek(0)
    return alike


def measure_range(paths: Sequence[ImageFile], reading: Reading, skip: bool = False) -> tuple[float, float]:
    """Returns the least and the largest value of images of more than 8 bits, of some 1,000 spread over them.

    reading: which bands count. Raises ImageError for one that cannot be read, unless it is to be skipped.
    """

    def values() -> Iterator[np.ndarray]:
        for path in paths[:: max(1, len(paths) // _MEASURED)]:
            try:
                array = raw_values(path, takes_colours=reading.takes_colours)
            except UNREADABLE as error:
                if not skip:
                    raise ImageError(f"cannot read {path}: {reason_of(error)}") from error
                continue
            if array.dtype != np.uint8:
                yield array if reading.bands is None else array[..., list(reading.bands)]

    return finite_range(values()) or SIXTEEN_BITS


def raw_values(path: ImageFile, *, takes_colours: bool) -> np.ndarray:
    """Reads a file's own values, (H, W) or (H, W, bands), those of 8 bits in grey. Raises what is in UNREADABLE."""
    if not _is_array(path, takes_colours):
        with contextlib.suppress(_OtherTiff), opened(path) as image:
            if not _is_cut(image, path):
                return _own_values(image)
    return arrays.read(path)


def header_and_values(path: ImageFile, draft: tuple[int, int]) -> tuple[tuple[int, int], str, np.ndarray]:
    """Returns (width, height) and kind of pixels of an image, as `header_of` does, and its `raw_values`, of one opening.

    draft: the least (width, height) of the values that is asked for, which some formats decode faster.
    """
    if not _is_array(path, takes_colours=True):
        with contextlib.suppress(_OtherTiff), opened(path) as image:
            if not _is_cut(image, path):
                return _upright_size(image, path), image.mode, _own_values(image, draft)  # in this order
    return *arrays.header(path), arrays.read(path)


def _own_values(image: Image.Image, draft: tuple[int, int] | None = None) -> np.ndarray:
    image.draft("L", draft)
    return np.asarray(image if is_deep(image.mode) else image.convert("L"))


def _upright_size(image: Image.Image, path: ImageFile) -> tuple[int, int]:
    return image.size[::-1] if _is_turned(image, path) else image.size


@dataclass(frozen=True)
class Headers:
    """What image files say of themselves: (width, height) and kinds of pixels, see pixels.py, with the numbers of files."""

    sizes: Counter
    kinds: Counter

    @property
    def looked_at(self) -> int:
        return self.sizes.total()

    def small_square(self) -> int | None:
        """Returns the side of most images, where they are squares of at most 96 pixels."""
        (width, height), most = self.sizes.most_common(1)[0]
        return width if width == height <= 96 and 2 * most > self.looked_at else None


def read_headers(paths: Sequence[ImageFile], takes_colours: bool, skip: bool = False) -> Headers:
    """Reads the headers of all images while they are of one size, else of some 2,000 spread over them.

    takes_colours: see Reading. Raises InputError for one that cannot be read, unless it is to be skipped, and where none can.
    """
    headers, total, size = {}, len(paths), None

    def look_at(row: int) -> None:
        if row not in headers:
            headers[row] = _header(paths[row], takes_colours, skip)

    for row in (*range(0, total, max(1, total // 16)), *range(total)):  # a few first, as they tell most sets apart
        look_at(row)
        if headers[row] and headers[row][0] != (size := size or headers[row][0]):
            for other in range(0, total, max(1, total // _SAMPLED)):
                look_at(other)
            break
    whole = [header for header in headers.values() if header]
    if not whole:
        raise InputError(f"none of the {total:,} images can be read, the first is {paths[0]}")
    return Headers(Counter(size for size, _ in whole), Counter(kind for _, kind in whole))


def _header(path: ImageFile, takes_colours: bool, skip: bool) -> tuple[tuple[int, int], str] | None:
    try:
        return header_of(path, takes_colours)
    except UNREADABLE as error:
        if skip:
            return None
        raise InputError(f"cannot read {path}: {reason_of(error)}") from error


def header_of(path: ImageFile, takes_colours: bool = True) -> tuple[tuple[int, int], str]:
    """Returns (width, height) of an image as it is read, and its kind of pixels. Raises what is in UNREADABLE."""
    if not _is_array(path, takes_colours):
        with contextlib.suppress(_OtherTiff), opened(path) as image:
            if not _is_cut(image, path):
                return _upright_size(image, path), image.mode
    return arrays.header(path)


def _is_turned(image: Image.Image, path: ImageFile) -> bool:
    """Tells whether EXIF data exchange rows and columns. Those of PNG may stand behind the pixels, which are passed over."""
    if image.format == "PNG" and not (_PNG_EXIF & image.info.keys() or _png_has_exif(path)):
        return False
    if image.format == "TIFF" and image.size != (image.tag_v2.get(256), image.tag_v2.get(257)):
        return False  # Pillow has turned it already
    return image.getexif().get(ExifTags.Base.Orientation, 1) >= 5


def _png_has_exif(path: ImageFile) -> bool:
    file = stream(path)
    with open(file, "rb") if isinstance(file, str) else file as opened:
        opened.seek(8)
        while len(chunk := opened.read(8)) == 8:
            if chunk[4:] == b"eXIf":
                return True
            opened.seek(int.from_bytes(chunk[:4], "big") + 4, os.SEEK_CUR)
    return False


def read_all(
    paths: Sequence[ImageFile], reading: Reading, size: tuple[int, int], skip: bool = False
) -> tuple[Tensor, list[int]]:
    """Reads all images of one size (H, W) as (N, C, H, W), in threads. Returns the rows that cannot be read, too.

    Raises InputError for one of these, unless they are to be skipped; they are zeros.
    """
    images = torch.zeros((len(paths), reading.channels, *size), dtype=reading.dtype)

    def fill(index: int) -> bool:
        try:
            images[index] = read(paths[index], reading)
        except ImageError:
            if not skip:
                raise
            return False
        return True

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            whole = list(pool.map(fill, range(len(paths)), chunksize=256))
        except ImageError as error:
            raise InputError(str(error)) from error
    return images, [row for row, is_whole in enumerate(whole) if not is_whole]
