"""Images that Pillow does not hold as they are: arrays of NumPy, TIFF of any bands, DICOM, PNG of 16-bit colours."""

import importlib
import itertools
import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch

from sslctl.data.encoded import Encoded, ImageFile, stream
from sslctl.data.pixels import OF_PAGES, BandsError, as_bands
from sslctl.errors import InputError

TIFF = (".tif", ".tiff")
_ORIENTATION = 274  # the tag; 1 is upright
# What decoders of a TIFF's parts raise beside OSError and ValueError; imagecodecs' own are RuntimeErrors.
DAMAGED = (RuntimeError, LookupError, TypeError, zlib.error, lzma.LZMAError, struct.error)


def read(path: ImageFile) -> np.ndarray:
    """Reads a file as (H, W, bands) of its own type. Raises OSError or ValueError where it cannot be read."""
    return _reader(path)(path)


def header(path: ImageFile) -> tuple[tuple[int, int], str]:
    """Returns (width, height), and the kind of the pixels, of which a TIFF or DICOM file is asked for its header only."""
    if path.lower().endswith(TIFF):
        return _of_tiff(path, _tiff_header)
    if path.lower().endswith((".dcm", ".dicom")):
        return _dicom_header(path)
    array = _load(path, "r") if isinstance(path, str) and path.lower().endswith(".npy") else read(path)
    return _described(array.shape, array.dtype)


def _described(shape: tuple[int, ...], dtype: Any) -> tuple[tuple[int, int], str]:
    height, width, bands = shape
    return (width, height), f"{np.dtype(dtype)}×{bands}"


def _reader(path: ImageFile) -> Callable[[ImageFile], np.ndarray]:
    name = path.lower()
    if name.endswith(TIFF):
        return read_tiff
    if name.endswith(".png"):
        return _read_png
    return _read_dicom if name.endswith((".dcm", ".dicom")) else _read_numpy


def package(name: str, extra: str, path: ImageFile) -> ModuleType:
    """Imports an optional package; raises InputError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{path} needs {name}: pip install 'sslctl[{extra}]'") from None


# --- NumPy: never a pickle, which can run code ---


def _read_numpy(path: ImageFile) -> np.ndarray:
    return _load(path, None)


def _load(path: ImageFile, mode: str | None) -> np.ndarray:
    """Reads the array of a .npy file, or the one of a .npz file, or of several the one called image. mode: "r" maps it."""
    try:
        loaded = np.load(stream(path), mmap_mode=mode, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return as_bands(loaded)
        with loaded:
            name = "image" if "image" in loaded.files or len(loaded.files) != 1 else loaded.files[0]
            if name not in loaded.files:
                raise BandsError(f"arrays {', '.join(loaded.files[:5])}; expected one, or one called image")
            return as_bands(loaded[name])
    except (EOFError, KeyError, zipfile.BadZipFile) as error:
        raise OSError(str(error)) from error


# --- TIFF ---


def read_tiff(path: ImageFile) -> np.ndarray:
    """Reads the first image of a TIFF file in full resolution, all its bands: of one page, or of several, page by page."""

    def values(series: list, shape: tuple[int, ...], rows: int) -> np.ndarray:
        array = series[0].asarray() if len(series) == 1 else np.stack([one.asarray() for one in series])
        array = np.moveaxis(array.reshape(shape), (rows, rows + 1), (0, 1))
        return array.reshape(*array.shape[:2], -1)  # (H, W, pages × samples)

    return _of_tiff(path, values)


def pages_in(path: ImageFile) -> int:
    """Returns of how many pages the first image of a TIFF file is. Raises OSError or ValueError as `read` does."""
    return _of_tiff(path, lambda series, shape, rows: _pages(series))


def _pages(series: list) -> int:
    return sum(len(one.pages) for one in series)


def _tiff_header(series: list, shape: tuple[int, ...], rows: int) -> tuple[tuple[int, int], str]:
    height, width = shape[rows : rows + 2]
    size, kind = _described((height, width, math.prod(shape) // max(height * width, 1)), series[0].dtype)
    return size, kind + OF_PAGES * (_pages(series) > 1)


def series_of(opened: Any) -> list:
    """Returns tifffile's series that the first picture of an opened file is made of: the first, and where that is one page, those
    behind it that are one page each, of the same size, kind and compression, as writers leave that write page by page."""
    first, *others = opened.series

    def is_alike(series: Any) -> bool:
        page, own = series.keyframe, first.keyframe
        stored = page.photometric == own.photometric and page.compression == own.compression
        return stored and (series.shape, series.axes, series.dtype) == (first.shape, first.axes, first.dtype)

    return [first, *itertools.takewhile(is_alike, others)] if len(first.pages) == 1 else [first]


def _of_tiff(path: ImageFile, look: Callable[[list, tuple[int, ...], int], Any]) -> Any:
    """Returns what `look` makes of a file's `series_of`, their shape, and which axis is that of the rows; columns follow it.

    The other axes are the bands: samples of a page, pages, or pages of several samples each. Raises BandsError for others, and
    for pages whose samples are no bands, see `_refuse_pages`.
    """
    tifffile = package("tifffile", "tiff", path)
    try:
        with tifffile.TiffFile(stream(path)) as opened:
            series, first = series_of(opened), opened.series[0]
            axes = [(axis, n) for axis, n in zip(first.axes, first.shape, strict=True) if n > 1 or axis in "YX"]
            axes = [("I", len(series)), *axes] if len(series) > 1 else axes
            names, shape = "".join(axis for axis, _ in axes), tuple(n for _, n in axes)
            if "YX" not in names or len(names) > (4 if "S" in names else 3):
                raise BandsError(f"axes {first.axes} of {first.shape}; expected rows, columns and bands")
            if _pages(series) > 1:
                _refuse_pages(first.keyframe, _pages(series))
            return look(series, shape, names.index("Y"))
    except (tifffile.TiffFileError, *DAMAGED) as error:
        raise OSError(str(error)) from error


def is_as_stored(page: Any) -> bool:
    """Tells whether a page's samples are its colours: black is zero, RGB, or JPEG's own, which are decoded to RGB.

    Others (palettes, CMYK, white is zero) Pillow turns into colours.
    """
    return page.photometric in (1, 2) or (page.photometric == 6 and page.compression == 7)


def _refuse_pages(page: Any, count: int) -> None:
    """Raises BandsError for pages whose samples are no bands: of palettes, inks, alpha, or one bit as faxes have them; and for
    pages that are not upright. page: the first of `count`, which are alike."""
    has_alpha = not {1, 2}.isdisjoint(page.extrasamples)  # associated or not; 0 are samples of no such meaning
    if page.dtype == np.bool_:
        values = "1-bit values"
    elif not is_as_stored(page):
        values = f"{getattr(page.photometric, 'name', page.photometric)} values"
    elif has_alpha:
        values = "values with an alpha channel"
    elif (tag := page.tags.get(_ORIENTATION)) is not None and tag.value != 1:
        raise BandsError(f"{count} pages of orientation {tag.value:d}; several pages are read if they are upright, 1")
    else:
        return
    raise BandsError(f"{count} pages of {values} are no bands; expected each page in a file of its own")


# --- PNG of 16 bits a colour, of which Pillow gives 8 ---


def _read_png(path: ImageFile) -> np.ndarray:
    from torchvision.io import ImageReadMode, decode_image, read_file

    content = (
        torch.frombuffer(bytearray(path.content), dtype=torch.uint8) if isinstance(path, Encoded) else read_file(path)
    )
    return decode_image(content, ImageReadMode.UNCHANGED, apply_exif_orientation=True).permute(1, 2, 0).numpy()


# --- DICOM ---


def _read_dicom(path: ImageFile) -> np.ndarray:
    """Reads a picture in the units of its modality, by RescaleSlope and RescaleIntercept or its table; bright is large."""
    pydicom = package("pydicom", "dicom", path)
    try:
        data = pydicom.dcmread(stream(path))
        _refuse_frames(data)
        values = data.pixel_array
        if data.PhotometricInterpretation == "MONOCHROME1":  # the least value is white
            values = (-1 if data.PixelRepresentation else 2**data.BitsStored - 1) - values.astype(np.int64)
            values = values.astype(data.pixel_array.dtype)
        return as_bands(pydicom.pixels.apply_modality_lut(values, data))
    except (pydicom.errors.InvalidDicomError, AttributeError, KeyError, RuntimeError) as error:
        raise OSError(str(error)) from error


def _dicom_header(path: ImageFile) -> tuple[tuple[int, int], str]:
    pydicom = package("pydicom", "dicom", path)
    try:
        data = pydicom.dcmread(stream(path), stop_before_pixels=True)
        _refuse_frames(data)
        scaled = "RescaleSlope" in data or "ModalityLUTSequence" in data
        dtype = "float64" if scaled else f"{'' if data.PixelRepresentation else 'u'}int{data.BitsAllocated}"
        return _described((data.Rows, data.Columns, data.get("SamplesPerPixel", 1)), dtype)
    except (pydicom.errors.InvalidDicomError, AttributeError, KeyError) as error:
        raise OSError(str(error)) from error


def _refuse_frames(data: Any) -> None:
    frames = int(data.get("NumberOfFrames") or 1)
    if frames > 1:
        raise BandsError(f"{frames} frames; expected one picture a file")
