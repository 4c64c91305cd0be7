"""Hugging Face `datasets` on disk, and those that `sslctl pack` writes: memory-mapped, opened at once, read image by image."""

import hashlib
import importlib.util
import json
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sslctl.data import files
from sslctl.data.description import describe, refuse_bands, value_range
from sslctl.data.encoded import Encoded, ImageFile
from sslctl.data.folders import FileKeys
from sslctl.data.layout import Layout
from sslctl.data.listing import Listing, existing_folder
from sslctl.data.mapped_table import MappedTable
from sslctl.data.packed_columns import columns_of, labels_of
from sslctl.data.packed_folder import read_pack, refuse_others, split_folder, state_of
from sslctl.data.pixels import Reading
from sslctl.data.source import Source
from sslctl.errors import InputError, first_line
from sslctl.runs.file_list import FileList

_MEASURED = 1_000  # images whose values are looked at for their range
_SAMPLED = 256  # images whose headers are read where nothing says what they are
_INSTALL = "dataset=hf needs Hugging Face datasets: pip install 'sslctl[hf]'"


@dataclass
class Opened:
    """One split on disk. It is opened where it is first read, in each process, and never copied into memory."""

    path: Path
    _table: MappedTable | None = field(default=None, repr=False)

    def __getstate__(self) -> dict:
        return {"path": self.path, "_table": None}

    def rows(self, start: int, stop: int) -> Any:
        """Returns rows as a pyarrow table."""
        if self._table is None:
            self._table = MappedTable(self.path)
        return self._table.rows(start, stop)


@dataclass(frozen=True)
class PackedImages(Source):
    """column: of the images. is_pixels: whether it holds (C, H, W) arrays, else encoded images. places: (N,) their rows."""

    opened: Opened | None = None
    column: str = ""
    is_pixels: bool = False
    places: Tensor | None = None
    per_sample: ClassVar[tuple[str, ...]] = (*Source.per_sample, "places")

    def _read_file(self, index: int) -> Tensor:
        row = int(self.places[index])
        cell = self.opened.rows(row, row + 1)[self.column]
        if self.is_pixels:
            return torch.from_numpy(_arrays(cell)[0].copy())
        return files.read(_file(cell, self.opened.path, row), self.reading)

    def describe(self, index: int) -> str:
        """Returns how to find an image again: by its row."""
        return f"{self.opened.path}#{int(self.places[index])}"


def hf(
    split: str,
    root: str | None,
    image_size: int | list[int] | None,
    channels: int,
    memory_gb: float,
    columns: dict[str, str | None] | None = None,
    splits: dict[str, str] | None = None,
    range: int | list[float] | None = None,
    bands: list[int] | None = None,
    verify: bool = False,
) -> Source:
    """Reads a folder that Dataset.save_to_disk, DatasetDict.save_to_disk or `sslctl pack` wrote.

    columns: {image, label, group} of it, null for none; None: the first column of images, and by their names. splits: the names
    of its splits that "train" and "test" are. verify: whether a pack's content is compared with the hashes it was written with.
    """
    own = _open(split, existing_folder(root), columns, splits, verify)
    # What the images are: arrays of one size, which memory may hold, or files, of which the headers of some say it.
    keys = FileKeys(root, image_size, channels, memory_gb, bands=bands)
    count, reading, images = len(own.labels), keys.reading(), None
    if own.is_pixels:
        feature = own.data.features[own.column]
        headers = _of_pixels(feature, count, reading, own.base)
        if count * math.prod(feature.shape) <= memory_gb * 2**30:
            images = torch.from_numpy(np.concatenate([_arrays(c) for c in _chunks(own.table, own.column, count)]))
    else:
        headers = files.read_headers(_some(own.table, own.column, own.folder, _SAMPLED), reading.takes_colours)
        refuse_bands(headers.kinds, reading)
        values = value_range(
            range, headers.kinds, lambda: files.measure_range(_training_files(own.base, splits, own.column), reading)
        )
        reading = replace(reading, value_range=values)
    size = keys.size() or headers.small_square() or 224
    # What tells them from others: their files, and how these are read.
    written = own.pack["splits"].get(own.folder.name) if own.pack else None
    stored = written["files"] if written else state_of(own.folder)
    content = [stored, channels, reading.value_range, bands]
    sizes = {name: size for name, (size, _) in stored.items()} if written else dict(stored[1])
    return PackedImages(
        own.pack["name"] if own.pack else own.base.resolve().name,
        split,
        images,
        (),
        own.labels,
        own.layout.classes,
        channels,
        size,
        hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest(),
        description=describe(own.layout, headers, images, reading, size),
        targets=own.targets,
        groups=own.groups,
        size_is_asked=image_size is not None,
        reading=reading,
        file_list=FileList(tuple(sizes), tuple(sizes.values()), are_rows=False),
        opened=Opened(own.folder),
        column=own.column,
        is_pixels=own.is_pixels,
        places=torch.arange(count),
    )


@dataclass(frozen=True)
class PackedFiles:
    """The encoded images of a split, read one by one, as one looks at files."""

    opened: Opened
    column: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> ImageFile:
        return _file(self.opened.rows(row, row + 1)[self.column], self.opened.path, row)


def packed_files(
    split: str, root: str | None, columns: dict[str, str | None] | None, splits: dict[str, str] | None
) -> tuple[Layout, PackedFiles]:
    """Returns what a split is, without a look at its images, and these. Raises InputError where they are arrays."""
    own = _open(split, existing_folder(root), columns, splits, verify=False)
    if own.is_pixels:
        raise InputError(f"{own.base} holds arrays of pixels, of which there are no files to look at")
    if own.targets is not None:
        several = [tuple(row.nonzero()[:, 0].tolist()) for row in own.targets]
        own = replace(own, layout=replace(own.layout, targets=several))
    return own.layout, PackedFiles(Opened(own.folder), own.column, len(own.labels))


# --- Opening ---


@dataclass(frozen=True)
class _Split:
    """A split on disk. pack: what sslctl pack wrote of it, None where another program did. column: of the images."""

    base: Path
    folder: Path
    pack: dict | None
    data: Any
    table: Any
    column: str
    is_pixels: bool
    labels: Tensor
    targets: Tensor | None
    groups: Tensor | None
    layout: Layout


def _open(
    split: str,
    base: Path,
    columns: dict[str, str | None] | None,
    splits: dict[str, str] | None,
    verify: bool,
) -> _Split:
    refuse_others(base)
    folder, origin = split_folder(base, split, splits)
    pack = read_pack(base, verify)
    data = _load(folder)
    chosen = columns_of(data.features, base, columns)
    is_pixels = type(data.features[chosen["image"]]).__name__ != "Image"
    table = data.with_format("arrow")
    labels, targets, classes = labels_of(data, table, chosen["label"], base)
    groups = None
    if chosen["group"]:
        values = np.array([str(value) for value in table[:][chosen["group"]].to_pylist()])
        groups = torch.from_numpy(np.unique(values, return_inverse=True)[1])
    read = f"columns: image {chosen['image']}, label {chosen['label'] or 'none'}, group {chosen['group'] or 'none'}"
    origin = f"{origin}; {read}: dataset.columns={{image: …, label: …, group: …}} names others"
    doubts = [f"one class ({classes[0]}): whatever is asked, every answer is right"] if len(classes) == 1 else []
    layout = Layout(Listing(folder, [], {}), [""] * len(data), labels.tolist(), classes, origin, doubts)
    return _Split(base, folder, pack, data, table, chosen["image"], is_pixels, labels, targets, groups, layout)


def _load(folder: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(_INSTALL) from None
    try:
        return datasets.Dataset.load_from_disk(str(folder))
    except Exception as error:  # of pyarrow, json, datasets: whatever a damaged file makes of them
        raise InputError(f"{folder} cannot be opened as a dataset: {first_line(error)}") from error


def refuse_without_datasets() -> None:
    """Raises InputError where Hugging Face datasets is not installed."""
    if importlib.util.find_spec("datasets") is None:
        raise InputError(_INSTALL)


# --- Images ---


def _file(cells: Any, folder: Path, row: int) -> ImageFile:
    """Returns the image of a row: its bytes, or the path that it names."""
    cell = cells[0].as_py()
    if cell["bytes"] is None:
        return str(folder / cell["path"])
    return Encoded("/".join([f"{folder}#{row}", *([Path(cell["path"]).name] if cell["path"] else [])]), cell["bytes"])


def _some(table: Any, column: str, folder: Path, most: int) -> list[ImageFile]:
    """Returns images spread over a table."""
    rows = np.linspace(0, len(table) - 1, min(len(table), most)).astype(int).tolist()
    return [_file(table[row : row + 1][column], folder, row) for row in rows]


def _training_files(base: Path, splits: dict[str, str] | None, column: str) -> list[ImageFile]:
    """Returns some training images, whose values a range is measured on."""
    folder = split_folder(base, "train", splits)[0]
    return _some(_load(folder).with_format("arrow"), column, folder, _MEASURED)


def _of_pixels(feature: Any, count: int, reading: Reading, base: Path) -> files.Headers:
    """Describes arrays as headers describe files. Raises InputError for those that are no images of so many channels."""
    bands, height, width = feature.shape
    if bands != reading.channels or reading.bands is not None:
        raise InputError(f"{base} has pixels of {bands} channels: dataset.channels={bands}, without dataset.bands")
    if feature.dtype != "uint8":
        raise InputError(f"{base} has pixels of {feature.dtype}; expected uint8, or a column of datasets.Image")
    return files.Headers(Counter({(width, height): count}), Counter({f"uint8×{bands}": count}))


def _arrays(cells: Any) -> np.ndarray:
    """Returns a column of arrays as (n, C, H, W)."""
    chunks = getattr(cells, "chunks", [cells])
    return np.concatenate([np.asarray(chunk.to_numpy(zero_copy_only=False)) for chunk in chunks])


def _chunks(table: Any, column: str, count: int) -> Any:
    return (table[start : min(start + 1000, count)][column] for start in range(0, count, 1000))
