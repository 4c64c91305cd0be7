"""Datasets: what they hold, how splits are made, what they refuse, and that batches do not depend on how they are read."""

import gzip
import http.server
import multiprocessing
import os
import re
import resource
import signal
import struct
import threading
import types
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import FashionMNIST

from sslctl.config.schema import CONFIGS
from sslctl.data import files, listing, sources
from sslctl.data.audit import look_at
from sslctl.data.downloads import data_home
from sslctl.data.folders import FolderKeys
from sslctl.data.loader import batches, clean_batches
from sslctl.data.pixels import Reading
from sslctl.data.workers import report_unless_cut_off, report_unless_noticed
from sslctl.errors import InputError
from sslctl.ops.timing import Clock
from sslctl.views import ViewMaker
from tests.by_hand import view_settings
from tests.conftest import QUICK, write_images


def folder(root, image_size=None, channels=3, memory_gb=1.0):
    return sources.folder("train", FolderKeys(str(root), image_size, channels, memory_gb))


def imagefolder(root, split="train", image_size=None, channels=3, memory_gb=1.0):
    return sources.imagefolder(split, FolderKeys(str(root), image_size, channels, memory_gb))


def names_of(source, root) -> list[str]:
    """A source's images as paths below root."""
    return [str(Path(path).relative_to(root)) for path in source.paths]


# --- Digits ---


def test_digits_are_split_into_a_fixed_fifth_and_the_rest():
    train, test = (sources.digits(split, 8) for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359)
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    data = load_digits()  # each of its images is in exactly one split, with its own label
    original = np.round(data.images * 255 / 16).astype(np.uint8)
    expected = Counter((image.tobytes(), label) for image, label in zip(original, data.target.tolist(), strict=True))
    actual = Counter(
        (image.numpy().tobytes(), label)
        for source in (train, test)
        for image, label in zip(source.images, source.labels.tolist(), strict=True)
    )
    assert actual == expected


def test_digits_are_the_same_every_time_and_split_alike_at_every_size():
    first, again, larger = (sources.digits("test", size) for size in (8, 8, 12))
    assert torch.equal(first.images, again.images)
    assert first.content_hash == again.content_hash
    assert torch.equal(first.labels, larger.labels)
    assert larger.images.shape == (359, 1, 12, 12)
    assert larger.image_size == 12
    assert larger.content_hash != first.content_hash


# --- Fashion-MNIST: idx files ---

IDX_NAMES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")}
IDX_NAMES["test"] = tuple(name.replace("train", "t10k") for name in IDX_NAMES["train"])


def idx(array: np.ndarray) -> bytes:
    """The idx format: two zeros, the type (8: bytes), the number of dimensions, big-endian sizes, the bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write_idx(root: Path, packed: bool = False, count: int = 32) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both splits of random images and labels; returns them."""
    root.mkdir(parents=True, exist_ok=True)
    generator, built = np.random.default_rng(0), {}
    for split, names in IDX_NAMES.items():
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in zip(names, (images, labels), strict=True):
            data = idx(array)
            (root / (name + ".gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
        built[split] = images, labels
    return built


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, split, below, packed):
    images, labels = write_idx(tmp_path / below, packed)[split]
    source = sources.fashion_mnist(split, 28, str(tmp_path), False)
    assert np.array_equal(source.images[:, 0].numpy(), images)
    assert np.array_equal(source.labels.numpy(), labels)
    assert (source.channels, source.image_size, len(source.classes)) == (1, 28, 10)
    assert source.labelled


@pytest.mark.parametrize("kept", [0, 10, -1])
@pytest.mark.parametrize("packed", [False, True])
def test_a_truncated_idx_file_is_refused_by_name(tmp_path, packed, kept):
    write_idx(tmp_path, packed)
    path = tmp_path / (IDX_NAMES["train"][0] + (".gz" if packed else ""))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=re.escape(str(tmp_path / IDX_NAMES["train"][0]))):
        sources.fashion_mnist("train", 28, str(tmp_path), False)


def test_an_idx_file_of_something_else_is_refused_by_name(tmp_path):
    write_idx(tmp_path)
    images, labels = (tmp_path / name for name in IDX_NAMES["train"])
    images.write_bytes(labels.read_bytes())
    with pytest.raises(InputError, match=rf"{re.escape(str(images))} is not an idx file .* 3 dimensions"):
        sources.fashion_mnist("train", 28, str(tmp_path), False)


def test_idx_labels_of_another_number_are_refused(tmp_path):
    write_idx(tmp_path)
    (tmp_path / IDX_NAMES["train"][1]).write_bytes(idx(np.zeros(31, np.uint8)))
    with pytest.raises(InputError, match=r"32.*31|31.*32"):
        sources.fashion_mnist("train", 28, str(tmp_path), False)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_idx_file_is_named(tmp_path, missing):
    write_idx(tmp_path)
    (tmp_path / IDX_NAMES["test"][missing]).unlink()
    with pytest.raises(InputError, match=IDX_NAMES["test"][missing]):
        sources.fashion_mnist("test", 28, str(tmp_path), False)


# --- CIFAR-10: binary files and folders ---


def write_cifar10(root: Path, each: int = 8) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The binary version with a few images a file: a label, then the red, green and blue plane."""
    root.mkdir(parents=True, exist_ok=True)
    generator, built = np.random.default_rng(0), {}
    for split, names in {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]}.items():
        labels = (np.arange(each * len(names)) % 10).astype(np.uint8)
        images = generator.integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
        rows = np.concatenate([labels[:, None], images.reshape(len(labels), -1)], axis=1)
        for name, part in zip(names, np.split(rows, len(names)), strict=True):
            (root / name).write_bytes(part.tobytes())
        built[split] = images, labels
    return built


@pytest.mark.parametrize("below", [".", "cifar-10-batches-bin"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10_is_read_from_binary_files(tmp_path, split, below):
    images, labels = write_cifar10(tmp_path / below)[split]
    source = sources.cifar10(split, 32, str(tmp_path), False, 1.0)
    assert np.array_equal(source.images.numpy(), images)
    assert np.array_equal(source.labels.numpy(), labels)
    assert (source.channels, source.image_size, len(source.classes)) == (3, 32, 10)


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10_is_read_from_folders_of_images(tmp_path, split):
    write_images(tmp_path, "train/cat", "train/dog", count=3, size=(32, 32))
    write_images(tmp_path, "test/cat", "test/dog", count=2, size=(32, 32), seed=1)
    source = sources.cifar10(split, 32, str(tmp_path), False, 1.0)
    assert source.name == "cifar10"
    assert source.classes == ("cat", "dog")
    each = {"train": 3, "test": 2}[split]
    assert source.labels.tolist() == [0] * each + [1] * each
    assert all(f"/{split}/" in path for path in source.paths)


@pytest.mark.parametrize(
    ("name", "kept"), [("data_batch_3.bin", 3000), ("data_batch_3.bin", 0), ("test_batch.bin", -1)]
)
def test_a_truncated_cifar10_file_is_refused_by_name(tmp_path, name, kept):
    write_cifar10(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
    with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
        sources.cifar10("test" if "test" in name else "train", 32, str(tmp_path), False, 1.0)


@pytest.mark.parametrize(
    ("name", "split"), [("data_batch_1.bin", "train"), ("data_batch_4.bin", "train"), ("test_batch.bin", "test")]
)
def test_a_missing_cifar10_file_is_named(tmp_path, name, split):
    write_cifar10(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name):
        sources.cifar10(split, 32, str(tmp_path), False, 1.0)


# --- Folders with a class each ---


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_an_imagefolder_takes_its_splits_from_folders(tmp_path, held_out):
    write_images(tmp_path, "train/b", "train/a/deep", "train/c", f"{held_out}/a", f"{held_out}/c", count=2)
    train, test = imagefolder(tmp_path), imagefolder(tmp_path, "test")
    assert train.classes == test.classes == ("a", "b", "c")
    assert names_of(train, tmp_path / "train") == [f"{c}/{n:03d}.png" for c in ("a/deep", "b", "c") for n in range(2)]
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert names_of(test, tmp_path / held_out) == [f"{c}/{n:03d}.png" for c in ("a", "c") for n in range(2)]
    assert test.labels.tolist() == [0, 0, 2, 2]


def test_an_imagefolder_without_a_split_holds_out_a_fixed_fifth(tmp_path):
    root = write_images(tmp_path / "images", "a", "b", "c", count=61)
    train, test = imagefolder(root), imagefolder(root, "test")
    taken, held_out = set(names_of(train, root)), set(names_of(test, root))
    assert not taken & held_out
    assert len(taken | held_out) == 183
    assert 0.1 < len(held_out) / 183 < 0.3
    for source in (train, test):
        assert [source.classes[label] for label in source.labels] == [Path(p).parent.name for p in source.paths]
    # files that come later leave every image where it was
    write_images(root / "b" / "more", count=32, seed=1)
    write_images(root / "d", count=30, seed=2)
    assert taken < set(names_of(imagefolder(root), root))
    assert held_out < set(names_of(imagefolder(root, "test"), root))
    # and so does moving the folder
    root.rename(tmp_path / "elsewhere")
    assert held_out < set(names_of(imagefolder(tmp_path / "elsewhere", "test"), tmp_path / "elsewhere"))


@pytest.mark.parametrize("folders", [("a", "."), (".",), ("train/a", "train", "test/a")])
def test_images_outside_class_folders_are_refused(tmp_path, folders):
    write_images(tmp_path, *folders, count=3)
    with pytest.raises(InputError, match=r"3 images lie outside class folders \(first: 000\.png\).*dataset=folder"):
        imagefolder(tmp_path)


def test_a_class_that_is_only_in_the_test_split_is_refused(tmp_path):
    write_images(tmp_path, "train/a", "train/b", "test/a", "test/bb", count=2)
    with pytest.raises(InputError, match=r"test: class bb has no images in .*train \(nearest: b\)"):
        imagefolder(tmp_path, "test")


def test_a_train_folder_without_a_test_folder_has_no_test_split(tmp_path):
    write_images(tmp_path, "train/a", "train/b", count=2)
    assert len(imagefolder(tmp_path)) == 4
    with pytest.raises(InputError, match=r"no test split beside it: dataset\.splits={train: train, test: FOLDER}"):
        imagefolder(tmp_path, "test")


# --- Folders without labels ---


def test_a_folder_finds_flat_and_nested_images_in_a_fixed_order(tmp_path):
    write_images(tmp_path, ".", "b/deep", "a", count=2)
    Image.new("RGB", (16, 16)).save(tmp_path / "a" / "PHOTO.JPG")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    source = folder(tmp_path)
    flat = ["000.png", "001.png"]
    assert names_of(source, tmp_path) == [
        *flat,
        "a/000.png",
        "a/001.png",
        "a/PHOTO.JPG",
        "b/deep/000.png",
        "b/deep/001.png",
    ]
    assert source.labels.tolist() == [-1] * 7
    assert not source.labelled
    assert source.describe(2) == str(tmp_path / "a" / "000.png")


def test_a_folder_has_no_test_split(tmp_path):
    with pytest.raises(InputError, match="eval_dataset="):
        sources.folder("test", FolderKeys(str(write_images(tmp_path)), None, 3, 1.0))


def test_a_link_to_a_folder_is_followed(tmp_path):
    write_images(tmp_path / "elsewhere", count=2)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere")
    assert listing.scan(tmp_path / "images").names == ["link/000.png", "link/001.png"]


def test_a_link_to_a_parent_does_not_repeat_images(tmp_path):
    write_images(tmp_path / "a", count=2)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert listing.scan(tmp_path).names == ["a/000.png", "a/001.png"]


@pytest.mark.parametrize(
    ("size", "image_size"), [((16, 16), 16), ((96, 96), 96), ((97, 97), 224), ((16, 20), 224), (None, 224)]
)
def test_the_image_size_is_that_of_small_equal_squares_else_224(tmp_path, size, image_size):
    for number in range(3):
        Image.new("RGB", size[::-1] if size else (16 + number, 16)).save(tmp_path / f"{number}.png")
    source = folder(tmp_path)
    assert source.image_size == image_size
    assert folder(tmp_path, image_size=48).image_size == 48
    assert (source.images is None) == (size is None)


# --- Reading ---

ORANGE = (200, 120, 40)
LUMA = round(0.299 * 200 + 0.587 * 120 + 0.114 * 40)


def picture(mode: str) -> Image.Image:
    """One orange, or grey of the same luma, in a mode."""
    if mode == "I;16":
        return Image.fromarray(np.full((6, 4), LUMA * 257, np.uint16))
    if mode == "LA":
        return Image.merge("LA", (Image.new("L", (4, 6), LUMA), Image.new("L", (4, 6), 255)))
    image = Image.new("RGB", (4, 6), ORANGE)
    return image.quantize(4) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"),
        ("RGBA", "png"),
        ("P", "png"),
        ("P", "bmp"),
        ("L", "png"),
        ("LA", "png"),
        ("I;16", "png"),
        ("I;16", "tif"),
        ("CMYK", "tif"),
    ],
)
def test_images_of_every_mode_are_converted(tmp_path, mode, suffix, channels):
    path = tmp_path / f"image.{suffix}"
    picture(mode).save(path)
    with Image.open(path) as saved:
        assert saved.mode == mode
    image = files.read(str(path), Reading(channels))
    assert image.shape == (channels, 6, 4)
    assert image.dtype == torch.uint8
    coloured = channels == 3 and mode in ("RGB", "RGBA", "P", "CMYK")
    expected = ORANGE if coloured else (LUMA,) * channels
    assert (image[:, 0, 0].int() - torch.tensor(expected)).abs().max() <= 1
    assert (image == image[:, :1, :1]).all()


def test_rows_stay_rows_and_channels_channels(tmp_path):
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    assert np.array_equal(files.read(str(tmp_path / "image.png"), Reading(3)).numpy(), pixels.transpose(2, 0, 1))


def damage(path: Path, how: str) -> None:
    """Makes an image file unreadable."""
    data = path.read_bytes()
    if how in ("lost", "pipe", "loop"):
        path.unlink()
        {"lost": lambda: None, "pipe": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(path.name)}[how]()
        return
    path.write_bytes({"empty": b"", "text": b"not an image", "cut": data[: len(data) // 2]}[how])


@pytest.mark.parametrize("how", ["empty", "text", "cut", "pipe", "loop"])
def test_a_damaged_image_among_equal_sizes_is_refused_by_name(tmp_path, how):
    write_images(tmp_path, count=8)
    damage(tmp_path / "005.png", how)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "005.png"))):
        folder(tmp_path)


def bomb(path: Path, side: int) -> None:
    """A PNG of some hundred bytes that says it has side × side pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1000)))]
    framed = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in [*chunks, (b"IEND", b"")]
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))


@pytest.mark.parametrize("side", [10_000, 30_000])  # past Pillow's limit, where it warns, and past twice that
def test_an_image_larger_than_any_is_refused_by_name_before_it_is_decoded(side, tmp_path):
    write_images(tmp_path, count=3)
    bomb(tmp_path / "bomb.png", side)
    assert side**2 > Image.MAX_IMAGE_PIXELS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(files.ImageError, match=r"bomb\.png: .*decompression bomb"):
        files.read(str(tmp_path / "bomb.png"), Reading(1))
    with pytest.raises((InputError, files.ImageError), match=r"bomb\.png"):
        folder(tmp_path).read(3)
    assert "decompression bomb" in look_at(str(tmp_path / "bomb.png")).error
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000
    )  # KiB: a hundred million pixels are twice that


@pytest.mark.parametrize("how", ["cut", "lost", "pipe", "loop"])
def test_a_damaged_image_that_is_streamed_is_named_when_it_is_read(how, tmp_path):
    write_images(tmp_path, count=8)
    source = folder(tmp_path, memory_gb=0)
    assert source.images is None
    damage(tmp_path / "005.png", how)
    source.read(4)
    with pytest.raises(files.ImageError, match=re.escape(str(tmp_path / "005.png"))):
        source.read(5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_ends_a_run_with_one_line_that_names_it(cli, tmp_path, workers):
    write_images(tmp_path / "images", count=32)
    damage(tmp_path / "images" / "005.png", "cut")
    words = ("dataset=folder", "dataset.root=images", "dataset.memory_gb=0", f"trainer.workers={workers}")
    result = cli("pretrain", *QUICK, *words)
    assert result.status == 1
    assert "images/005.png" in result.err
    assert len(result.err.splitlines()) == 1, result.err


def test_a_workers_death_is_reported_where_its_batch_is_waited_for_alone():
    """torch raises it at any place, also where nothing can catch it: in the end of a fork, say."""
    reported, known = [], "DataLoader worker (pid 7) is killed by signal: Killed."
    for error in (RuntimeError(known), RuntimeError("another"), ValueError(known)):
        report_unless_noticed(reported.append, types.SimpleNamespace(exc_type=type(error), exc_value=error))
    assert [str(failure.exc_value) for failure in reported] == ["another", known]


def test_a_worker_whose_process_is_gone_shows_no_traceback_of_that():
    reported = []
    for error in (ConnectionResetError(104, "reset"), EOFError(), ValueError("another")):
        report_unless_cut_off(lambda *failure: reported.append(failure[1]), type(error), error, None)
    assert [str(error) for error in reported] == ["another"]


# --- In memory or streamed ---


@pytest.fixture
def mixed(tmp_path):
    """24 images of several sizes."""
    for number in range(3):
        write_images(tmp_path, str(number), count=8, size=(18 + 3 * number, 24), seed=number)
    return tmp_path


@pytest.fixture(params=["memory", "streamed", "mixed"])
def source(request, tmp_path):
    """24 images: in memory, of one size but streamed, of several sizes."""
    if request.param == "mixed":
        return folder(request.getfixturevalue("mixed"), image_size=16)
    built = folder(write_images(tmp_path, count=24, size=(20, 20)), 16, memory_gb=1 if request.param == "memory" else 0)
    assert (built.images is not None) == (request.param == "memory")
    return built


def test_images_in_memory_equal_those_read_one_by_one(tmp_path):
    write_images(tmp_path, count=20)
    held, streamed = folder(tmp_path), folder(tmp_path, memory_gb=0)
    assert streamed.images is None
    assert held.images.shape == (20, 3, 16, 16)
    for index in range(20):
        assert torch.equal(held.images[index], streamed.read(index))
        assert torch.equal(held.read(index), files.read(streamed.paths[index], Reading(3)))
    assert held.content_hash == streamed.content_hash


def test_memory_gb_bounds_what_is_kept_in_memory(tmp_path):
    write_images(tmp_path, count=4)
    size = 4 * 3 * 16 * 16 / 2**30
    assert folder(tmp_path, memory_gb=size).images is not None
    assert folder(tmp_path, memory_gb=size * 0.99).images is None


def all_batches(source, *, first_step=0, total_steps=8, workers=0, seed=3, augmentation="simclr"):
    """Batches of 6: with 24 images, four steps an epoch."""
    return list(drawn_batches(source, first_step, total_steps, workers, seed, augmentation))


def endless_batches(source, workers):
    return drawn_batches(source, 0, 10_000, workers, 3, "simclr")


def drawn_batches(source, first_step, total_steps, workers, seed, augmentation):
    return batches(
        source,
        ViewMaker(view_settings(augmentation), source.image_size),
        batch_size=6,
        seed=seed,
        first_step=first_step,
        total_steps=total_steps,
        workers=workers,
        device=torch.device("cpu"),
        clock=Clock(torch.device("cpu")),
    )


def assert_equal_batches(actual, expected):
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.label, theirs.label)
        assert torch.equal(ours.views["global"], theirs.views["global"])
        assert torch.equal(ours.key.uniform("mask", 5), theirs.key.uniform("mask", 5))


def test_batches_hold_each_image_once_an_epoch_and_other_views_every_epoch(source):
    built = all_batches(source)
    first, second = built[:4], built[4:]
    for epoch in (first, second):
        assert sorted(torch.cat([batch.index for batch in epoch]).tolist()) == list(range(24))
    assert torch.cat([b.index for b in first]).tolist() != torch.cat([b.index for b in second]).tolist()
    views = built[0].views["global"]
    assert views.shape == (2, 6, 3, 16, 16)
    assert 0 <= views.min() < views.max() <= 1
    assert not torch.equal(views[0], views[1])


def test_an_image_is_cut_otherwise_in_every_epoch(source):
    views = {}  # of crops and flips alone
    for step, batch in enumerate(all_batches(source, augmentation="linear")):
        pairs = zip(batch.index.tolist(), batch.views["global"][0], strict=True)
        views |= {(step // 4, index): view for index, view in pairs}
    assert not any(torch.equal(views[0, index], views[1, index]) for index in range(24))


def test_views_in_memory_and_streamed_agree_to_rounding(tmp_path):
    write_images(tmp_path, count=24, size=(20, 20))
    pair = [all_batches(folder(tmp_path, 16, memory_gb=memory), augmentation="linear") for memory in (1, 0)]
    for held, streamed in zip(*pair, strict=True):
        assert torch.equal(held.index, streamed.index)
        assert (held.views["global"] - streamed.views["global"]).abs().max() <= 1.5 / 255


@pytest.mark.parametrize("first_step", [1, 3, 4, 6])
def test_batches_are_the_same_for_a_start_in_mid_epoch(source, first_step):
    assert_equal_batches(all_batches(source, first_step=first_step), all_batches(source)[first_step:])


@pytest.mark.parametrize("first_step", [0, 3])
def test_streamed_batches_are_the_same_for_any_number_of_workers(mixed, first_step):
    source = folder(mixed, image_size=16)
    assert_equal_batches(all_batches(source, first_step=first_step, workers=2), all_batches(source)[first_step:])


def test_a_killed_worker_is_an_error_that_names_it(mixed):
    feed = endless_batches(folder(mixed, image_size=16), workers=1)
    next(feed)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=rf"DataLoader worker.*{worker.pid}"):
        list(feed)


def test_batches_are_others_for_another_seed(source):
    ours, theirs = (next(iter(all_batches(source, total_steps=1, seed=seed))) for seed in (3, 4))
    assert ours.index.tolist() != theirs.index.tolist()


def test_batches_draw_nothing_from_the_global_generator(source):
    before = torch.get_rng_state()
    all_batches(source, total_steps=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_clean_images_come_in_the_order_asked_for(source, workers):
    rows = torch.tensor([5, 0, 23, 7, 5])
    parts = list(clean_batches(source, rows, resize=18, batch_size=2, workers=workers))
    assert [len(part) for part in parts] == [2, 2, 1]
    images = torch.cat(parts)
    assert images.shape == (5, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert torch.equal(images[0], images[4])
    for row, image in zip(rows.tolist(), images, strict=True):
        assert torch.equal(next(clean_batches(source, [row], resize=18, batch_size=1, workers=0))[0], image)


def test_clean_images_are_the_same_in_memory_and_streamed(tmp_path):
    write_images(tmp_path, count=6, size=(20, 20))
    held, streamed = (folder(tmp_path, 16, memory_gb=memory) for memory in (1, 0))
    built = [torch.cat(list(clean_batches(s, range(6), resize=18, batch_size=4, workers=0))) for s in (held, streamed)]
    assert torch.equal(*built)


# --- The content hash ---


def test_the_content_hash_follows_the_files_and_not_their_place(tmp_path):
    root = write_images(tmp_path / "images", "a", count=4)
    hashes = [folder(root).content_hash]
    assert folder(root).content_hash == hashes[0]
    write_images(root, "b", count=1, seed=1)
    hashes.append(folder(root).content_hash)
    (root / "b" / "000.png").rename(root / "b" / "001.png")
    hashes.append(folder(root).content_hash)
    Image.new("RGB", (16, 16)).save(root / "b" / "001.png")  # another size in bytes
    hashes.append(folder(root).content_hash)
    assert len(set(hashes)) == 4
    (root / "b" / "001.png").unlink()
    assert folder(root).content_hash == hashes[0]
    root.rename(tmp_path / "moved")
    assert folder(tmp_path / "moved").content_hash == hashes[0]


@pytest.mark.parametrize("part", [0, 1])
def test_the_content_hash_of_images_in_memory_follows_images_and_labels(tmp_path, part):
    arrays = write_idx(tmp_path)["train"]
    before = sources.fashion_mnist("train", 28, str(tmp_path), False).content_hash
    changed = arrays[part].copy()
    changed[3] += 1
    (tmp_path / IDX_NAMES["train"][part]).write_bytes(idx(changed))
    assert sources.fashion_mnist("train", 28, str(tmp_path), False).content_hash != before


# --- Every dataset's file ---


def write_frames(root, videos=48):
    return write_images(root, *(f"{kind}/{number}" for kind in "ab" for number in range(videos // 2)), count=5)


def write_texts(root):
    root.mkdir()
    words = " ".join(f"word{number % 37}" for number in range(700))
    return [(root / f"{name}.txt").write_text(words) for name in "ab"]


MAKERS = {  # what a dataset needs on disk for two steps of 16 samples
    "cifar10": lambda root: write_cifar10(root, each=7),
    "fashion_mnist": lambda root: write_idx(root),
    "folder": lambda root: write_images(root, count=32),
    "frames": write_frames,
    "imagefolder": lambda root: write_images(root, "train/a", "train/b", "test/a", "test/b"),
    "text": write_texts,
}
TAKING = {  # which method takes a dataset's samples
    "frames": ("method=frame_order", "augmentation.global.flip=0", "backbone=mlp", "trainer.batch_size=16"),
    "text": ("method=masked_language", "backbone=small_transformer", "dataset.vocabulary=300"),
}


ELSEWHERE = ("sslctl.data.tables.", "sslctl.data.benchmarks.", "sslctl.data.packed.")  # what has tests of its own
NAMES = [
    file.stem
    for file in sorted((CONFIGS / "dataset").glob("*.yaml"))
    if not yaml.safe_load(file.read_text())["_target_"].startswith(ELSEWHERE)
]


@pytest.mark.parametrize("name", NAMES)
def test_every_dataset_takes_two_steps(cli, workdir, name):
    words = [f"dataset={name}", "run_dir=run"]
    if name in MAKERS:
        MAKERS[name](workdir / "images")
        words += ["dataset.root=images"]
    else:  # digits come with their images: two steps of half of them
        words += ["trainer.batch_size=700"]
    quick = [word for word in QUICK if name != "text" or not word.startswith("backbone")]
    result = cli("pretrain", *quick, *words, *TAKING.get(name, ()))
    assert result.status == 0, result.err
    assert (workdir / "run" / "checkpoints" / "step-2").is_dir(), result.out
    assert "done: run" in result.out


def test_downloads_go_to_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("SSLCTL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_home() == tmp_path / "cache" / "sslctl" / "data"
    monkeypatch.setenv("SSLCTL_DATA", str(tmp_path / "data"))
    assert data_home() == tmp_path / "data"


def test_a_download_that_breaks_off_is_refused_and_tried_again(monkeypatch, tmp_path):
    """A server promises 100,000 bytes and hangs up after 10."""
    asked = []

    class HangsUp(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()

        def do_GET(self):
            asked.append(self.path)
            self.do_HEAD()
            self.wfile.write(b"0123456789")

        def log_message(self, *_):
            pass

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), HangsUp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        for _ in range(2):
            before = len(asked)
            with pytest.raises(InputError, match="Fashion-MNIST cannot be fetched"):
                sources.fashion_mnist("train", 28, str(tmp_path / "data"), True)
            assert len(asked) > before
        server.shutdown()
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_not_there_is_refused_when_nothing_may_be_downloaded(tmp_path):
    for make in (
        lambda root: sources.fashion_mnist("train", 28, root, False),
        lambda root: sources.cifar10("train", 32, root, False, 1.0),
        lambda root: folder(root),
        lambda root: imagefolder(root),
    ):
        with pytest.raises(InputError, match="no such folder"):
            make(str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []
