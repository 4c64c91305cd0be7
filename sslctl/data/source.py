"""What a source is: a list of images with labels, in memory or as files; splits never overlap. Which there are: sources.py."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from sslctl.data import files
from sslctl.data.description import Description
from sslctl.data.modality import IMAGES, Modality
from sslctl.data.pixels import Reading
from sslctl.ops.image_size import ImageSize, height_width, shape_in_words
from sslctl.random import Key
from sslctl.runs.file_list import FileList
from sslctl.views.maker import clean

_MEASURED = 1_000  # images whose mean and std are measured


@dataclass(frozen=True)
class Source:
    """One split of a dataset.

    images: (N, C, H, W) in memory, uint8 or float32 in [0, 1] as `reading` says, or None and `paths` to read. labels: (N,) int64,
    -1 where unknown. image_size: that the backbone sees, in pixels: a side, or (height, width).
    """

    name: str
    split: str
    images: Tensor | None
    paths: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]
    channels: int
    image_size: ImageSize
    content_hash: str  # of what was loaded, or of the list of files with their sizes
    mtime_hash: str = ""  # when the files were: a hash of their times
    original_rows: tuple[int, ...] = ()  # of a subset's samples in the whole split
    description: Description | None = None  # of files: what was inferred of them
    targets: Tensor | None = None  # (N, C) bool, where an image may have several labels: `labels` are -1 then
    groups: Tensor | None = None  # (N,) int64, what each image was taken from, where that is named
    size_is_asked: bool = False  # image_size is what a key says of files, which tells nothing about them
    file_list: FileList | None = None  # that the content hash is of
    reading: Reading | None = None  # of files other than those of 8 bits that Pillow reads as grey or colours
    modality: ClassVar[Modality] = IMAGES
    tokenizer: ClassVar[str] = ""  # of texts, as JSON
    # What has an entry for each sample.
    per_sample: ClassVar[tuple[str, ...]] = ("images", "paths", "labels", "targets", "groups")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def version(self) -> str:
        """Names the images as they are now: files that were written again may hold others."""
        return self.content_hash + self.mtime_hash

    @property
    def classes_hash(self) -> str:
        """Returns a hash of the classes' names, in their order."""
        return hashlib.blake2b("\n".join(self.classes).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()

    @property
    def labelled(self) -> bool:
        return len(self.classes) > 0 and bool((self.labels >= 0).all())

    @property
    def has_several(self) -> bool:
        """Tells whether an image may have several labels."""
        return self.targets is not None

    @property
    def answers(self) -> Tensor:
        """Returns what is learned from labels: (N,) int64, or (N, C) bool where an image may have several."""
        return self.labels if self.targets is None else self.targets

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
        return self.images is not None and self.images.shape[2:] == height_width(self.image_size)

    def read(self, index: int) -> Tensor:
        """Reads one image as (C, H, W), uint8 or float32 in [0, 1]."""
        return self.images[index] if self.images is not None else self._read_file(index)

    def _read_file(self, index: int) -> Tensor:
        return files.read(self.paths[index], self.reading or Reading(self.channels))

    def statistics(self) -> tuple[list[float], list[float]]:
        """Measures mean and std of each channel, of some 1,000 images in [0, 1], spread over them; each image counts alike.

        Raises ImageError for a file that cannot be read. A channel of one value has a std of 1.
        """
        totals, rows = np.zeros((2, self.channels)), range(0, len(self), max(1, len(self) // _MEASURED))
        for row in rows:
            values = clean(self.read(row)).double().flatten(1).numpy()
            totals += values.mean(1), (values**2).mean(1)
        mean, square = totals / len(rows)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        return mean.round(6).tolist(), np.where(std < 1e-6, 1, std.round(6)).tolist()

    def sample(self, index: int, key: Key) -> list[Tensor]:
        """Reads the images of one sample, which share a crop. key: of this one sample."""
        return [self.read(index)]

    def summary(self) -> str:
        """Returns what there is, for the plan."""
        return f"{len(self):,} images of {shape_in_words(self.channels, self.image_size)}"

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
        return replace(self, **parts, original_rows=original_rows, content_hash=digest, file_list=None)


def _taken(values: Tensor | tuple | None, rows: Tensor) -> Tensor | tuple | None:
    """Returns the entries at rows; nothing stays nothing."""
    return values[rows] if isinstance(values, Tensor) else values and tuple(values[row] for row in rows.tolist())


def from_tensors(
    name: str, split: str, images: Tensor, labels: Tensor, classes: tuple[str, ...], image_size: ImageSize
) -> Source:
    digest = hashlib.blake2b(images.numpy().tobytes() + labels.numpy().tobytes(), digest_size=16).hexdigest()
    return Source(name, split, images, (), labels, classes, images.shape[1], image_size, digest)
