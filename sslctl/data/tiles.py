"""Huge images as tiles: each is a sample with a place of its own, read by its window and never the whole image."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sslctl.data import windows
from sslctl.data.files import UNREADABLE, Headers, ImageError
from sslctl.data.pixels import OF_PAGES, SIXTEEN_BITS, Reading, finite_range, from_array
from sslctl.data.source import Source
from sslctl.errors import InputError, reason_of
from sslctl.runs.atomic import write_text
from sslctl.views.maker import clean

_MEASURED = 1_000  # tiles whose values are looked at for their range
_EMPTY = 0.02  # of skip_empty=true


@dataclass(frozen=True)
class Tiling:
    """Squares of `size` pixels, `stride` apart, that lie wholly in their image.

    skip_empty: those are left out of which no band has a standard deviation of more than this, of values from 0 to 1.
    """

    size: int
    stride: int
    skip_empty: float | None = None

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> "Tiling":
        """Raises InputError for other keys and values than dataset.tiles takes."""
        tiles = dict(keys) if isinstance(keys, Mapping) else {"": keys}
        unknown = tiles.keys() - {"size", "stride", "skip_empty"}
        size, empty = tiles.get("size"), tiles.get("skip_empty")
        stride = tiles.get("stride") or size
        empty = {True: _EMPTY, False: None}.get(empty, empty) if isinstance(empty, bool) else empty
        whole = all(type(number) is int and number > 0 for number in (size, stride))
        if unknown or not whole or not (empty is None or (isinstance(empty, int | float) and 0 <= empty <= 1)):
            raise InputError(
                f"dataset.tiles={keys}: expected {{size: PIXELS, stride: PIXELS, skip_empty: true or a standard deviation}}"
            )
        return cls(size, stride, empty)

    def places(self, width: int, height: int) -> list[tuple[int, int]]:
        """Returns (top, left) of each tile of an image, row by row."""
        return [
            (top, left)
            for top in range(0, height - self.size + 1, self.stride)
            for left in range(0, width - self.size + 1, self.stride)
        ]


@dataclass(frozen=True)
class Tiles(Source):
    """paths: of each tile's image. stores: the file that it is read from. places: (top, left) of each tile in its image."""

    stores: tuple[str, ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    tile: int = 0
    per_sample: ClassVar[tuple[str, ...]] = (*Source.per_sample, "stores", "places")

    @property
    def all_of_one_size(self) -> bool:
        """Tells whether tiles have the backbone's size."""
        return self.tile == self.image_size

    def _read_file(self, index: int) -> Tensor:
        return read_tile(self.paths[index], self.stores[index], self.places[index], self.tile, self.reading)

    def describe(self, index: int) -> str:
        """Returns a tile's image and its place there, top and left."""
        top, left = self.places[index]
        return f"{self.paths[index]}#{top},{left}"


def read_tile(path: str, store: str, place: tuple[int, int], size: int, reading: Reading) -> Tensor:
    """Reads one tile of an image as (C, size, size), from the file that its windows are read from. Raises ImageError."""
    try:
        array = windows.read(store, *place, size)
        of_pages = array.shape[2] != reading.channels and windows.pages_in(path) > 1
        return from_array(array, reading, of_pages=of_pages)
    except UNREADABLE as error:
        raise _damaged(path, store, place, error) from error


def _damaged(path: str, store: str, place: tuple[int, int], error: Exception) -> ImageError:
    """Names a tile that cannot be read by its image and its place there."""
    decoded = "" if store == path else f"; it was decoded into {store}, which may be removed to have it decoded again"
    return ImageError(f"cannot read {path}#{place[0]},{place[1]}: {reason_of(error)}{decoded}")


@dataclass(frozen=True)
class Grid:
    """The tiles of a split: rows of its images, paths, with a place each. stores: the file of each that windows are read from."""

    headers: Headers
    paths: list[str]
    stores: list[str]
    tiles: list[tuple[int, tuple[int, int]]]

    def read_all(self, size: int, reading: Reading, use: Callable[[int, Tensor], None]) -> None:
        """Reads every tile, in threads, and hands it on with its number. Raises InputError for one that cannot be read."""

        def one(number: int) -> None:
            row, place = self.tiles[number]
            use(number, read_tile(self.paths[row], self.stores[row], place, size, reading))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                for _ in pool.map(one, range(len(self.tiles)), chunksize=16):
                    pass
            except ImageError as error:
                raise InputError(str(error)) from error


def lay_tiles(paths: list[str], tiling: Tiling, cache: Path) -> Grid:
    """Lays tiles over images. cache: the folder for images of formats without windows, which are decoded into it once.

    Raises InputError for an image that cannot be read, and where none is as large as a tile.
    """
    # Every image's size is needed, as it decides how many tiles it has; sizes of some would not do.
    stores, sizes, kinds, tiles = [], Counter(), Counter(), []
    for row, path in enumerate(paths):
        try:
            store = windows.store_of(path, cache)
            size, kind = windows.header(store)
            if store != path and windows.pages_in(path) > 1:
                kind += OF_PAGES
        except UNREADABLE as error:
            raise InputError(f"cannot read {path}: {error}") from error
        stores.append(store)
        sizes[size] += 1
        kinds[kind] += 1
        tiles += [(row, place) for place in tiling.places(*size)]
    if not tiles:
        (width, height), _ = sizes.most_common(1)[0]
        raise InputError(f"dataset.tiles.size={tiling.size}: no image is as large, most have {width}×{height} pixels")
    return Grid(Headers(sizes, kinds), paths, stores, tiles)


def count_tiles(paths: list[str], tiling: Tiling) -> int:
    """Counts the tiles of images by their headers, empty ones too. Raises what is in files.UNREADABLE."""
    return sum(len(tiling.places(*windows.size_of(path))) for path in paths)


def measured_range(grid: Grid, tiling: Tiling, reading: Reading) -> tuple[float, float]:
    """Returns the least and the largest value of some 1,000 tiles, spread over all that have more than 8 bits."""

    def values():
        for row, place in grid.tiles[:: max(1, len(grid.tiles) // _MEASURED)]:
            try:
                array = windows.read(grid.stores[row], *place, tiling.size)
            except UNREADABLE as error:
                raise _damaged(grid.paths[row], grid.stores[row], place, error) from error
            if array.dtype != np.uint8:
                yield array if reading.bands is None else array[..., list(reading.bands)]

    return finite_range(values()) or SIXTEEN_BITS


def without_empty(grid: Grid, tiling: Tiling, reading: Reading, cache: Path) -> Grid:
    """Leaves out tiles of (nearly) one value. All are read, once for files of these sizes and times.

    cache: the folder where it is kept which they are.
    """
    if tiling.skip_empty is None:
        return grid
    # To read all tiles takes as long as an epoch: the answer is kept under what it depends on.
    mark = hashlib.blake2b(f"{tiling} {reading}\n".encode(), digest_size=16)
    for store in grid.stores:
        stat = os.stat(store)
        mark.update(f"{store}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    answer = cache / f"tiles-{mark.hexdigest()}.json"
    try:
        full = [n for n in json.loads(answer.read_text()) if type(n) is int and 0 <= n < len(grid.tiles)]
    except (OSError, ValueError, TypeError):  # never asked before, or damaged
        spread = np.zeros(len(grid.tiles))

        def measure(number: int, tile: Tensor) -> None:
            spread[number] = clean(tile).flatten(1).std(1, correction=0).max()

        grid.read_all(tiling.size, reading, measure)
        full = np.flatnonzero(spread > tiling.skip_empty).tolist()
        cache.mkdir(parents=True, exist_ok=True)
        write_text(answer, json.dumps(full))
    if not full:
        raise InputError(f"dataset.tiles.skip_empty={tiling.skip_empty}: all {len(grid.tiles):,} tiles are empty")
    return replace(grid, tiles=[grid.tiles[number] for number in full])


def in_memory(grid: Grid, tiling: Tiling, reading: Reading, memory_gb: float) -> Tensor | None:
    """Returns all tiles (N, C, S, S) where they fit into so much memory."""
    shape = (len(grid.tiles), reading.channels, tiling.size, tiling.size)
    if np.prod(shape, dtype=np.int64) * reading.dtype.itemsize > memory_gb * 2**30:
        return None
    images = torch.empty(shape, dtype=reading.dtype)
    grid.read_all(tiling.size, reading, lambda number, tile: images[number].copy_(tile))
    return images


def sentence(grid: Grid, laid: int, tiling: Tiling) -> str:
    """Says of how many tiles a split is, for the plan. laid: the number before empty ones were left out."""
    images, empty = len(grid.stores), laid - len(grid.tiles)
    left_out = (
        f"; {empty:,} left out as empty (std up to {tiling.skip_empty:g})" if tiling.skip_empty is not None else ""
    )
    decoded = [store for store, path in zip(grid.stores, grid.paths, strict=True) if store != path]
    size = sum(map(os.path.getsize, decoded)) / 2**30
    kept = f"; {len(decoded):,} of them decoded into {os.path.dirname(decoded[0])}, {size:.2g} GiB" if decoded else ""
    return (
        f"{len(grid.tiles):,} tiles of {tiling.size}×{tiling.size}, {tiling.stride} apart, of {images:,}"
        f" image{'s' * (images != 1)}{kept}{left_out}; dataset.tiles={{size: …, stride: …, skip_empty: …}}"
    )
