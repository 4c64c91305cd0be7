"""Where images come from: what a dataset's `_target_` names. What a source is: source.py."""

import functools
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sslctl.data import listing
from sslctl.data.binary import read_cifar, read_idx
from sslctl.data.downloads import data_home, download_by
from sslctl.data.folders import FolderKeys, from_files
from sslctl.data.layout import base_name, class_folders, without_labels
from sslctl.data.sampler import permuted
from sslctl.data.source import Source, from_tensors
from sslctl.errors import InputError

__all__ = ["Source", "cifar10", "digits", "fashion_mnist", "folder", "from_tensors", "imagefolder"]


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

        download_by("Fashion-MNIST", base, lambda place: torchvision.datasets.FashionMNIST(str(place), download=True))
        folder = base / "FashionMNIST" / "raw"
    images = read_idx(folder / f"{stem}-images-idx3-ubyte", dimensions=3)[:, None]
    labels = read_idx(folder / f"{stem}-labels-idx1-ubyte", dimensions=1).long()
    if len(images) != len(labels):
        raise InputError(f"{folder} holds {len(images)} {stem} images and {len(labels)} labels")
    return from_tensors("fashion_mnist", split, images, labels, _FASHION, image_size)


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(split: str, image_size: int, root: str | None, download: bool, memory_gb: float) -> Source:
    """Reads CIFAR-10 from its binary version (data_batch_1.bin …), or from train/<class>/ and test/<class>/ folders of images.

    The Python version is not read: it is a pickle.
    """
    base = listing.existing_folder(root, download) if root is not None else data_home()
    if (base / "train").is_dir():
        return replace(imagefolder(split, FolderKeys(str(base), image_size, 3, memory_gb)), name="cifar10")
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] if split == "train" else ["test_batch.bin"]
    folder = next((d for d in (base, base / "cifar-10-batches-bin") if (d / names[0]).exists()), None)
    if folder is None:
        if not download:
            raise InputError(f"no {names[0]} in {base}, and no train/ folder (dataset.download=true would fetch it)")
        from torchvision.datasets.utils import download_and_extract_archive

        url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
        md5 = "c32a1d4ab5d03f1284b67883e8d87530"
        download_by(url, base, lambda place: download_and_extract_archive(url, str(place), md5=md5))
        folder = base / "cifar-10-batches-bin"
    rows = np.concatenate([read_cifar(folder / name) for name in names])  # (N, 1 + 3072)
    images = torch.from_numpy(rows[:, 1:].copy()).view(-1, 3, 32, 32)
    return from_tensors("cifar10", split, images, torch.from_numpy(rows[:, 0].astype(np.int64)), CIFAR10, image_size)


def imagefolder(split: str, keys: FolderKeys) -> Source:
    """Reads class folders: root/train/<class>/… and root/test/<class>/… (or val/), or root/<class>/… alone.

    Without a test folder, a fixed fifth of the images, drawn by the hash of their names, is the test split and is never
    trained on.
    """
    lay_out = functools.partial(class_folders, root=keys.root, splits=keys.splits, label=keys.label)
    return from_files(base_name(keys.root), split, lay_out, keys)


def folder(split: str, keys: FolderKeys) -> Source:
    """Reads all images below a folder, flat or nested, without labels; with those that label= finds in their names."""
    if keys.label is not None:
        return imagefolder(split, keys)
    if split == "test":
        raise InputError(
            f"dataset=folder has no labels to evaluate on ({listing.existing_folder(keys.root)}): name labelled data, with"
            " eval_dataset=… in sslctl pretrain, dataset=… elsewhere; or dataset.label=PATTERN takes them from file names"
        )
    return from_files(base_name(keys.root), split, lambda _: without_labels(keys.root, keys.splits), keys)
