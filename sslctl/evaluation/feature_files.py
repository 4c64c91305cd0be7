"""Files of features, written a batch at a time: npz, csv and parquet with the same columns."""

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from sslctl.errors import InputError, user_path

_GROUP = 64 * 2**20  # bytes of features in a row group of parquet


@dataclass(frozen=True)
class About:
    """What a file says of all its rows. origin: where its features come from, as JSON. tiled: whether rows have places."""

    rows: int
    width: int
    classes: tuple[str, ...]
    origin: str
    tiled: bool = False


@dataclass(frozen=True)
class Rows:
    """Some rows, in order. features: (n, D) float32; index: (n,) of the images in their split; labels: (n,), -1 unknown.

    places: (n, 2) top and left of tiles in the images that are named.
    """

    features: np.ndarray
    index: np.ndarray
    labels: np.ndarray
    names: list[str]
    split: str
    places: np.ndarray | None = None


Writer = Callable[[Rows], None]


@contextmanager
def npz(path: Path, about: About) -> Iterator[Writer]:
    """Writes features (N, D), labels, index, split, names, classes, and about as JSON: numpy.load(path), without pickles.

    Of tiles, top and left (N,) as well.

    The features go straight into the archive; what is kept until the end is a number and a reference for each row.
    """
    written: list[Rows] = []
    nothing = np.empty((0, about.width), np.float32)  # a slice of a batch's features would keep them all
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        # The header says the shape, so that rows can follow one batch after the other.
        with archive.open("features.npy", "w", force_zip64=True) as opened:
            _header(opened, (about.rows, about.width), np.dtype("<f4"))

            def write(rows: Rows) -> None:
                opened.write(np.ascontiguousarray(rows.features, "<f4"))
                written.append(replace(rows, features=nothing))

            yield write
        # Text columns have one width, that of the longest name, which is known only now.
        longest = max(len(name) for rows in written for name in rows.names)
        places = (("top", "<i8", lambda rows: rows.places[:, 0]), ("left", "<i8", lambda rows: rows.places[:, 1]))
        for name, dtype, part in (
            *(places if about.tiled else ()),
            ("labels", "<i8", lambda rows: rows.labels),
            ("index", "<i8", lambda rows: rows.index),
            ("split", "<U5", lambda rows: [rows.split] * len(rows.names)),
            ("names", f"<U{longest}", lambda rows: rows.names),
        ):
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as opened:
                _header(opened, (about.rows,), np.dtype(dtype))
                for rows in written:
                    opened.write(np.array(part(rows), dtype).tobytes())
        for name, array in (("classes", np.array(about.classes, str)), ("about", np.array(about.origin))):
            entry = io.BytesIO()
            np.lib.format.write_array(entry, array, allow_pickle=False)
            archive.writestr(f"{name}.npy", entry.getvalue())


def _header(opened: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    header = {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    np.lib.format.write_array_header_1_0(opened, header)


@contextmanager
def comma_separated(path: Path, about: About) -> Iterator[Writer]:
    """Writes name, split, index, label, class, then f0, f1, … with the nine digits that give a float32 back.

    Of tiles, top and left come before f0, also in Parquet.
    """
    with path.open("w", newline="", encoding="utf-8") as opened:
        lines = csv.writer(opened)
        own = ("top", "left") if about.tiled else ()
        lines.writerow(["name", "split", "index", "label", "class", *own, *(f"f{i}" for i in range(about.width))])

        def write(rows: Rows) -> None:
            places = rows.places.tolist() if about.tiled else [()] * len(rows.names)
            own = zip(
                rows.names, rows.index.tolist(), rows.labels.tolist(), places, rows.features.tolist(), strict=True
            )
            for name, index, label, place, values in own:
                first = [name, rows.split, index, label, _class(about, label), *place]
                lines.writerow([*first, *(f"{v:.9g}" for v in values)])

        yield write


def _class(about: About, label: int) -> str:
    return about.classes[label] if label >= 0 else ""


@contextmanager
def parquet(path: Path, about: About) -> Iterator[Writer]:
    """Writes name, split, index, label, class, and features as lists of D float32; classes and about in the metadata."""
    arrow, files = import_pyarrow()
    schema = arrow.schema(
        [
            ("name", arrow.string()),
            ("split", arrow.string()),
            ("index", arrow.int64()),
            ("label", arrow.int64()),
            ("class", arrow.string()),
            *((name, arrow.int64()) for name in ("top", "left") if about.tiled),
            ("features", arrow.list_(arrow.float32(), about.width)),
        ],
        metadata={"classes": json.dumps(about.classes, ensure_ascii=False), "about": about.origin},
    )
    # Batches wait until they fill a row group: readers take a group at a time, and a group a batch would be many small ones.
    waiting: list[Any] = []

    with path.open("wb") as opened, files.ParquetWriter(opened, schema) as writer:  # whose own paths are UTF-8 alone

        def flush() -> None:
            writer.write_table(arrow.Table.from_batches(waiting, schema), row_group_size=2**30)
            waiting.clear()

        def write(rows: Rows) -> None:
            flat = arrow.array(rows.features.reshape(-1), arrow.float32())
            columns = [
                arrow.array(rows.names, arrow.string()),
                arrow.array([rows.split] * len(rows.names), arrow.string()),
                arrow.array(rows.index),
                arrow.array(rows.labels),
                arrow.array([_class(about, label) for label in rows.labels.tolist()], arrow.string()),
                *(arrow.array(rows.places[:, axis]) for axis in (0, 1) if about.tiled),
                arrow.FixedSizeListArray.from_arrays(flat, about.width),
            ]
            waiting.append(arrow.record_batch(columns, schema=schema))
            if sum(len(batch) for batch in waiting) * about.width * 4 >= _GROUP:
                flush()

        yield write
        if waiting:
            flush()


def import_pyarrow(other: str = "format=npz") -> tuple[Any, Any]:
    """Imports pyarrow. Raises InputError where it is not installed. other: what the command can say instead."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        message = f"format=parquet needs pyarrow: pip install 'sslctl[parquet]', or {other}"
        raise InputError(message, advice=[other]) from None
    return pyarrow, pyarrow.parquet


def as_utf8(name: str) -> str:
    """Returns a name of a file with what is no UTF-8 in it escaped."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return name  # the source's own string: not one more for each row


def is_own(path: Path, kind: str) -> bool:
    """Tells whether a file is one of features, as the writer of its kind writes them."""
    if kind == "csv":
        with path.open("rb") as opened:
            return opened.readline(100).startswith(
                (b"name,split,index,label,class,f0", b"name,split,index,label,class,top,left,f0")
            )
    if kind == "npz":
        try:
            with zipfile.ZipFile(path) as archive:
                return {"features.npy", "about.npy"} <= set(archive.namelist())
        except (zipfile.BadZipFile, OSError):
            return False
    arrow, files = import_pyarrow()
    try:
        return b"about" in (files.read_schema(path).metadata or {})
    except (arrow.ArrowInvalid, OSError):
        return False


def refuse_missing(kind: str) -> None:
    """Raises InputError where a format's package is not installed."""
    if kind == "parquet":
        import_pyarrow()


WRITERS: dict[str, Callable[[Path, About], AbstractContextManager[Writer]]] = {
    "npz": npz,
    "csv": comma_separated,
    "parquet": parquet,
}


def chosen_format(config: Any, formats: Iterable[str]) -> str:
    """Returns the format of a file to write, as format= or the suffix of out= says, else the first. Raises InputError where the
    two say different ones."""
    suffix = user_path(config.out).suffix.removeprefix(".").lower() if config.out else ""
    if config.out and suffix not in formats:
        raise InputError(f"out={config.out}: expected a file ending in {', '.join(f'.{name}' for name in formats)}")
    if config.out and config.format and suffix != config.format:
        raise InputError(f"out={config.out} ends in .{suffix}, format={config.format}: let one of them be")
    return config.format or suffix or next(iter(formats))
