"""From the files of a split to a source: their keys, what of them is inferred, and whether they are kept in memory."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslctl.data import files, tiles
from sslctl.data.description import describe, refuse_bands, value_range
from sslctl.data.downloads import data_home
from sslctl.data.layout import Layout
from sslctl.data.pixels import MOST_BANDS, Reading
from sslctl.data.source import Source
from sslctl.data.table import AUTO
from sslctl.data.unreadable import WHEN_READ, listed_rows, refuse_skipping, unreadable_rows, with_stand_ins
from sslctl.errors import InputError
from sslctl.ops.image_size import ImageSize, image_size_of
from sslctl.runs.file_list import FileList


@dataclass(frozen=True)
class FileKeys:
    """The keys of images in files, see configs/dataset/imagefolder.yaml.

    channels, 1 to 16: of grey or colour images 1 or 3, of others all their bands, or those that bands names, counted from 0.
    image_size: a side, or [height, width]; None: that of most images when they are small squares, else 224.
    range: of values of more than 8 bits, see `description.value_range`. on_error "skip": others stand in for at most max_bad
    files, a number or a share, that cannot be read; WHEN_READ: none does. skip: see `unreadable.listed_rows`. memory_gb: images
    of one size that fit are kept in memory. tiles: see `tiles.Tiling`.
    """

    root: str | None
    image_size: int | list[int] | None
    channels: int
    memory_gb: float
    range: int | list[float] | None = None
    on_error: str = "raise"
    max_bad: float = 0.01
    skip: str | None = None
    bands: list[int] | None = None
    tiles: Mapping[str, Any] | None = None

    def size(self) -> ImageSize | None:
        """Returns the size that is asked for. Raises InputError for what is none."""
        return None if self.image_size is None else image_size_of(self.image_size, "dataset.image_size")

    def reading(self) -> Reading:
        """Returns how files are read, but for the range of their values. Raises InputError for keys that disagree."""
        if not 1 <= self.channels <= MOST_BANDS:
            raise InputError(f"dataset.channels={self.channels}: expected 1 to {MOST_BANDS}")
        bands = None if self.bands is None else tuple(self.bands)
        if bands is not None and (len(bands) != self.channels or not all(type(b) is int and b >= 0 for b in bands)):
            raise InputError(f"dataset.bands={self.bands}: expected dataset.channels={self.channels} numbers from 0 on")
        return Reading(self.channels, None, bands)


@dataclass(frozen=True)
class FolderKeys(FileKeys):
    """Those of a folder. splits, label: see `layout.class_folders`."""

    splits: Mapping[str, str] | None = None
    label: str | None = None


@dataclass(frozen=True)
class TableKeys(FileKeys):
    """Those of a table. columns, splits, separator: see `table_layout.table_rows`."""

    columns: Mapping[str, Any] | None = None
    splits: Mapping[str, Any] | None = None
    separator: str | None = AUTO


def from_files(name: str, split: str, lay_out: Callable[[str], Layout], keys: FileKeys) -> Source:
    """Makes a source of a split's files. lay_out: of a split's name; the training split's values are measured for both."""
    refuse_skipping(keys.on_error, keys.max_bad)
    skips, reading = keys.on_error in ("skip", WHEN_READ) or keys.skip is not None, keys.reading()
    layout = lay_out(split)
    if keys.tiles is not None:
        return _from_tiles(name, split, layout, lay_out, keys)
    originals = layout.paths()

    # What the headers say, and the range of values, which is that of the training images in every split.
    headers = files.read_headers(originals, reading.takes_colours, skips)
    refuse_bands(headers.kinds, reading)
    trained = layout if split == "train" else None
    values = value_range(
        keys.range, headers.kinds, lambda: files.measure_range((trained or lay_out("train")).paths(), reading, skips)
    )
    reading = replace(reading, value_range=values)
    image_size = keys.size() or headers.small_square() or 224

    # Decoded once: into memory where they fit, else, to see which cannot be, unless that is known of files of these times.
    images, bad = None, []
    (width, height), _ = headers.sizes.most_common(1)[0]
    size = len(originals) * reading.channels * width * height * reading.dtype.itemsize
    if len(headers.sizes) == 1 and size <= keys.memory_gb * 2**30:
        images, bad = files.read_all(originals, reading, (height, width), skips)
    elif keys.on_error == "skip":
        bad = unreadable_rows(originals, reading, data_home() / "checked")
    skipped_rows = listed_rows(originals, keys.skip)
    others = sorted({*bad} - {*skipped_rows})
    if others and keys.on_error != "skip":
        way = "dataset.on_error=skip"
        raise InputError(f"cannot read {originals[others[0]]}; {way} lets others stand in for such, too", advice=[way])
    allowed = keys.max_bad if keys.max_bad >= 1 or not skipped_rows else int(keys.max_bad * len(originals))
    as_listed = layout  # what tells sets of files apart, whatever stands in
    layout = with_stand_ins(layout, sorted({*bad, *skipped_rows}), allowed + len(skipped_rows))
    if images is not None and layout.stand_ins:
        images[list(layout.stand_ins)] = images[list(layout.stand_ins.values())]

    digest, times = _hashes(as_listed, originals, reading)
    description = describe(layout, headers, images, reading, image_size)
    paths, labels = tuple(layout.paths()), torch.tensor(layout.labels)
    source = Source(name, split, images, paths, labels, layout.classes, keys.channels, image_size, digest, times)
    targets, groups = _targets(layout), _groups(layout.groups)
    file_list = FileList(tuple(layout.names), tuple(map(os.path.getsize, originals)), frozenset(layout.stand_ins))
    source = replace(source, description=description, size_is_asked=keys.image_size is not None, reading=reading)
    return replace(source, file_list=file_list, targets=targets, groups=groups)


def _from_tiles(name: str, split: str, layout: Layout, lay_out: Callable[[str], Layout], keys: FileKeys) -> tiles.Tiles:
    """Makes a source whose samples are the tiles of a split's images. Those of one image are in one split."""
    if keys.on_error == "skip" or keys.skip is not None:
        raise InputError("on_error=skip and skip= let images stand in for others, not tiles: leave dataset.tiles away")
    tiling, cache = tiles.Tiling.of(keys.tiles), data_home()
    grid = tiles.lay_tiles(layout.paths(), tiling, cache / "decoded")
    reading = keys.reading()
    refuse_bands(grid.headers.kinds, reading)

    def measure() -> tuple[float, float]:
        trained = grid if split == "train" else tiles.lay_tiles(lay_out("train").paths(), tiling, cache / "decoded")
        return tiles.measured_range(trained, tiling, reading)

    reading = replace(reading, value_range=value_range(keys.range, grid.headers.kinds, measure))
    laid, image_size = len(grid.tiles), keys.size() or (tiling.size if tiling.size <= 96 else 224)
    grid = tiles.without_empty(grid, tiling, reading, cache / "checked")
    images = tiles.in_memory(grid, tiling, reading, keys.memory_gb)
    digest, times = _hashes(layout, layout.paths(), reading, f"{tiling} {len(grid.tiles)}")
    described = describe(layout, grid.headers, images, reading, image_size, tiles.sentence(grid, laid, tiling))
    rows, places = zip(*grid.tiles, strict=True)
    originals, targets = layout.paths(), _targets(layout)
    return tiles.Tiles(
        name,
        split,
        images,
        tuple(originals[row] for row in rows),
        torch.tensor([layout.labels[row] for row in rows]),
        layout.classes,
        keys.channels,
        image_size,
        digest,
        times,
        description=described,
        size_is_asked=keys.image_size is not None,
        reading=reading,
        file_list=FileList(tuple(layout.names), tuple(map(os.path.getsize, originals)), are_rows=False),
        targets=None if targets is None else targets[list(rows)],
        groups=_groups([layout.groups[row] for row in rows]) if layout.groups else torch.tensor(rows),
        stores=tuple(grid.stores[row] for row in rows),
        places=places,
        tile=tiling.size,
    )


def _targets(layout: Layout) -> Tensor | None:
    """Returns which labels each image has, (N, C) bool, where it may have several."""
    if layout.targets is None:
        return None
    targets = torch.zeros(len(layout.targets), len(layout.classes), dtype=torch.bool)
    for row, own in enumerate(layout.targets):
        targets[row, list(own)] = True
    return targets


def _groups(names: list[str] | None) -> Tensor | None:
    """Returns the number of each image's group, (N,)."""
    return torch.from_numpy(np.unique(np.array(names), return_inverse=True)[1]) if names else None


def _hashes(layout: Layout, paths: list[str], reading: Reading, tiled: str = "") -> tuple[str, str]:
    """Returns hashes of names and sizes, which tell sets of files apart, and of their times, by which features stay valid."""
    table = "\n".join(f"{n}\t{os.path.getsize(p)}" for n, p in zip(layout.names, paths, strict=True))
    table += f"\nvalues {reading.value_range}" if reading.value_range else ""
    table += f"\nbands {reading.bands}" if reading.bands is not None else ""
    if layout.labels_apart:  # another label, class or group makes other data of the same files
        table += f"\nlabels {layout.targets or layout.labels} {layout.classes}"
        table += f"\ngroups {layout.groups}" if layout.groups else ""
    table += f"\ntiles {tiled}" if tiled else ""
    times = " ".join(str(os.stat(p).st_mtime_ns) for p in paths)
    digests = (
        hashlib.blake2b(t.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest() for t in (table, times)
    )
    return tuple(digests)
