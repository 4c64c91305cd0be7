"""Features of clean images, extracted once per (weights, dataset, split) and kept on disk."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslctl import signals
from sslctl.data.loader import clean_batches
from sslctl.data.sources import Source
from sslctl.errors import InputError, user_path
from sslctl.runs.atomic import replacing
from sslctl.runs.checkpoint import load_tensors, save_tensors
from sslctl.views.maker import clean


@dataclass(frozen=True)
class Features:
    """One split: features (N, D) float32 on the CPU, labels (N,) int64."""

    features: Tensor
    labels: Tensor
    num_classes: int


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
    smaller than asked for. A signal interrupts it between batches.
    """
    reading = {"resize": resize, "batch_size": batch_size, "workers": workers}
    with contextlib.closing(clean_batches(source, rows, **reading)) as batches:
        for images in batches:
            signals.check()
            images = images.to(device)
            yield function(clean(images) if images.dtype == torch.uint8 else images).float().cpu()


def extract(
    function: Callable[[Tensor], Tensor], source: Source, rows: np.ndarray | Tensor, *, resize: int, **reading: Any
) -> Tensor:
    """Returns all that `extract_batches` yields by these arguments, (len(rows), D) float32 on the CPU."""
    return torch.cat(list(extract_batches(function, source, rows, resize=resize, **reading)))


def cached(key: tuple[str, ...], compute: Callable[[], Tensor], limit_gb: float) -> Tensor:
    """Returns the tensor kept under a key, computed when it is not there. The oldest files make room; limit 0 keeps nothing."""
    if limit_gb <= 0:
        return compute()
    path = _place(key)
    folder = path.parent
    if path.exists():
        try:
            features = load_tensors(path)["features"]
            os.utime(path)
            return features
        except InputError:
            path.unlink()  # cut short by a kill: made anew below
    features = compute()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_tensors(temporary, {"features": features})
    _make_room(folder, limit_gb, keep=path)
    return features


def is_cached(key: tuple[str, ...]) -> bool:
    """Tells whether `cached` would find a tensor under a key."""
    return _place(key).exists()


def _place(key: tuple[str, ...]) -> Path:
    folder = user_path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "sslctl" / "features"
    return folder / f"{hashlib.sha256('|'.join(key).encode()).hexdigest()[:32]}.safetensors"


def _make_room(folder: Path, limit_gb: float, keep: Path) -> None:
    files = sorted(folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime)
    size = sum(f.stat().st_size for f in files)
    for file in files:
        if size <= limit_gb * 2**30:
            return
        if file != keep:
            size -= file.stat().st_size
            file.unlink()
