"""Published benchmarks: each read from a small copy of its archive's layout, as torchvision reads it or as its authors say."""

import gzip
import re
import struct

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
import yaml
from PIL import Image

from sslctl.config.schema import CONFIGS
from sslctl.data import benchmarks, sources
from sslctl.data.downloads import download_by
from sslctl.data.mapped import MappedImages
from sslctl.errors import InputError
from tests.conftest import QUICK, write_images

DRAW = np.random.default_rng(0)
BOTH = ("train", "test")


def node(name, **changes):
    """A benchmark's own configuration, without what sslctl reads itself."""
    own = yaml.safe_load((CONFIGS / "dataset" / f"{name}.yaml").read_text())
    left_out = ("_target_", "defaults", "drops", "mean", "std", "scale", "resize")
    return {key: value for key, value in own.items() if key not in left_out} | {"download": False} | changes


def read(name, root, split="train", **changes):
    return benchmarks.benchmark(split, **node(name, root=str(root), **changes))


def pixels(*shape):
    return DRAW.integers(0, 256, shape, dtype=np.uint8)


def write_idx(path, array, kind=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes())


def write_cifar(path, labels, images):
    """labels: (N, 1 or 2)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.concatenate([labels, images.reshape(len(images), -1)], 1).astype(np.uint8).tobytes())


def same(source, images, labels):
    assert np.array_equal(torch.stack([source.read(row) for row in range(len(source))]).numpy(), images)
    assert source.labels.tolist() == list(labels)


# --- Files of bytes ---


@pytest.mark.parametrize(("name", "of"), [("mnist", "MNIST"), ("kmnist", "KMNIST")])
def test_the_family_of_mnist_is_what_torchvision_reads(tmp_path, name, of):
    for stem, count in (("train", 12), ("t10k", 7)):
        write_idx(tmp_path / of / "raw" / f"{stem}-images-idx3-ubyte", pixels(count, 28, 28))
        write_idx(tmp_path / of / "raw" / f"{stem}-labels-idx1-ubyte", DRAW.integers(0, 10, count, dtype=np.uint8))
    for split in BOTH:
        theirs = getattr(torchvision.datasets, of)(str(tmp_path), train=split == "train")
        same(read(name, tmp_path, split), theirs.data[:, None].numpy(), theirs.targets.tolist())


def test_emnist_stands_upright_and_its_letters_are_torchvisions(tmp_path):
    for part, largest in (("balanced", 47), ("letters", 26)):
        images, labels = pixels(40, 28, 28), DRAW.integers(0, largest, 40, dtype=np.uint8) + (part == "letters")
        stem = tmp_path / "EMNIST" / "raw" / f"emnist-{part}-train"
        write_idx(stem.with_name(stem.name + "-images-idx3-ubyte"), images)
        write_idx(stem.with_name(stem.name + "-labels-idx1-ubyte"), labels)
        theirs, ours = torchvision.datasets.EMNIST(str(tmp_path), split=part), read("emnist", tmp_path, part=part)
        same(ours, images.transpose(0, 2, 1)[:, None], labels - (part == "letters"))
        assert [ours.classes[n] for n in ours.labels] == [theirs.classes[n] for n in theirs.targets]
    for part, classes in torchvision.datasets.EMNIST.classes_split_dict.items():
        assert list(benchmarks.pixels.EMNIST[part]) == [c for c in classes if c != "N/A"]


def test_qmnist_has_the_test_images_that_mnist_left_out(tmp_path):
    images, labels = pixels(10_003, 2, 2), DRAW.integers(0, 10, (10_003, 8)).astype(">i4")
    write_idx(tmp_path / "qmnist-test-images-idx3-ubyte", images)
    write_idx(tmp_path / "qmnist-test-labels-idx2-int.gz", labels, kind=12)
    same(read("qmnist", tmp_path, "test", part="test50k", image_size=2), images[10_000:, None], labels[10_000:, 0])
    assert len(read("qmnist", tmp_path, "test", part="test10k", image_size=2)) == 10_000


def test_cifar_of_both_kinds_and_the_older_reader_have_the_same_bits(tmp_path):
    images, labels = pixels(20, 3, 32, 32), DRAW.integers(0, 10, (20, 1))
    for number in range(5):
        rows = slice(4 * number, 4 * number + 4)
        write_cifar(tmp_path / "cifar-10-batches-bin" / f"data_batch_{number + 1}.bin", labels[rows], images[rows])
    older = sources.cifar10("train", 32, str(tmp_path), False, 1.0)
    ours = benchmarks.benchmark("train", "cifar10", str(tmp_path), False, 32, 3, 1.0)
    same(ours, images, labels[:, 0])
    assert (ours.content_hash, ours.classes) == (older.content_hash, older.classes)
    # Of a hundred classes: a coarse label before the fine one, which counts.
    both = np.stack([DRAW.integers(0, 20, 20), DRAW.integers(0, 100, 20)], 1)
    write_cifar(tmp_path / "cifar-100-binary" / "train.bin", both, images)
    (tmp_path / "cifar-100-binary" / "fine_label_names.txt").write_text("\n".join(f"kind{n}" for n in range(100)))
    same(read("cifar100", tmp_path), images, both[:, 1])


def test_svhn_is_what_torchvision_reads_with_the_easier_images_where_asked(tmp_path, monkeypatch):
    for name, count in (("train", 5), ("extra", 3)):
        data = {"X": pixels(32, 32, 3, count), "y": DRAW.integers(1, 11, (count, 1), dtype=np.uint8)}
        scipy.io.savemat(tmp_path / f"{name}_32x32.mat", data)
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    theirs = [torchvision.datasets.SVHN(str(tmp_path), split=split) for split in ("train", "extra")]
    same(read("svhn", tmp_path), theirs[0].data, theirs[0].labels)
    both = read("svhn", tmp_path, part="train+extra")
    same(both, np.concatenate([t.data for t in theirs]), np.concatenate([t.labels for t in theirs]))


def write_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for name, count in (("train", 4), ("unlabeled", 6), ("test", 3)):
        (folder / f"{name}_X.bin").write_bytes(pixels(count, 3, 96, 96).tobytes())
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(DRAW.integers(1, 11, count, dtype=np.uint8).tobytes())
    return root


def test_stl10_is_what_torchvision_reads_in_memory_and_from_its_files(tmp_path, monkeypatch):
    write_stl10(tmp_path)
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    for part, theirs in (("train+unlabelled", "train+unlabeled"), ("unlabelled", "unlabeled"), ("train", "train")):
        expected = torchvision.datasets.STL10(str(tmp_path), split=theirs)
        for memory_gb in (1.0, 0):
            ours = read("stl10", tmp_path, part=part, memory_gb=memory_gb)
            same(ours, expected.data, expected.labels)
            assert isinstance(ours, MappedImages) == (memory_gb == 0)
    labelled = read("stl10", tmp_path, memory_gb=0).labelled_part()
    assert (len(labelled), labelled.labelled) == (4, True)
    same(labelled, expected.data, expected.labels)


def test_cifar10_and_stl10_as_one_set_are_judged_on_either(tmp_path):
    write_stl10(tmp_path)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        write_cifar(
            tmp_path / "cifar-10-batches-bin" / f"{name}.bin", DRAW.integers(0, 10, (2, 1)), pixels(2, 3, 32, 32)
        )
    stl10, cifar = (read("stl10", tmp_path), sources.cifar10("train", 32, str(tmp_path), False, 1.0))

    def both(split, **changes):
        return benchmarks.cifar10_stl10(split, **node("cifar10_stl10", root=str(tmp_path), **changes))

    for judge, labelled, test in (("stl10", stl10, 3), ("cifar10", cifar, 2)):
        in_memory, mapped = (both("train", judge=judge, memory_gb=gb) for gb in (1.0, 0))
        same(mapped, in_memory.images.numpy(), in_memory.labels.tolist())
        assert (len(mapped), mapped.read(0).shape, len(both("test", judge=judge))) == (20, (3, 96, 96), test)
        part = in_memory.labelled_part()
        assert part.classes == labelled.classes
        assert part.labels.tolist() == labelled.labels[labelled.labels >= 0].tolist()
    grey = both("train", channels=1, memory_gb=0)
    expected = Image.fromarray(stl10.read(2).permute(1, 2, 0).numpy()).convert("L")
    assert np.array_equal(grey.read(2)[0].numpy(), np.asarray(expected))
    with pytest.raises(InputError, match=r"dataset\.judge=stl: expected stl10 or cifar10 \(nearest: stl10\)"):
        both("train", judge="stl")


# --- Image files ---


def test_eurosat_holds_a_fifth_out(tmp_path):
    write_images(tmp_path, "eurosat/2750/AnnualCrop", "eurosat/2750/Forest", count=10, size=(64, 64), suffix=".jpg")
    train, test = (read("eurosat", tmp_path, split) for split in BOTH)
    assert (len(train) + len(test), train.classes) == (20, ("AnnualCrop", "Forest"))
    assert not set(train.paths) & set(test.paths)


def test_oxford_pets_is_what_torchvision_reads(tmp_path):
    folder = write_images(tmp_path / "oxford-iiit-pet" / "images", suffix=".jpg", count=6).parent
    (folder / "annotations").mkdir()
    breeds = ["Abyssinian", "great_pyrenees", "Abyssinian"] * 2
    rows = []
    for number, breed in enumerate(breeds):
        (folder / "images" / f"{number:03d}.jpg").rename(folder / "images" / f"{breed}_{number}.jpg")
        rows.append(f"{breed}_{number} {1 + (breed != 'Abyssinian')} 1 1")
    for name, own in (("trainval", rows[:4]), ("test", rows[4:])):
        (folder / "annotations" / f"{name}.txt").write_text("\n".join(own) + "\n")
    for split, name in zip(BOTH, ("trainval", "test"), strict=True):
        theirs, ours = (
            torchvision.datasets.OxfordIIITPet(str(tmp_path), split=name),
            read("oxford_pets", tmp_path, split),
        )
        assert list(ours.paths) == [str(path) for path in theirs._images]
        assert ours.labels.tolist() == theirs._labels
        assert [c.title() for c in ours.classes] == theirs.classes


def test_imagenette_and_imagenet_take_class_lists(tmp_path):
    ids = ("n01440764", "n02102040", "n02979186")
    for folder in ("imagenette2-160", "imagenet"):
        write_images(tmp_path / folder, *(f"{split}/{name}" for split in ("train", "val") for name in ids), count=2)
    assert read("imagenette", tmp_path).classes == ("tench", "English springer", "cassette player")
    (tmp_path / "list.txt").write_text("n02102040\nn02979186\n")
    for name in ("imagenette", "imagenet"):
        cut = read(name, tmp_path, "test", class_list=str(tmp_path / "list.txt"))
        assert (len(cut), len(cut.classes)) == (4, 2)
        assert {cut.classes[n] for n in cut.labels} == set(cut.classes)
    by_id = {path.split("/")[-2]: cut.classes[n] for path, n in zip(cut.paths, cut.labels.tolist(), strict=True)}
    assert by_id == {name: name for name in ids[1:]}
    (tmp_path / "list.txt").write_text("n02102041\n")
    with pytest.raises(InputError, match=r"class n02102041 is none of the 3 \(nearest: n02102040\)"):
        read("imagenet", tmp_path, class_list=str(tmp_path / "list.txt"))


def test_tiny_imagenet_is_read_by_its_annotations(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    write_images(folder, "train/n01/images", "train/n02/images", "val/images", count=3, size=(64, 64), suffix=".JPEG")
    (folder / "wnids.txt").write_text("n02\nn01\n")
    (folder / "words.txt").write_text("n01\tfish\nn02\tdog, hound\nn03\tcar\n")
    (folder / "val" / "val_annotations.txt").write_text("000.JPEG\tn02\t0\t0\t9\t9\n001.JPEG\tn01\t0\t0\t9\t9\n")
    train, test = (read("tiny_imagenet", tmp_path, split) for split in BOTH)
    assert (train.classes, train.labels.tolist()) == (("fish", "dog, hound"), [0, 0, 0, 1, 1, 1])
    assert [(path[-8:], label) for path, label in zip(test.paths, test.labels.tolist(), strict=True)] == [
        ("000.JPEG", 1),
        ("001.JPEG", 0),
    ]


def test_places365_is_read_by_its_lists(tmp_path):
    write_images(tmp_path, "data_256_standard/a/attic", "data_256_standard/b/bar", "val_256", count=2, suffix=".jpg")
    (tmp_path / "categories_places365.txt").write_text("/a/attic 0\n/b/bar 1\n")
    lines = ["/a/attic/000.jpg 0", "/b/bar/001.jpg 1", "/b/bar/000.jpg 1"]
    (tmp_path / "places365_train_standard.txt").write_text("\n".join(lines))
    (tmp_path / "places365_val.txt").write_text("001.jpg 1\n")
    train, test = (read("places365", tmp_path, split) for split in BOTH)
    assert (train.classes, train.labels.tolist(), test.labels.tolist()) == (("/a/attic", "/b/bar"), [0, 1, 1], [1])
    assert [path.partition("standard")[2] for path in train.paths] == [line.split()[0] for line in lines]
    (tmp_path / "places365_val.txt").write_text("002.jpg 1\n")
    with pytest.raises(InputError, match=r"places365_val\.txt: 002\.jpg|val_256/002\.jpg and 0 others are not there"):
        read("places365", tmp_path, "test")


# --- What is missing or wrong ---

NAMES = sorted(
    file.stem
    for file in (CONFIGS / "dataset").glob("*.yaml")
    if yaml.safe_load(file.read_text())["_target_"].startswith("sslctl.data.benchmarks.")
)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_root_is_refused_with_what_is_looked_for(tmp_path, name):
    own = node(name, root=str(tmp_path))
    call = benchmarks.cifar10_stl10 if "judge" in own else benchmarks.benchmark
    with pytest.raises(InputError, match=rf"no \S+ in {re.escape(str(tmp_path))}.*dataset\.root=FOLDER"):
        call("train", **own)
    assert set(benchmarks.ARCHIVES) <= {*NAMES, "cifar10"}


def test_words_that_are_none_get_the_nearest(tmp_path):
    with pytest.raises(InputError, match=r"dataset\.archive=slt10: expected .* \(nearest: stl10\)"):
        read("stl10", tmp_path, archive="slt10")
    with pytest.raises(InputError, match=r"dataset\.part=unlabeled: expected .* \(nearest: unlabelled\)"):
        read("stl10", tmp_path, part="unlabeled")


def test_a_download_that_fails_leaves_no_folder_and_says_what_to_do(tmp_path):
    def fetch(place):
        (place / "KMNIST" / "raw").mkdir(parents=True)
        raise OSError(101, "Network is unreachable")

    (tmp_path / "old").mkdir()
    with pytest.raises(
        InputError, match=r"kmnist cannot be fetched .*: put its files into a folder, dataset\.root=FOLDER"
    ):
        download_by("kmnist", tmp_path / "new", fetch)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_set_with_images_without_labels_is_trained_on_whole_and_judged_by_the_rest(tmp_path, cli):
    write_stl10(tmp_path)
    words = (
        "dataset=stl10",
        "dataset.root=.",
        "dataset.memory_gb=0",
        "trainer.batch_size=5",
        "run_dir=run",
        "probe.lr=[0.1]",
    )
    done = cli("pretrain", *QUICK, *words, "evaluation.closing=true", "dataset.image_size=16")
    assert done.status == 0, done.err
    assert "10 images of 3×16×16" in done.out
    assert "stl10, test split (3 images)" in done.out
