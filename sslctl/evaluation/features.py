"""Features of clean images, extracted once per (weights, dataset, split) and kept on disk."""

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslctl import signals
from sslctl.data.files import ImageError
from sslctl.data.loader import clean_batches, readable_batches
from sslctl.data.sources import Source
from sslctl.errors import InputError, say, user_path
from sslctl.runs.atomic import replacing
from sslctl.runs.checkpoint import CheckpointError, load_tensors, metadata, save_tensors
from sslctl.views.maker import clean

_FORMAT = 2  # of the files: another one is not looked for
_FILE = re.compile(r"[0-9a-f]{32}\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Features:
    """One split: features (N, D) float32 on the CPU, labels (N,) int64.

    targets: (N, C) bool, where images have several labels. groups: (N,) int64, what each was taken from, where that is named.
    """

    features: Tensor
    labels: Tensor
    num_classes: int
    targets: Tensor | None = None
    groups: Tensor | None = None

    def take(self, rows: Tensor) -> "Features":
        """Returns the images at rows: (n,) int64, or a mask (N,)."""
        own = (values if values is None else values[rows] for values in (self.targets, self.groups))
        return Features(self.features[rows], self.labels[rows], self.num_classes, *own)


@torch.no_grad()
def extract_batches(
    function: Callable[[Tensor], Tensor],
    source: Source,
    rows: np.ndarray | Tensor,
    *,
    resize: int,
    batch_size: int = 512,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Yields the features of the images at some rows, in order, (B, D) float32 on the CPU each.

    function: (B, C, S, S) float in [0, 1], or (B, L) int64 of texts, -> (B, D). Batches of a folder that is read ahead are
    smaller than asked for. A signal interrupts it between batches. Raises ImageError for an image that cannot be read.
    """
    reading = {"resize": resize, "batch_size": batch_size, "workers": workers}
    with contextlib.closing(clean_batches(source, rows, **reading)) as batches:
        for images in batches:
            signals.check()
            yield _features(function, images, device)


@torch.no_grad()
def extract_readable(
    function: Callable[[Tensor], Tensor],
    source: Source,
    *,
    resize: int | None,
    batch_size: int = 512,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, dict[int, ImageError]]]:
    """Yields what `extract_batches` does of all images that can be read, and place in the batch -> error of the others."""
    reading = {"resize": resize, "batch_size": batch_size, "workers": workers}
    with contextlib.closing(readable_batches(source, torch.arange(len(source)), **reading)) as batches:
        for images, unread in batches:
            signals.check()
            yield _features(function, images, device) if len(images) else images, unread


def _features(function: Callable[[Tensor], Tensor], images: Tensor, device: torch.device | str) -> Tensor:
    images = images.to(device)
    return function(clean(images) if images.dtype == torch.uint8 else images).float().cpu()


def extract(
    function: Callable[[Tensor], Tensor], source: Source, rows: np.ndarray | Tensor, *, resize: int, **reading: Any
) -> Tensor:
    """Returns all that `extract_batches` yields by these arguments, (len(rows), D) float32 on the CPU."""
    return torch.cat(list(extract_batches(function, source, rows, resize=resize, **reading)))


def refuse_non_finite(features: Tensor, whose: str) -> Tensor:
    """Returns features (N, …) as they are. Raises InputError where any are not finite: no figure of them means anything."""
    if not (finite := features.isfinite()).all():
        rows = int((~finite.flatten(1).all(1)).sum())
        raise InputError(
            f"{rows:,} of {len(features):,} rows of the {whose} hold values that are not finite numbers: nothing was"
            " measured of them"
        )
    return features


def cached(key: tuple[str, ...], compute: Callable[[], Tensor], limit_gb: float) -> Tensor:
    """Returns the tensor kept under a key, computed when it is not there. The oldest files make room; limit 0 keeps nothing.

    A file that is not as it was written is computed again, which is said. The checksum takes about 0.35 s
    a GiB: six times what mapping a file that is in memory does, and nothing beside extracting the features.
    """
    if limit_gb <= 0:
        return compute()
    path = _place(key)
    folder = path.parent
    if path.exists():
        # Damaged on disk is as if it were not there; touched, as what was used last is kept longest.
        try:
            features = _read(path, key)
            os.utime(path)
            return features
        except CheckpointError as error:
            say(f"sslctl: cached features are calculated again: {error}", file=sys.stderr)
            path.unlink(missing_ok=True)  # another command may have been faster
    features = compute()
    # Whole or not at all: another command may read, or write, the same file at this moment.
    _make_private(folder)
    with replacing(path) as temporary:
        save_tensors(temporary, {"features": features}, {"key": json.dumps(key)}, signed=True)
    _make_room(folder, limit_gb, keep=path)
    return features


def _read(path: Path, key: tuple[str, ...]) -> Tensor:
    features = load_tensors(path).get("features")
    if features is None or metadata(path).get("key") != json.dumps(key):
        raise CheckpointError(f"{path} is of other features")
    return features


def _make_private(folder: Path) -> None:
    """Makes the cache's folder, or what there is of it, its user's alone: features tell of the images they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    for own in (folder.parent, folder):
        if own.stat().st_uid == os.getuid() and own.stat().st_mode & 0o777 != 0o700:
            with contextlib.suppress(OSError):  # file systems without modes
                own.chmod(0o700)


def is_cached(key: tuple[str, ...]) -> bool:
    """Tells whether `cached` would find a tensor under a key."""
    return _place(key).exists()


def _place(key: tuple[str, ...]) -> Path:
    folder = user_path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "sslctl" / "features"
    return folder / f"{hashlib.sha256(json.dumps([_FORMAT, *key]).encode()).hexdigest()[:32]}.safetensors"


def _make_room(folder: Path, limit_gb: float, keep: Path) -> None:
    files = sorted((f for f in folder.iterdir() if _FILE.fullmatch(f.name)), key=lambda f: f.stat().st_mtime)
    size = sum(f.stat().st_size for f in files)
    for file in files:
        if size <= limit_gb * 2**30:
            return
        if file != keep:
            size -= file.stat().st_size
            file.unlink(missing_ok=True)
