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
from sslctl.data.layout import Layout, NoTestSplit, split_kind
from sslctl.data.listing import Listing, existing_folder
from sslctl.data.packed_columns import columns_of, labels_of
from sslctl.data.pixels import Reading
from sslctl.data.source import Source
from sslctl.errors import InputError, first_line, nearest
from sslctl.runs.checksums import digest_of_file

PACK = "sslctl-pack.json"  # beside the splits of a pack: what was written, to be compared with what is there
_MEASURED = 1_000  # images whose values are looked at for their range
_SAMPLED = 256  # images whose headers are read where nothing says what they are
_INSTALL = "dataset=hf needs Hugging Face datasets: pip install 'sslctl[hf]'"


@dataclass
class Opened:
    """One split on disk. It is opened where it is first read, in each process, and never copied into memory."""

    path: Path
    _rows: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict:
        return {"path": self.path, "_rows": None}

    def rows(self, start: int, stop: int) -> Any:
        """Returns rows as a pyarrow table."""
        if self._rows is None:
            self._rows = _load(self.path).with_format("arrow")
        return self._rows[start:stop]


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
    image_size: int | None,
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
    base = existing_folder(root)
    _refuse_others(base)
    folder, origin = _split_folder(base, split, splits)
    pack = _read_pack(base, verify)
    data = _load(folder)
    chosen = columns_of(data.features, base, columns)
    is_pixels = type(data.features[chosen["image"]]).__name__ != "Image"
    table = data.with_format("arrow")
    labels, targets, classes = labels_of(data, table, chosen["label"], base)
    groups = None
    if chosen["group"]:
        values = np.array([str(value) for value in table[:][chosen["group"]].to_pylist()])
        groups = torch.from_numpy(np.unique(values, return_inverse=True)[1])
    written = pack["splits"].get(folder.name) if pack else None
    # What the images are: arrays of one size, which memory may hold, or files, of which the headers of some say it.
    count, reading, images = len(data), FileKeys(root, image_size, channels, memory_gb, bands=bands).reading(), None
    if is_pixels:
        headers = _of_pixels(data.features[chosen["image"]], count, reading, base)
        if count * math.prod(data.features[chosen["image"]].shape) <= memory_gb * 2**30:
            images = torch.from_numpy(np.concatenate([_arrays(c) for c in _chunks(table, chosen["image"], count)]))
    else:
        headers = files.read_headers(_some(table, chosen["image"], folder, _SAMPLED), reading.takes_colours)
        refuse_bands(headers.kinds, reading)
        values = value_range(
            range, headers.kinds, lambda: files.measure_range(_training_files(base, splits, chosen["image"]), reading)
        )
        reading = replace(reading, value_range=values)
    size_is_asked, image_size = image_size is not None, image_size or headers.small_square() or 224
    # What is said of them, and what tells them from others.
    left = f"columns: image {chosen['image']}, label {chosen['label'] or 'none'}, group {chosen['group'] or 'none'}"
    origin = f"{origin}; {left}: dataset.columns={{image: …, label: …, group: …}} names others"
    doubts = [f"one class ({classes[0]}): whatever is asked, every answer is right"] if len(classes) == 1 else []
    layout = Layout(Listing(folder, [], {}), [""] * count, [], classes, origin, doubts)
    description = describe(layout, headers, images, reading, image_size)
    content = [written["files"] if written else _state(folder), channels, reading.value_range, bands]
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16)
    own = {"opened": Opened(folder), "column": chosen["image"], "is_pixels": is_pixels, "places": torch.arange(count)}
    own |= {"size_is_asked": size_is_asked, "reading": reading}
    own |= {"description": description, "targets": targets, "groups": groups}
    name = pack["name"] if pack else base.resolve().name
    return PackedImages(name, split, images, (), labels, classes, channels, image_size, digest.hexdigest(), **own)


# --- Which folder, and whether it is whole ---


def _refuse_others(base: Path) -> None:
    """Raises InputError for a folder of something else, above all of tar shards."""
    if (base / "dataset_dict.json").exists() or (base / "state.json").exists():
        return
    shards = sorted(file.name for pattern in ("*.tar", "*.tar.gz", "*.tgz") for file in base.glob(pattern))
    if shards:
        raise InputError(
            f"{base} holds {len(shards):,} tar files ({shards[0]}, …), which cannot be read image by image: unpack them into"
            " a folder, then `sslctl pack dataset=folder dataset.root=FOLDER out=PACK` writes what dataset=hf reads"
        )
    if (base / PACK).exists() or next(base.glob("*.arrow"), None):
        raise InputError(f"{base} is a damaged pack: dataset_dict.json is missing")
    raise InputError(
        f"{base} was not written by save_to_disk of Hugging Face datasets, nor by sslctl pack: it has neither"
        " dataset_dict.json nor state.json"
    )


def _split_folder(base: Path, split: str, splits: dict[str, str] | None) -> tuple[Path, str]:
    """Returns where a split lies, and the plan's words for it."""
    if (base / "state.json").exists():  # one Dataset
        if split == "test":
            raise NoTestSplit(f"{base} is one split alone: eval_dataset=… names labelled images to judge by")
        return base, f"all of {base}"
    try:
        names = json.loads((base / "dataset_dict.json").read_text())["splits"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{base}/dataset_dict.json is damaged: {first_line(error)}") from error
    if splits:
        other = next((kind for kind in splits if kind not in ("train", "test")), None)
        if other is not None or "train" not in splits:
            raise InputError(f"dataset.splits={splits}: expected {{train: SPLIT, test: SPLIT}}")
        unknown = next((name for name in splits.values() if name not in names), None)
        if unknown is not None:
            raise InputError(
                f"dataset.splits: {base} has no {unknown}; there are {', '.join(names)}{nearest(unknown, names)}"
            )
        chosen = splits.get(split)
    else:
        of_kind = {split_kind(name): name for name in reversed(names)}
        chosen = of_kind.get(split) or (
            of_kind.get("val") if split == "test" else names[0] if len(names) == 1 else None
        )
    if chosen is None:
        raise NoTestSplit(
            f"{base} has no {split} split among {', '.join(names)}: dataset.splits={{train: SPLIT, test: SPLIT}}"
        )
    return base / chosen, f"split {chosen} of {base}"


def _read_pack(base: Path, verify: bool) -> dict | None:
    """Returns what a pack says of itself, None where another program wrote it. Raises InputError where it is not whole."""
    if not (base / PACK).exists():
        if verify:
            raise InputError(f"dataset.verify=true: {base} has no hashes, sslctl pack did not write it")
        return None
    try:
        pack = json.loads((base / PACK).read_text())
        written = {name: facts for own in pack["splits"].values() for name, facts in own["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{base} is a damaged pack: {PACK} cannot be read") from error
    for name, (size, digest) in written.items():
        path = base / name
        if not path.exists() or path.stat().st_size != size:
            there = f"has {path.stat().st_size:,} bytes" if path.exists() else "is missing"
            raise InputError(f"{base} is a damaged pack: {name} {there}, {size:,} were written")
        if verify and digest_of_file(path) != digest:
            raise InputError(f"{base} is a damaged pack: {name} does not hold what was written (its hash differs)")
    return pack


def _state(folder: Path) -> list:
    """Returns what tells a foreign dataset's content: its fingerprint, its files and their sizes."""
    state = json.loads((folder / "state.json").read_text())
    return [
        state.get("_fingerprint"),
        [[f["filename"], (folder / f["filename"]).stat().st_size] for f in state["_data_files"]],
    ]


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
    folder = _split_folder(base, "train", splits)[0]
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
