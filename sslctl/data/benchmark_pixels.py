"""Benchmarks of files of bytes: their images, labels and classes. Each reader takes (folder, split, part)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslctl.data.binary import plain_or_compressed, read_cifar, read_idx
from sslctl.data.mapped import Stored
from sslctl.data.sources import CIFAR10
from sslctl.errors import InputError

Pixels = tuple[list[Stored], Tensor, tuple[str, ...]]  # files, labels (N,), classes
DIGITS = tuple("0123456789")
_STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_OWN_LOWER = tuple("abdefghnqrt")  # letters whose small form EMNIST tells from the capital in all its variants
EMNIST = {
    "balanced": (*DIGITS, *_LETTERS, *_OWN_LOWER),
    "bymerge": (*DIGITS, *_LETTERS, *_OWN_LOWER),
    "byclass": (*DIGITS, *_LETTERS, *map(str.lower, _LETTERS)),
    "letters": tuple(map(str.lower, _LETTERS)),
    "digits": DIGITS,
    "mnist": DIGITS,
}


def idx(prefix: str, classes: tuple[str, ...], *, upright: bool = True):
    """Returns what reads a split of MNIST's family. prefix: of its files, with {part}. upright: else columns come first, as in
    EMNIST, whose letters are numbered from 1."""

    def read(folder: Path, split: str, part: str | None) -> Pixels:
        stem = prefix.format(part=part) + ("t10k" if split == "test" and not prefix else split)
        file = folder / f"{stem}-images-idx3-ubyte"
        images = read_idx(file, dimensions=3).numpy()
        labels = read_idx(folder / f"{stem}-labels-idx1-ubyte", dimensions=1).long()
        own = EMNIST[part] if part else classes
        labels = labels - 1 if part == "letters" else labels
        return [_of_grey(images if upright else images.swapaxes(1, 2), file)], labels, own

    return read


def qmnist(folder: Path, split: str, part: str | None) -> Pixels:
    file = folder / f"qmnist-{split}-images-idx3-ubyte"
    images = read_idx(file, dimensions=3).numpy()
    labels = read_idx(folder / f"qmnist-{split}-labels-idx2-int", dimensions=2, kind=12)[:, 0].long()
    rows = (
        slice(None)
        if split == "train"
        else {"test10k": slice(10_000), "test50k": slice(10_000, None)}.get(part, slice(None))
    )
    return [_of_grey(images[rows], file)], labels[rows], DIGITS


def _of_grey(images: np.ndarray, file: Path) -> Stored:
    return Stored(images, lambda part: part[:, None], plain_or_compressed(file), images.shape[1:])


def cifar10(folder: Path, split: str, part: str | None) -> Pixels:
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] if split == "train" else ["test_batch.bin"]
    return *_cifar([folder / name for name in names], labels=1), CIFAR10


def cifar100(folder: Path, split: str, part: str | None) -> Pixels:
    names = folder / "fine_label_names.txt"
    if not names.exists():
        raise InputError(f"no {names}")
    return *_cifar([folder / f"{split}.bin"], labels=2), tuple(names.read_text().split())


def _cifar(files: list[Path], labels: int) -> tuple[list[Stored], Tensor]:
    rows = [read_cifar(file, labels) for file in files]  # (N, labels + 3072) each; the last label is the finer one
    parts = [
        Stored(own[:, labels:], lambda part: part.reshape(-1, 3, 32, 32), file, (32, 32))
        for own, file in zip(rows, files, strict=True)
    ]
    return parts, torch.from_numpy(np.concatenate([own[:, labels - 1] for own in rows]).astype(np.int64))


def svhn(folder: Path, split: str, part: str | None) -> Pixels:
    import scipy.io  # slow

    names = [split, *(["extra"] if split == "train" and part == "train+extra" else [])]
    parts, labels = [], []
    for name in names:
        file = folder / f"{name}_32x32.mat"
        try:
            data = scipy.io.loadmat(file)
            pixels, label = data["X"], data["y"]  # (32, 32, 3, N) and (N, 1), in which 0 is 10
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
        parts.append(Stored(pixels.transpose(3, 2, 0, 1), lambda part: part, file, pixels.shape[:2]))
        labels.append(torch.from_numpy(label[:, 0].astype(np.int64) % 10))
    return parts, torch.cat(labels), DIGITS


def stl10(folder: Path, split: str, part: str | None) -> Pixels:
    names = {"train": ["train"], "unlabelled": ["unlabeled"]}.get(part, ["train", "unlabeled"])
    parts, labels = [], []
    for name in names if split == "train" else ["test"]:
        file = folder / f"{name}_X.bin"
        size = file.stat().st_size if file.exists() else 0
        if not size or size % (3 * 96 * 96):
            raise InputError(f"{file} holds {size:,} bytes, not a multiple of {3 * 96 * 96:,}")
        pixels = np.memmap(file, np.uint8, "r").reshape(-1, 3, 96, 96)  # columns before rows
        parts.append(Stored(pixels, lambda part: part.swapaxes(2, 3), file, (96, 96)))
        known = folder / f"{name}_y.bin"
        number = np.fromfile(known, np.uint8).astype(np.int64) - 1 if known.exists() else np.full(len(pixels), -1)
        labels.append(torch.from_numpy(number))
    return parts, torch.cat(labels), _STL10
