"""Published benchmarks, read from the files that torchvision's datasets download, by one adapter: `benchmark`.

What is a pickle is not read: CIFAR is taken in its binary version.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sslctl.data import benchmark_layouts as layouts
from sslctl.data import benchmark_pixels as pixels
from sslctl.data.downloads import data_home, download_by
from sslctl.data.folders import FileKeys, from_files
from sslctl.data.layout import Layout
from sslctl.data.listing import existing_folder
from sslctl.data.mapped import source_of
from sslctl.data.source import Source
from sslctl.errors import InputError, nearest, user_path
from sslctl.ops.image_size import image_size_of


@dataclass(frozen=True)
class Archive:
    """How a benchmark is read. One of the two is given: read(folder, split, part) of files of bytes, or layout(folder, split,
    part) of image files.

    mark: a file or folder that tells where it lies, with {stem} of the split. stems: of (training, test) files. below: folders
    below root where it may lie. parts: what dataset.part may be, the default first. fetch(root, part): downloads it, or None.
    """

    mark: str
    below: tuple[str, ...]
    read: Callable[[Path, str, str | None], pixels.Pixels] | None = None
    layout: Callable[[Path, str, str | None], Layout] | None = None
    stems: tuple[str, str] = ("train", "test")
    parts: tuple[str, ...] = ()
    fetch: Callable[[str, str | None], object] | None = None


def benchmark(
    split: str,
    archive: str,
    root: str | None,
    download: bool,
    image_size: int | list[int] | None,
    channels: int,
    memory_gb: float,
    part: str | None = None,
    class_list: str | None = None,
) -> Source:
    """Reads a published benchmark.

    archive: which, see ARCHIVES. root: the folder that holds its files, or its own folder in torchvision's layout; None: the
    download folder. part: which of its variants. class_list: a file with a class a line, to which it is cut, such as
    ImageNet-100's. Raises InputError where files are missing, or not what they should be.
    """
    if archive not in ARCHIVES:
        raise InputError(f"dataset.archive={archive}: expected {', '.join(ARCHIVES)}{nearest(archive, ARCHIVES)}")
    _refuse_channels(channels)
    own = ARCHIVES[archive]
    if part is not None and part not in own.parts:
        expected = ", ".join(own.parts) or "null, there is one alone"
        raise InputError(f"dataset.part={part}: expected {expected}{nearest(part, own.parts)}")
    part = part or next(iter(own.parts), None)
    folder = _folder(archive, root, download, split, part)
    # Pixels and labels in binary files: they must fit each other before a source is made of them.
    if own.read:
        if class_list:
            raise InputError(f"dataset.class_list: {archive} is read whole; benchmarks of image files take it")
        parts, labels, classes = own.read(folder, split, part)
        if sum(len(stored.pixels) for stored in parts) != len(labels):
            raise InputError(f"{folder} holds {len(parts[0].pixels)} {split} images and {len(labels)} labels")
        if int(labels.max()) >= len(classes):
            raise InputError(f"{folder} holds a label {int(labels.max())}, there are {len(classes)} classes")
        size = parts[0].size[0] if image_size is None else image_size_of(image_size, "dataset.image_size")
        return source_of(archive, split, parts, labels, classes, channels, size, memory_gb)

    # Files of images: laid out as a folder is, and read by the same code.
    def lay_out(split: str) -> Layout:
        layout = own.layout(folder, split, part)
        return layouts.cut_to(layout, user_path(class_list)) if class_list else layout

    return from_files(archive, split, lay_out, FileKeys(str(folder), image_size, channels, memory_gb))


def cifar10_stl10(
    split: str,
    root: str | None,
    download: bool,
    image_size: int,
    channels: int,
    memory_gb: float,
    judge: str = "stl10",
) -> Source:
    """Reads the training images of CIFAR-10 and STL-10 and STL-10's without labels as one set of one size, 155,000 in all.

    judge: "stl10" or "cifar10", whose training labels and test split the set has; the other's images are without.
    """
    judges = {"stl10": (pixels.stl10, "train+unlabelled"), "cifar10": (pixels.cifar10, None)}
    if judge not in judges:
        raise InputError(f"dataset.judge={judge}: expected stl10 or cifar10{nearest(judge, judges)}")
    _refuse_channels(channels)
    # Both are trained on; only the judge keeps its labels, so that the classes are its own.
    names = judges if split == "train" else [judge]
    parts, labels, classes = [], [], ()
    for name in names:
        read, part = judges[name]
        files, own, of_its_own = read(_folder(name, root, download, split, part), split, part)
        parts += files
        labels.append(own if name == judge else torch.full_like(own, -1))
        classes = of_its_own if name == judge else classes
    source = source_of(
        "cifar10_stl10", split, parts, torch.cat(labels), classes, channels, image_size, memory_gb, side=image_size
    )
    # The pixels are the same for either judge, the run is not.
    digest = hashlib.blake2b(f"{source.content_hash} judged on {judge}".encode(), digest_size=16).hexdigest()
    return replace(source, content_hash=digest)


def _refuse_channels(channels: int) -> None:
    """Raises InputError for channels that pictures of grey or colours cannot be given in."""
    if channels not in (1, 3):
        raise InputError(f"dataset.channels={channels}: expected 1 or 3")


def _folder(archive: str, root: str | None, download: bool, split: str, part: str | None) -> Path:
    """Returns where a benchmark's files lie; downloads them where they do not, and it is allowed."""
    own = ARCHIVES[archive]
    base = existing_folder(root, download and own.fetch is not None) if root is not None else data_home()
    mark = own.mark.format(stem=own.stems[split == "test"], part=part)
    places = [base, *(base / below.format(part=part) for below in own.below)]

    def find() -> Path | None:
        return next((place for place in places if next(place.glob(mark), None)), None)

    # What is there is never fetched again, whatever dataset.download says.
    folder = find()
    if folder is None and download and own.fetch:
        download_by(archive, base, lambda place: own.fetch(str(place), part))
        folder = find()
    if folder is None:
        advice = "dataset.download=true would fetch it" if own.fetch else "it cannot be downloaded without a login"
        names = " nor in ".join(below.format(part=part) for below in own.below)
        raise InputError(
            f"no {mark} in {base}{' nor in ' * bool(names)}{names}: dataset.root=FOLDER with the files of {archive}"
            f" ({advice})"
        )
    return folder


# --- The table ---


def _torchvision(name: str, **arguments: object) -> Callable[[str, str | None], object]:
    """Returns what downloads by one of torchvision's datasets. arguments: of its constructor; one that is `...` is the part."""

    def fetch(root: str, part: str | None) -> None:
        import torchvision

        own = {key: part if value is ... else value for key, value in arguments.items()}
        splits = own.pop("splits", [{}])
        for split in splits:
            getattr(torchvision.datasets, name)(root, download=True, **own, **split)

    return fetch


def _archive(url: str, md5: str) -> Callable[[str, str | None], object]:
    def fetch(root: str, part: str | None) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(url, root, md5=md5)

    return fetch


def _size_of(part: str) -> str:
    """imagenette2-160 -> 160px, as torchvision calls it."""
    return f"{part.partition('-')[2]}px" if "-" in part else "full"


_KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_BOTH = [{"train": True}, {"train": False}]
_HELD_OUT = [{"split": "train"}, {"split": "test"}]
_IDX_STEMS = ("train", "t10k")
ARCHIVES = {
    "mnist": Archive(
        "{stem}-images-idx3-ubyte*",
        ("MNIST/raw",),
        pixels.idx("", pixels.DIGITS),
        stems=_IDX_STEMS,
        fetch=_torchvision("MNIST"),
    ),
    "kmnist": Archive(
        "{stem}-images-idx3-ubyte*",
        ("KMNIST/raw",),
        pixels.idx("", _KUZUSHIJI),
        stems=_IDX_STEMS,
        fetch=_torchvision("KMNIST"),
    ),
    "emnist": Archive(
        "emnist-{part}-{stem}-images-idx3-ubyte*",
        ("EMNIST/raw", "gzip"),
        pixels.idx("emnist-{part}-", (), upright=False),
        parts=tuple(pixels.EMNIST),
        fetch=_torchvision("EMNIST", split=...),
    ),
    "qmnist": Archive(
        "qmnist-{stem}-images-idx3-ubyte*",
        ("QMNIST/raw",),
        pixels.qmnist,
        parts=("test", "test10k", "test50k"),
        fetch=_torchvision("QMNIST", splits=_BOTH),
    ),
    "cifar10": Archive("{stem}_batch*.bin", ("cifar-10-batches-bin",), pixels.cifar10, stems=("data", "test")),
    "cifar100": Archive(
        "{stem}.bin",
        ("cifar-100-binary",),
        pixels.cifar100,
        fetch=_archive("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
    ),
    "svhn": Archive(
        "{stem}_32x32.mat",
        ("svhn",),
        pixels.svhn,
        parts=("train", "train+extra"),
        fetch=_torchvision("SVHN", splits=_HELD_OUT),
    ),
    "stl10": Archive(
        "{stem}_X.bin",
        ("stl10_binary",),
        pixels.stl10,
        parts=("train+unlabelled", "unlabelled", "train"),
        fetch=_torchvision("STL10"),
    ),
    "eurosat": Archive(
        "AnnualCrop", ("2750", "eurosat/2750", "EuroSAT/2750"), layout=layouts.whole, fetch=_torchvision("EuroSAT")
    ),
    "oxford_pets": Archive(
        "annotations/{stem}.txt",
        ("oxford-iiit-pet",),
        layout=layouts.oxford_pets,
        stems=("trainval", "test"),
        fetch=_torchvision("OxfordIIITPet"),
    ),
    "imagenette": Archive(
        "{stem}/n01440764",
        ("{part}",),
        layout=layouts.imagenette,
        stems=("train", "val"),
        parts=("imagenette2-160", "imagenette2-320", "imagenette2"),
        fetch=lambda root, part: _torchvision("Imagenette", size=_size_of(part))(root, None),
    ),
    "imagenet": Archive("{stem}/n*", ("ILSVRC2012", "imagenet"), layout=layouts.imagenet, stems=("train", "val")),
    "tiny_imagenet": Archive(
        "{stem}",
        ("tiny-imagenet-200",),
        layout=layouts.tiny_imagenet,
        stems=("train/n*", "val/val_annotations.txt"),
        fetch=_archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
    ),
    "places365": Archive(
        "{stem}",
        ("places365",),
        layout=layouts.places365,
        stems=("places365_train_standard.txt", "places365_val.txt"),
        fetch=_torchvision("Places365", small=True, splits=[{"split": "train-standard"}, {"split": "val"}]),
    ),
}
