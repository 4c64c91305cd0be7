"""Where images come from. A source is a list of images with labels, in memory or as files; splits never overlap."""

import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.data import files, listing
from sslctl.data.binary import read_cifar, read_idx
from sslctl.data.description import Description, describe, value_range
from sslctl.data.downloads import data_home, download_by
from sslctl.data.layout import Layout, base_name, class_folders, without_labels
from sslctl.data.modality import IMAGES, Modality
from sslctl.data.sampler import permuted
from sslctl.data.unreadable import readable
from sslctl.errors import InputError
from sslctl.random import Key


@dataclass(frozen=True)
class Source:
    """One split of a dataset.

    images: (N, C, H, W) uint8 in memory, or None and `paths` to read. labels: (N,) int64, -1 where unknown. image_size: side
    in pixels that the backbone sees. channels: 1 or 3.
    """

    name: str
    split: str
    images: Tensor | None
    paths: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]
    channels: int
    image_size: int
    content_hash: str  # of what was loaded, or of the list of files with their sizes
    mtime_hash: str = ""  # when the files were: a hash of their times
    original_rows: tuple[int, ...] = ()  # of a subset's samples in the whole split
    description: Description | None = None  # of files: what was inferred of them
    value_range: tuple[float, float] | None = None  # that becomes 0 and 255, of files of more than 8 bits
    targets: Tensor | None = None  # (N, C) bool, where an image may have several labels: `labels` are -1 then
    groups: Tensor | None = None  # (N,) int64, what each image was taken from, where that is named
    modality: ClassVar[Modality] = IMAGES
    tokenizer: ClassVar[str] = ""  # of texts, as JSON
    per_sample: ClassVar[tuple[str, ...]] = (
        "images",
        "paths",
        "labels",
        "targets",
        "groups",
    )  # with an entry for each sample

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def version(self) -> str:
        """Names the images as they are now: files that were written again may hold others."""
        return self.content_hash + self.mtime_hash

    @property
    def labelled(self) -> bool:
        return len(self.classes) > 0 and bool((self.labels >= 0).all())

    @property
    def has_several(self) -> bool:
        """Tells whether an image may have several labels."""
        return self.targets is not None

    def labelled_part(self) -> "Source":
        """Returns the images that have a label, where some have and others have none; else all."""
        labelled = self.labels >= 0
        return self.subset(labelled.nonzero()[:, 0]) if self.classes and labelled.any() and not labelled.all() else self

    @property
    def in_memory(self) -> Tensor | None:
        """Returns all samples (N, …) where they are held in memory: images (N, C, H, W) uint8."""
        return self.images

    @property
    def all_of_one_size(self) -> bool:
        """Tells whether every image is known to have the backbone's size."""
        return self.images is not None and self.images.shape[2:] == (self.image_size, self.image_size)

    def read(self, index: int) -> Tensor:
        """Reads one image as (C, H, W) uint8."""
        return self.images[index] if self.images is not None else self._read_file(index)

    def _read_file(self, index: int) -> Tensor:
        return files.read(self.paths[index], self.channels, self.value_range)

    def sample(self, index: int, key: Key) -> list[Tensor]:
        """Reads the images of one sample, which share a crop. key: of this one sample."""
        return [self.read(index)]

    def summary(self) -> str:
        """Returns what there is, for the plan."""
        return f"{len(self):,} images of {self.channels}×{self.image_size}×{self.image_size}"

    def data_lines(self) -> list[str]:
        """Returns what was inferred of the data, for the plan: classes, split, sizes, pixels, what is left out, warnings."""
        first, more = ", ".join(self.classes[:4]), len(self.classes) - 4
        of = (
            f"{len(self.classes)} classes: {first}{f' and {more} others' if more > 0 else ''}"
            if self.classes
            else "no labels"
        )
        if self.targets is not None:
            of += f"; an image has {self.targets.sum(1).double().mean():.2g} of them on average"
        if self.groups is not None:
            of += f"; {len(self.groups.unique()):,} groups"
        return [of, *(self.description.lines() if self.description else [])]

    def as_json(self) -> dict[str, Any]:
        """Returns what this data is, as plain values, for data.json of a run."""
        named = {name: getattr(self, name) for name in ("name", "split", "channels", "image_size", "content_hash")}
        described = self.description.as_json() if self.description else {}
        return named | {"samples": len(self), "classes": list(self.classes)} | described

    def describe(self, index: int) -> str:
        """Returns how to find an image again: its path, or its number."""
        number = self.original_rows[index] if self.original_rows else index
        return self.paths[index] if self.paths else f"{self.name} {self.split} image {number}"

    def subset(self, rows: Tensor) -> "Source":
        """Returns the samples at rows (n,), in that order, as a source; its hash is of the content and the rows."""
        chosen = rows.tolist()
        parts = {name: _taken(getattr(self, name), rows) for name in self.per_sample}
        original_rows = tuple(self.original_rows[row] for row in chosen) if self.original_rows else tuple(chosen)
        digest = hashlib.blake2b(f"{self.content_hash} {chosen}".encode(), digest_size=16).hexdigest()
        return replace(self, **parts, original_rows=original_rows, content_hash=digest)


def _taken(values: Tensor | tuple | None, rows: Tensor) -> Tensor | tuple | None:
    """Returns the entries at rows; nothing stays nothing."""
    return values[rows] if isinstance(values, Tensor) else values and tuple(values[row] for row in rows.tolist())


def from_tensors(
    name: str, split: str, images: Tensor, labels: Tensor, classes: tuple[str, ...], image_size: int
) -> Source:
    digest = hashlib.blake2b(images.numpy().tobytes() + labels.numpy().tobytes(), digest_size=16).hexdigest()
    return Source(name, split, images, (), labels, classes, images.shape[1], image_size, digest)


def digits(split: str, image_size: int) -> Source:
    """scikit-learn's 1,797 scanned digits of 8×8 pixels, enlarged; a fixed fifth of them is the test split."""
    table = _table_of_digits()
    images = torch.from_numpy(table[:, :-1]).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, (image_size, image_size), mode="bilinear").round().to(torch.uint8)
    order = torch.from_numpy(permuted(np.arange(len(images)), len(images), seed=0, epoch=0))
    held_out = len(images) // 5
    rows = (order[:held_out] if split == "test" else order[held_out:]).sort().values
    labels = torch.from_numpy(table[:, -1])[rows].long()
    return from_tensors("digits", split, images[rows], labels, tuple("0123456789"), image_size)


@functools.cache
def _table_of_digits() -> np.ndarray:
    """Reads 64 pixels and the label of each digit, once for all splits of a process."""
    package = Path(importlib.util.find_spec("sklearn").origin).parent  # found, not imported: that takes over a second
    return np.loadtxt(package / "datasets/data/digits.csv.gz", delimiter=",")


_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def fashion_mnist(split: str, image_size: int, root: str | None, download: bool) -> Source:
    """Fashion-MNIST from idx files (plain or gzip): Debian's dataset-fashion-mnist, a folder, or torchvision's download."""
    debian = Path("/usr/share/datasets/fashion-mnist")
    default = debian if debian.is_dir() else data_home()
    base = listing.existing_folder(root, download) if root is not None else default
    stem = {"train": "train", "test": "t10k"}[split]
    folder = next(
        (d for d in (base, base / "FashionMNIST" / "raw") if list(d.glob(f"{stem}-images-idx3-ubyte*"))), None
    )
    if folder is None:
        if not download:
            raise InputError(f"no {stem}-images-idx3-ubyte[.gz] in {base} (dataset.download=true would fetch it)")
        import torchvision

        download_by("Fashion-MNIST", base, lambda: torchvision.datasets.FashionMNIST(str(base), download=True))
        folder = base / "FashionMNIST" / "raw"
    images = read_idx(folder / f"{stem}-images-idx3-ubyte", dimensions=3)[:, None]
    labels = read_idx(folder / f"{stem}-labels-idx1-ubyte", dimensions=1).long()
    if len(images) != len(labels):
        raise InputError(f"{folder} holds {len(images)} {stem} images and {len(labels)} labels")
    return from_tensors("fashion_mnist", split, images, labels, _FASHION, image_size)


_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(split: str, image_size: int, root: str | None, download: bool, memory_gb: float) -> Source:
    """Reads CIFAR-10 from its binary version (data_batch_1.bin …), or from train/<class>/ and test/<class>/ folders of images.

    The Python version is not read: it is a pickle.
    """
    base = listing.existing_folder(root, download) if root is not None else data_home()
    if (base / "train").is_dir():
        return imagefolder(split, str(base), image_size, 3, memory_gb, name="cifar10")
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] if split == "train" else ["test_batch.bin"]
    folder = next((d for d in (base, base / "cifar-10-batches-bin") if (d / names[0]).exists()), None)
    if folder is None:
        if not download:
            raise InputError(f"no {names[0]} in {base}, and no train/ folder (dataset.download=true would fetch it)")
        from torchvision.datasets.utils import download_and_extract_archive

        url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
        md5 = "c32a1d4ab5d03f1284b67883e8d87530"
        download_by(url, base, lambda: download_and_extract_archive(url, str(base), md5=md5))
        folder = base / "cifar-10-batches-bin"
    rows = np.concatenate([read_cifar(folder / name) for name in names])  # (N, 1 + 3072)
    images = torch.from_numpy(rows[:, 1:].copy()).view(-1, 3, 32, 32)
    return from_tensors("cifar10", split, images, torch.from_numpy(rows[:, 0].astype(np.int64)), _CIFAR10, image_size)


def imagefolder(
    split: str,
    root: str | None,
    image_size: int | None,
    channels: int,
    memory_gb: float,
    name: str | None = None,
    splits: Mapping[str, str] | None = None,
    label: str | None = None,
    range: int | list[float] | None = None,
    on_error: str = "raise",
    max_bad: float = 0.01,
) -> Source:
    """Reads class folders: root/train/<class>/… and root/test/<class>/… (or val/), or root/<class>/… alone.

    Without a test folder, a fixed fifth of the images, drawn by the hash of their names, is the test split and is never
    trained on. image_size None: that of most images when they are small squares, else 224. splits, label: see
    `layout.class_folders`. range: of values of more than 8 bits, see `value_range`. on_error, max_bad: see
    `readable`.
    """
    lay_out = functools.partial(class_folders, root=root, splits=splits, label=label)
    lay_out = readable(lay_out, on_error, max_bad, data_home() / "checked")
    return from_files(name or base_name(root), split, lay_out, image_size, channels, memory_gb, range)


def folder(
    split: str,
    root: str | None,
    image_size: int | None,
    channels: int,
    memory_gb: float,
    splits: Mapping[str, str] | None = None,
    label: str | None = None,
    range: int | list[float] | None = None,
    on_error: str = "raise",
    max_bad: float = 0.01,
) -> Source:
    """Reads all images below a folder, flat or nested, without labels; with those that label= finds in their names."""
    if label is None and split == "test":
        raise InputError(
            f"dataset=folder has no labels to evaluate on ({listing.existing_folder(root)}): name labelled data, with"
            " eval_dataset=… in sslctl pretrain, dataset=… elsewhere; or dataset.label=PATTERN takes them from file names"
        )

    def lay_out(part: str) -> Layout:
        return class_folders(part, root, splits, label) if label is not None else without_labels(root, splits)

    read = readable(lay_out, on_error, max_bad, data_home() / "checked")
    return from_files(base_name(root), split, read, image_size, channels, memory_gb, range)


def from_files(
    name: str,
    split: str,
    lay_out: Callable[[str], Layout],
    image_size: int | None,
    channels: int,
    memory_gb: float,
    range: int | list[float] | None,
) -> Source:
    """Makes a source of a split's files. lay_out: of a split's name; the training split's values are measured for both."""
    if channels not in (1, 3):
        raise InputError(f"dataset.channels={channels}: expected 1 or 3")
    layout = lay_out(split)
    paths, originals = layout.paths(), layout.paths(as_read=False)
    headers = files.read_headers(paths)
    values = value_range(range, headers.modes, lambda: (layout if split == "train" else lay_out("train")).paths())
    (width, height), most = headers.sizes.most_common(1)[0]
    small = width == height <= 96 and 2 * most > headers.looked_at
    if image_size is None:
        image_size = width if small else 224
    images = None
    if len(headers.sizes) == 1 and len(paths) * channels * width * height <= memory_gb * 2**30:
        images = files.read_all(paths, channels, (height, width), values)
    table = "\n".join(f"{n}\t{os.path.getsize(p)}" for n, p in zip(layout.names, originals, strict=True))
    table += f"\nvalues {values}" if values else ""
    table += f"\nlabels {layout.targets}" if layout.targets is not None else ""
    digest = hashlib.blake2b(table.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    times = hashlib.blake2b(
        " ".join(str(os.stat(p).st_mtime_ns) for p in originals).encode(), digest_size=16
    ).hexdigest()
    description = describe(layout, headers, images, channels, image_size, values)
    labels = torch.tensor(layout.labels)
    source = Source(name, split, images, tuple(paths), labels, layout.classes, channels, image_size, digest, times)
    targets = groups = None
    if layout.targets is not None:
        targets = torch.zeros(len(paths), len(layout.classes), dtype=torch.bool)
        for row, own in enumerate(layout.targets):
            targets[row, list(own)] = True
    if layout.groups is not None:
        groups = torch.from_numpy(np.unique(np.array(layout.groups), return_inverse=True)[1])
    return replace(source, description=description, value_range=values, targets=targets, groups=groups)
