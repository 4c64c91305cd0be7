"""Windows of images: of TIFF and .npy files a part is read from the file; others are decoded into a .npy file once."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from sslctl.data import arrays
from sslctl.data.listing import ARRAYS
from sslctl.data.pixels import BandsError, bands_in, is_deep
from sslctl.ops.special_files import refuse_special

_DECODED = 4 * 2**30  # bytes of an image that is decoded at once
_SEGMENT = 64 * 2**20  # bytes of a TIFF's tile or strip, which is decoded whole for any window in it


def store_of(path: str, cache: Path) -> str:
    """Returns the file that an image's windows are read from: itself, or its pixels in `cache`, where they are put if need be, in
    the place of those that it had when it was another.

    Raises what is in files.UNREADABLE, and ValueError for an image that is too large to be decoded at once.
    """
    name = path.lower()
    if (name.endswith(".npy") and _has_rows(path)) or (name.endswith(arrays.TIFF) and _has_windows(path)):
        return path
    stat, pages = os.stat(path), pages_in(path)
    # Of several pages an earlier sslctl kept the first alone.
    state = f"{stat.st_size}\t{stat.st_mtime_ns}" + f"\t{pages} pages" * (pages > 1)
    place, state = (
        hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
        for text in (os.path.abspath(path), state)
    )
    store = cache / f"{place}-{state}.npy"
    if not store.exists():
        pixels = _decoded(path)
        cache.mkdir(parents=True, exist_ok=True)
        temporary = store.with_name(f".{store.name}.{os.getpid()}")
        with temporary.open("wb") as opened:
            np.save(opened, pixels, allow_pickle=False)
        os.replace(temporary, store)
        for earlier in cache.glob(f"{place}-*.npy"):
            if earlier != store:
                earlier.unlink(missing_ok=True)
    return str(store)


def pages_in(path: str) -> int:
    """Returns of how many pages an image is, 1 of all but TIFF files."""
    if not path.lower().endswith(arrays.TIFF):
        return 1
    stat = os.stat(path)
    return len(_tiff(path, stat.st_size, stat.st_mtime_ns)[1])


def size_of(path: str) -> tuple[int, int]:
    """Returns (width, height) of an image, of any size and format."""
    return header_of(path)[0]


def header_of(path: str) -> tuple[tuple[int, int], str]:
    """Returns (width, height) of an image of any size and format, and the kind of its pixels."""
    if path.lower().endswith((*ARRAYS, *arrays.TIFF)):
        return arrays.header(path)
    with _opened(path) as image:
        return image.size, image.mode


def header(store: str) -> tuple[tuple[int, int], str]:
    """Returns (width, height) of an image that windows are read from, and the kind of its pixels."""
    return arrays.header(store)


def read(store: str, top: int, left: int, size: int) -> np.ndarray:
    """Reads a square window as (size, size, bands) of the file's own type. Raises what is in files.UNREADABLE."""
    # Files stay open: to read the table of a slide's hundred thousand tiles takes longer than a tile. One that is written anew
    # is opened anew. Read by position, which threads do not share; a map of a file that is cut off ends the process.
    stat = os.stat(store)
    if store.lower().endswith(".npy"):
        return _npy(store, stat.st_size, stat.st_mtime_ns).window(top, left, size)
    pages = _tiff(store, stat.st_size, stat.st_mtime_ns)[1]
    try:
        return np.concatenate([_page_window(page, top, left, size) for page in pages], 2)
    except arrays.DAMAGED as error:
        raise OSError(str(error)) from error


@dataclass(frozen=True)
class _Npy:
    """An opened .npy file. start: of the values, in bytes. shape: as it is stored, rows one after the other."""

    opened: IO[bytes]
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def window(self, top: int, left: int, size: int) -> np.ndarray:
        bands_first = len(self.shape) == 3 and self.shape[0] < self.shape[2]  # as in pixels.as_bands
        height, width = self.shape[1:] if bands_first else self.shape[:2]
        planes, step = (self.shape[0], 1) if bands_first else (1, self.shape[2] if len(self.shape) == 3 else 1)
        window = np.empty((planes, size, size, step), self.dtype)
        count = size * step * self.dtype.itemsize
        for plane in range(planes):
            for row in range(size):
                place = ((plane * height + top + row) * width + left) * step * self.dtype.itemsize
                data = os.pread(self.opened.fileno(), count, self.start + place)
                if len(data) < count:
                    raise OSError(f"it ends within row {top + row}")
                window[plane, row] = np.frombuffer(data, self.dtype).reshape(size, step)
        return np.moveaxis(window[..., 0], 0, 2) if bands_first else window[0]


@functools.lru_cache(maxsize=64)
def _npy(path: str, size: int, time: int) -> _Npy:
    opened = open(path, "rb")  # noqa: SIM115  closed when nothing holds it
    shape, columns_first, dtype = _npy_header(opened)
    if columns_first or dtype.hasobject:
        raise OSError("it has no rows one after the other")
    return _Npy(opened, opened.tell(), shape, dtype)


def _npy_header(opened: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(opened)
    return (
        np.lib.format.read_array_header_1_0(opened)
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0(opened)
    )


@functools.lru_cache(maxsize=16)
def _tiff(path: str, size: int, time: int) -> tuple[Any, list]:
    """Opens a TIFF file. Returns it, and the pages of its first picture in full resolution."""
    tifffile = arrays.package("tifffile", "tiff", path)
    try:
        opened = tifffile.TiffFile(path)
        pages = [page.aspage() for series in arrays.series_of(opened) for page in series.pages]
        for page in pages:  # what is read from the file when it is first asked for, which threads must not do at once
            _ = page.jpegtables, page.jpegheader, page.decode, page.dataoffsets, page.databytecounts
        return opened, pages
    except (tifffile.TiffFileError, *arrays.DAMAGED) as error:
        raise OSError(str(error)) from error


def _has_rows(path: str) -> bool:
    """Tells whether a .npy file has its rows one after the other."""
    with open(path, "rb") as opened:
        return not _npy_header(opened)[1]


def _has_windows(path: str) -> bool:
    """Tells whether a TIFF file is cut into parts of a bearable size."""
    _, kind = arrays.header(path)
    stat = os.stat(path)
    pages = _tiff(path, stat.st_size, stat.st_mtime_ns)[1]
    if not arrays.is_as_stored(pages[0]):
        return False
    tall, wide = _segment(pages[0])
    size = tall * wide * pages[0].samplesperpixel * pages[0].dtype.itemsize
    return len(pages) * pages[0].samplesperpixel == bands_in(kind) and size <= _SEGMENT


def _segment(page: Any) -> tuple[int, int]:
    """Returns the (rows, columns) that are stored together: a tile, or a strip."""
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip or page.imagelength, page.imagelength), page.imagewidth


def _page_window(page: Any, top: int, left: int, size: int) -> np.ndarray:
    """Decodes those tiles or strips of a page that a window touches, (size, size, samples)."""
    tall, wide = _segment(page)
    across, down = -(-page.imagewidth // wide), -(-page.imagelength // tall)
    planes = page.samplesperpixel if page.planarconfig == 2 else 1  # 2: each sample in segments of its own
    window = np.zeros((size, size, page.samplesperpixel), page.dtype)
    descriptor = page.parent.filehandle.fileno()
    for plane in range(planes):
        for row in range(top // tall, (top + size - 1) // tall + 1):
            for column in range(left // wide, (left + size - 1) // wide + 1):
                number = (plane * down + row) * across + column
                count = page.databytecounts[number]
                if not count:  # of a sparse file: nothing was ever written there
                    continue
                data = os.pread(descriptor, count, page.dataoffsets[number])  # has no position that threads would share
                if len(data) < count:
                    raise OSError(f"it ends within tile {number}")
                segment, _, _ = page.decode(data, number, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
                segment = segment[0]  # (rows, columns, samples), less at the edges
                y, x = row * tall - top, column * wide - left
                ys = slice(max(0, y), min(size, y + segment.shape[0]))
                xs = slice(max(0, x), min(size, x + segment.shape[1]))
                part = segment[ys.start - y : ys.stop - y, xs.start - x : xs.stop - x]
                if planes == 1:
                    window[ys, xs] = part
                else:
                    window[ys, xs, plane] = part[..., 0]
    return window


def _decoded(path: str) -> np.ndarray:
    """Decodes a whole image as (H, W, bands)."""
    name = path.lower()
    stat = os.stat(path)
    is_array = name.endswith(ARRAYS)
    if name.endswith(arrays.TIFF):
        pages = _tiff(path, stat.st_size, stat.st_mtime_ns)[1]
        is_array = arrays.is_as_stored(pages[0]) or len(pages) > 1  # of which Pillow would give the first
    if is_array:
        (width, height), kind = arrays.header(path)
        _refuse_large(width, height, np.dtype(kind.partition("×")[0]).itemsize * bands_in(kind))
        return np.ascontiguousarray(arrays.read(path))
    with _opened(path) as image:
        _refuse_large(*image.size, 8 if is_deep(image.mode) else 4)
        image = ImageOps.exif_transpose(image)
        kept = is_deep(image.mode) or image.mode in ("L", "LA", "RGB", "RGBA")
        pixels = np.asarray(image if kept else image.convert("L" if image.mode == "1" else "RGB"))
    return pixels if pixels.ndim == 3 else pixels[..., None]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Opens an image by Pillow without its limit: who asks for tiles means large images."""
    refuse_special(path)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _refuse_large(width: int, height: int, pixel: int) -> None:
    if width * height * pixel > _DECODED:
        raise BandsError(
            f"{width}×{height} pixels take {width * height * pixel / 2**30:.1f} GiB decoded, {_DECODED / 2**30:g} are allowed;"
            " a tiled TIFF or a .npy file is read by window"
        )
