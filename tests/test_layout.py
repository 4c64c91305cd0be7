"""What a folder of images is taken for: splits, classes, what is left out, and what of it is doubted aloud."""

import json
import os
import shlex
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from sslctl.data import listing, sources
from sslctl.data.files import ImageError
from sslctl.data.folders import FolderKeys
from sslctl.data.held_out import held_out_groups, held_out_names
from sslctl.data.layout import class_folders, training_layout, without_labels
from sslctl.data.listing import name_hash
from sslctl.data.overlap import doubts
from sslctl.errors import InputError
from sslctl.training import suggestion
from tests.conftest import QUICK, write_images


def imagefolder(root, split="train", **changes):
    keys = FolderKeys(str(root), **{"image_size": None, "channels": 3, "memory_gb": 1.0} | changes)
    return sources.imagefolder(split, keys)


def labels_of(layout):
    return {name: layout.classes[label] for name, label in zip(layout.names, layout.labels, strict=True)}


# --- Splits ---


@pytest.mark.parametrize(
    ("train", "test"), [("Training", "Testing"), ("TRAIN", "val"), ("train_set", "test-set"), ("trn", "validation")]
)
def test_split_folders_are_known_in_any_spelling(tmp_path, train, test):
    write_images(tmp_path, f"{train}/a", f"{train}/b", count=3)
    write_images(tmp_path, f"{test}/a", f"{test}/b", count=2)
    trained, judged = class_folders("train", str(tmp_path)), class_folders("test", str(tmp_path))
    assert (len(trained.names), len(judged.names), trained.classes) == (6, 4, ("a", "b"))
    assert (trained.origin, judged.origin) == (str(tmp_path / train), str(tmp_path / test))


def test_a_test_folder_without_classes_gives_way_to_a_labelled_one(tmp_path):
    write_images(tmp_path, "train/a", "train/b", "val/a", "val/b", "test", count=2)
    assert class_folders("test", str(tmp_path)).origin == str(tmp_path / "val")


def test_splits_are_named_by_a_key(tmp_path):
    write_images(tmp_path, "old/a", "old/b", "new/a", "new/b", "train/c", count=2)
    splits = {"train": "old", "test": "new"}
    trained, judged = (class_folders(split, str(tmp_path), splits) for split in ("train", "test"))
    assert (trained.listing.base.name, judged.listing.base.name, trained.classes) == ("old", "new", ("a", "b"))
    assert without_labels(str(tmp_path), {"train": "old"}).names == trained.names


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"train": "trian"},
            r"dataset\.splits\.train=trian: no such folder in .*; there are test, train \(nearest: train\)",
        ),
        ({"train": "train", "val": "test"}, r"expected \{train: FOLDER, test: FOLDER\}"),
        ({"test": "test"}, r"expected \{train: FOLDER, test: FOLDER\}"),
    ],
)
def test_wrong_splits_are_refused(tmp_path, splits, message):
    write_images(tmp_path, "train/a", "test/a", count=1)
    with pytest.raises(InputError, match=message):
        class_folders("train", str(tmp_path), splits)


def test_two_folders_that_may_be_a_split_are_refused_until_one_is_named(tmp_path):
    write_images(tmp_path, "Train/a", "training/a", "test/a", count=1)
    with pytest.raises(InputError, match=r"Train/ and training/ may both be the train split: say dataset\.splits="):
        class_folders("train", str(tmp_path))
    assert class_folders("train", str(tmp_path), {"train": "training", "test": "test"}).names == ["a/000.png"]


def test_every_class_of_two_images_or_more_has_one_held_out_and_one_to_train_on():
    names, classes = zip(
        *((f"{c:02d}/{n}.png", [c]) for c in range(60) for n in range(4 if c < 40 else c % 3)), strict=True
    )
    by_hash, is_test = (np.array([name_hash(n) % 5 == 0 for n in names]), held_out_names(names, classes))
    of = np.array([c for [c] in classes])
    lacking = [c for c in range(40) if not by_hash[of == c].any()]
    assert len(lacking) > 5  # what the hash alone leaves without
    for c in set(of.tolist()):
        count = int((of == c).sum())
        assert 1 <= is_test[of == c].sum() < count or (count == 1 and not is_test[of == c].any())
    whole = [c for c in range(40) if 0 < by_hash[of == c].sum() < 4]
    assert all((is_test == by_hash)[of == c].all() for c in whole)  # other images stay where they were


def test_no_class_of_several_an_image_loses_its_last_to_train_on_to_another():
    draw = np.random.default_rng(0)
    for _ in range(40):
        classes = [tuple({*draw.zipf(1.3, 3).clip(max=60).tolist()}) for _ in range(200)]
        is_test = held_out_names([f"{draw.integers(1 << 40)}" for _ in classes], classes)
        assert {c for own in classes for c in own} == {
            c for own, held in zip(classes, is_test, strict=True) if not held for c in own
        }


def test_held_out_groups_are_whole_and_near_a_fifth_of_each_class():
    draw = np.random.default_rng(0)
    groups = [f"patient {g}" for g in range(60) for _ in range(draw.integers(1, 9))]
    classes = [list(np.flatnonzero(draw.random(3) < (0.6, 0.3, 0.1))) for _ in groups]  # several each, or none
    is_test = held_out_groups(groups, classes)
    assert not set(np.array(groups)[is_test]) & set(np.array(groups)[~is_test])
    assert 0.17 < is_test.mean() < 0.23
    for c in range(3):
        own = np.array([c in row for row in classes])
        assert 0.15 < is_test[own].mean() < 0.25
    assert not held_out_groups(["a", "a", "b"], [[0], [0], [1]]).any()  # each alone has a class


def test_a_train_folder_alone_is_trained_on_whole_and_has_no_test_split(tmp_path):
    write_images(tmp_path, "train/a", "train/b", count=5)
    assert len(class_folders("train", str(tmp_path)).names) == 10
    with pytest.raises(InputError, match=r"dataset\.root=.*train holds out a fifth"):
        class_folders("test", str(tmp_path))
    write_images(tmp_path, "train/a", "train/b", count=40)
    parts = [class_folders(split, str(tmp_path / "train")).names for split in ("train", "test")]  # as it says
    assert len(parts[0]) + len(parts[1]) == 80


# --- Labels ---


def test_labels_in_file_names_are_found_by_a_pattern(tmp_path):
    for name in ("crazing_1", "crazing_2", "rolled-in_scale_1", "rolled-in_scale_17"):
        write_images(tmp_path, count=1)
        (tmp_path / "000.png").rename(tmp_path / f"{name}.png")
    splits = {"train": ".", "test": "."}
    actual = labels_of(class_folders("train", str(tmp_path), splits, r"(.+)_\d+"))
    assert actual == {
        "crazing_1.png": "crazing",
        "crazing_2.png": "crazing",
        "rolled-in_scale_1.png": "rolled-in_scale",
        "rolled-in_scale_17.png": "rolled-in_scale",
    }
    assert sources.folder("train", FolderKeys(str(tmp_path), 16, 3, 1.0, splits=splits, label=r"(.+)_\d+")).labelled
    assert not sources.folder("train", FolderKeys(str(tmp_path), 16, 3, 1.0)).labelled


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (r"(.+)_\d+", r"finds no label in 2 of 2 images of .* \(first: a/000\.png\)"),
        (r".+", r"expected a group in parentheses"),
        (r"(.+", r"is no regular expression: missing \)"),
    ],
)
def test_wrong_patterns_are_refused(tmp_path, label, message):
    write_images(tmp_path, "a", "b", count=1)
    with pytest.raises(InputError, match=message):
        class_folders("train", str(tmp_path), None, label)


def test_the_number_of_images_is_counted_as_they_are_trained_on(tmp_path):
    write_images(tmp_path, "Training/a", "Training/b", "Testing/a", "Testing/b", count=3)
    assert len(training_layout(str(tmp_path), True).names) == 6
    assert len(training_layout(str(tmp_path), False).names) == 12
    assert len(training_layout(str(tmp_path), False, {"train": "Training"}).names) == 6


# --- What is no image or no class ---


def test_hidden_and_empty_folders_are_no_classes_and_are_counted(tmp_path):
    write_images(tmp_path, "train/a", "train/b", "train/.ipynb_checkpoints", "train/__MACOSX/a", "test/a", "test/b")
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "a" / "._000.png").touch()
    (tmp_path / "train" / "a" / "notes.txt").touch()
    (tmp_path / "train" / "a" / "README").touch()
    source = imagefolder(tmp_path)
    assert (source.classes, len(source)) == (("a", "b"), 32)
    assert source.description.left_out == {"hidden folders": 2, "hidden files": 1, ".txt": 1, "without extension": 1}
    assert source.description.warnings == ("folders without images are no classes: empty",)


def test_masks_beside_the_images_are_said(tmp_path):
    """Folders of labels of pixels: by their own name, and by those of their pictures."""
    for part in ("test", "train", "val"):
        write_images(tmp_path / "scenes" / part, "images", count=3, suffix=".jpg")
        write_images(tmp_path / "scenes" / part, "masks", count=3)
    way = f"if they are masks, dataset=folder dataset.root={tmp_path}/scenes/train/images leaves them out"
    said = f"9 pictures in train/masks and 2 other folders have the names of those in train/images: {way}"
    assert said in without_labels(str(tmp_path / "scenes")).warnings
    said = f"3 pictures in masks have the names of those in images: {way}"
    assert said in class_folders("train", str(tmp_path / "scenes")).warnings
    assert len(without_labels(str(tmp_path / "scenes" / "train" / "images")).names) == 3
    # Classes with the same numbers in their files, and a folder of labels with other names, are none.
    write_images(tmp_path / "classes", "cats", "dogs", count=3)
    write_images(tmp_path / "apart", "images", "masks", count=3)
    for path in (tmp_path / "apart" / "masks").iterdir():
        path.rename(path.with_name(f"of {path.name}"))
    for name in ("classes", "apart"):
        assert not any("masks" in warning for warning in without_labels(str(tmp_path / name)).warnings)


def test_a_wrapper_folder_is_looked_through_and_named(tmp_path):
    write_images(tmp_path, "archive/images/a", "archive/images/b", count=40)
    (tmp_path / "README.md").touch()
    layout = class_folders("train", str(tmp_path))
    assert layout.classes == ("a", "b")
    assert layout.warnings == [
        f"{tmp_path} holds nothing but archive/images/, which is taken: dataset.root={tmp_path / 'archive' / 'images'}"
    ]
    assert class_folders("train", str(tmp_path / "archive" / "images")).names == layout.names  # as it says


def test_what_may_not_be_meant_is_said_with_the_key_that_answers(tmp_path):
    write_images(tmp_path / "one", "all", count=40)
    assert "one class (all)" in imagefolder(tmp_path / "one").description.warnings[0]
    write_images(tmp_path / "half", "test", "good", count=40)
    assert "class test has the name of a split" in imagefolder(tmp_path / "half").description.warnings[0]
    write_images(tmp_path / "tree", "train/a", "test/a", count=2)
    assert "test/ has the name of a test split" in without_labels(str(tmp_path / "tree")).warnings[0]


def test_a_run_inside_the_folder_is_no_data(tmp_path):
    write_images(tmp_path, "a", "runs/x/pictures", count=2)
    (tmp_path / "runs" / "x" / "sslctl-run.json").touch()
    layout = without_labels(str(tmp_path))
    assert layout.names == ["a/000.png", "a/001.png"]
    assert layout.listing.left_out == {"runs of sslctl": 1}


# --- Sizes and pixels ---


def test_the_size_follows_the_majority_and_never_one_file(tmp_path):
    write_images(tmp_path, "a", "b", count=40, size=(32, 32))
    Image.new("RGB", (33, 32)).save(tmp_path / "a" / "other.png")
    source = imagefolder(tmp_path)
    assert source.image_size == 32
    assert source.description.sizes == {(32, 32): len(source) - 1, (33, 32): 1}
    assert imagefolder(tmp_path, image_size=64).description.warnings == (
        "most images have 32×32 pixels, the network sees 64: dataset.image_size=32",
    )


def test_pixels_that_are_lost_or_invented_are_said(tmp_path):
    write_images(tmp_path, "a", "b", count=40)
    assert (
        "have colours, which are dropped: dataset.channels=3"
        in imagefolder(tmp_path, channels=1).description.warnings[0]
    )
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(path)
    source = imagefolder(tmp_path)
    assert source.description.pixels == {"8-bit grey": len(source)}
    grey, constant = source.description.warnings
    assert "dataset.channels=1 reads one" in grey
    assert constant == f"{len(source)} of {len(source)} images have one value throughout"


# --- Judged images among the trained ones ---


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])  # by pixels, by the files' bytes
def test_judged_images_among_the_trained_ones_are_counted_by_content(tmp_path, memory_gb):
    write_images(tmp_path, "train/a", "train/b", count=8, seed=1)
    write_images(tmp_path, "test/a", "test/b", count=4, seed=2)
    pair = [imagefolder(tmp_path, split, memory_gb=memory_gb) for split in ("train", "test")]
    assert doubts(*pair) == []
    shutil.copy(tmp_path / "train" / "b" / "003.png", tmp_path / "test" / "a" / "copy.png")
    pair[1] = imagefolder(tmp_path, "test", memory_gb=memory_gb)
    (warning,) = doubts(*pair)
    assert warning.startswith(f"1 of the 9 images that {tmp_path.name} is judged by are among those trained on")


# --- The plan, and data.json ---


def test_a_run_says_and_keeps_what_its_data_are(cli, workdir):
    write_images(workdir / "images", "Training/a", "Training/b", count=16)
    write_images(workdir / "images", "Testing/a", "Testing/b", count=4, seed=9)
    (workdir / "images" / "Training" / "list.txt").touch()
    result = cli("pretrain", *QUICK, "dataset=imagefolder", "dataset.root=images", "dataset.splits=null", "run_dir=run")
    assert result.status == 0, result.err
    for line in ("2 classes: a, b", "images/Training", "sizes 16×16; 8-bit RGB", "left out 1 .txt"):
        assert line in result.out
    data = json.loads((workdir / "run" / "data.json").read_text())
    assert data["train"]["classes"] == data["test"]["classes"] == ["a", "b"]
    assert (data["train"]["samples"], data["test"]["samples"]) == (32, 8)
    assert data["train"]["sizes"] == {"16x16": 32}
    printed = cli("knn-eval", "run", "plan_only=true")
    assert printed.status == 0, printed.err
    assert "images/Testing" in printed.out
    assert "warning" not in result.out + printed.err


def test_a_picture_is_not_written_among_the_images(cli, workdir):
    write_images(workdir / "images", count=4)
    refused = cli("views", "dataset=folder", "dataset.root=images", "out=images/views.png")
    assert refused.status == 2
    assert "would lie among the images of dataset.root=images: out=views.png" in refused.err
    assert len(list((workdir / "images").iterdir())) == 4
    assert cli("views", "dataset=folder", "dataset.root=images", "out=views.png").status == 0


def test_a_folder_is_listed_once_until_one_below_it_changes(tmp_path, monkeypatch):
    write_images(tmp_path, "train/a", "train/b", "test/a", "test/b", count=2)
    long_ago = [d for d in (tmp_path, *tmp_path.rglob("*")) if d.is_dir()]
    for directory in long_ago:
        os.utime(directory, (1e9, 1e9))
    listed = []
    listing_of = listing._scan
    monkeypatch.setattr(listing, "_scan", lambda base: listed.append(base.name) or listing_of(base))
    for split in ("train", "test", "train"):
        class_folders(split, str(tmp_path))
    assert listed == ["train", "test"]
    write_images(tmp_path, "train/a/deeper", count=1)
    assert len(class_folders("train", str(tmp_path)).names) == 5
    os.utime(tmp_path / "train/a/deeper", (1e9, 1e9))
    (tmp_path / "train/b/000.png").unlink()  # a change of this moment is looked for again
    assert len(class_folders("train", str(tmp_path)).names) == 4
    assert listed == ["train", "test", "train", "train"]


# --- Values of more than 8 bits ---


def deep_twins(root):
    """root/8 and root/12: the same 12-bit pixels, as 8 bits in two channels' worth of files and as 12 bits in 16-bit files."""
    generator = np.random.default_rng(0)
    for number in range(40):
        pixels = generator.integers(0, 4096, (12, 12), np.uint16)
        if number == 0:
            pixels[0, :2] = 0, 4095
        for name, values in (("8", (pixels / 4095 * 255).round().astype(np.uint8)), ("12", pixels)):
            (root / name / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / name / f"c{number % 2}" / f"{number}.png")
    return root / "8", root / "12"


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_12_bits_in_16_bit_files_keep_their_grey_levels(tmp_path, memory_gb):
    small, deep = deep_twins(tmp_path)
    settings = {"splits": {"train": ".", "test": "."}, "channels": 1, "memory_gb": memory_gb}
    plain, measured = imagefolder(small, **settings), imagefolder(deep, **settings)
    assert plain.reading.value_range is None
    assert measured.reading.value_range == (0.0, 4095.0)
    assert imagefolder(deep, range=12, **settings).content_hash == measured.content_hash
    for row in range(len(plain)):
        pixels = np.asarray(Image.open(measured.paths[row]))
        np.testing.assert_allclose(measured.read(row)[0], pixels / 4095, atol=1e-7)  # at full depth
        np.testing.assert_array_equal((measured.read(row) * 255).round(), plain.read(row))
    assert "16-bit grey, 0–4095 as 0–1; dataset.range=" in measured.description.lines()[1]
    window = imagefolder(deep, range=[1000, 2000], **settings)
    assert window.content_hash != measured.content_hash
    white = (np.asarray(Image.open(window.paths[0])) >= 2000).mean()
    assert (window.read(0) == 1).float().mean() == pytest.approx(white, abs=0.01)


@pytest.mark.parametrize(
    ("pixels", "expected"), [([[0.0, 0.5, 1.0]], [0, 0.5, 1]), ([[-2.0, np.nan, 2.0]], [0, 0.5, 1])]
)
def test_floating_point_and_negative_values_are_not_cut(tmp_path, pixels, expected):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.array(pixels, np.float32)).save(tmp_path / "a" / "0.tif")
    source = imagefolder(tmp_path, splits={"train": ".", "test": "."}, channels=1, image_size=8)
    assert source.read(0)[0, 0].tolist() == expected


@pytest.mark.parametrize("value", [0, 33, [1], [2, 1], "wide", [0, "b"]])
def test_a_wrong_range_is_refused(tmp_path, value):
    write_images(tmp_path, "a", "b", count=20)
    with pytest.raises(
        InputError, match=r"dataset\.range=.*: expected a number of bits, from 1 to 32, or \[low,high\]"
    ):
        imagefolder(tmp_path, range=value)


def test_a_run_keeps_its_range_of_values_in_every_evaluation(cli, workdir):
    _, deep = deep_twins(workdir)
    other = workdir / "other"
    shutil.copytree(deep, other)
    for path in other.rglob("*.png"):  # of which no value is above 1,000
        Image.fromarray(np.asarray(Image.open(path)) // 4).save(path)
    words = ("dataset=imagefolder", "dataset.root=12", "dataset.channels=1", "dataset.mean=[0.5]", "dataset.std=[0.25]")
    assert cli("pretrain", *QUICK, *words, "trainer.batch_size=8", "run_dir=run").status == 0
    assert json.loads((workdir / "run" / "preprocess.json").read_text())["value_range"] == [0.0, 4095.0]
    plan = cli("knn-eval", "run", *words[:1], "dataset.root=other", *words[2:], "plan_only=true")
    assert "0–4095 as 0–1" in plan.out, plan.err


@pytest.mark.parametrize("name", ["0.jpg", "0.png"])
def test_images_stand_upright_as_their_exif_says(tmp_path, name):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255  # the left half
    (tmp_path / "a").mkdir()
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[274] = 6  # the camera lay on its right side
    image.save(tmp_path / "a" / name, exif=exif, quality=100)
    source = imagefolder(tmp_path, splits={"train": ".", "test": "."}, image_size=8)
    assert source.description.sizes == {(8, 16): 1}
    assert source.read(0).shape == (3, 16, 8)
    assert source.read(0)[:, :8].min() > 250
    assert source.read(0)[:, 8:].max() < 5


# --- Files that cannot be read ---


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_another_image_stands_in_for_one_that_cannot_be_read(tmp_path, workdir, memory_gb):
    write_images(tmp_path / "images", "train/a", "train/b", count=8)
    whole = imagefolder(tmp_path / "images", memory_gb=memory_gb)
    bad = ["a/003.png", "a/007.png", "b/000.png", "b/007.png"]
    for name in bad:
        path = tmp_path / "images" / "train" / name
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises((InputError, ImageError), match=r"cannot read .*images/train/a/003\.png"):
        [imagefolder(tmp_path / "images", memory_gb=memory_gb).read(row) for row in range(16)]
    with pytest.raises(InputError, match=r"4 of 16 images in .* cannot be read .*dataset\.max_bad=0\.1 allows 1"):
        imagefolder(tmp_path / "images", memory_gb=memory_gb, on_error="skip", max_bad=0.1)
    source = imagefolder(tmp_path / "images", memory_gb=memory_gb, on_error="skip", max_bad=4)
    assert source.description.unreadable == tuple(bad)
    expected = {3: 4, 7: 9, 8: 9, 15: 0}  # the next that can be read
    assert len(source) == 16
    for row in range(16):
        other = expected.get(row, row)
        assert (source.read(row) == whole.read(other)).all()
        assert source.labels[row] == whole.labels[other]
    assert source.labels.tolist() == [0] * 7 + [1] * 8 + [0]
    again = imagefolder(tmp_path / "images", memory_gb=memory_gb, on_error="skip", max_bad=4)  # from what was kept
    assert (again.description.unreadable, again.content_hash) == (tuple(bad), source.content_hash)


# --- sslctl data ---


@pytest.mark.slow
def test_a_folder_is_looked_at_before_any_training(cli, workdir):
    write_images(workdir / "images", "train/a", "train/b", count=6, size=(24, 24), seed=1)
    write_images(workdir / "images", "test/a", "test/b", count=3, size=(24, 24), seed=2)
    train, test = workdir / "images" / "train", workdir / "images" / "test"
    shutil.copy(train / "a" / "001.png", test / "b" / "copy.png")
    Image.open(train / "b" / "002.png").save(train / "b" / "again.jpg", quality=95)
    (train / "a" / "005.png").write_bytes((train / "a" / "005.png").read_bytes()[:300])
    result = cli("data", "images", "dataset=imagefolder", "out=[audit.json,page.html]", "seconds=0")
    assert result.status == 0, result.err
    audit = json.loads((workdir / "audit.json").read_text())
    assert list(audit["unreadable"]) == ["images/train/a/005.png"]
    assert sorted(map(sorted, audit["copies"])) == [["images/test/b/copy.png", "images/train/a/001.png"]]
    assert audit["near"] == [["images/train/b/002.png", "images/train/b/again.jpg"]]
    assert audit["splits"]["train"]["classes"] == {"a": 6, "b": 7}
    assert "1 groups of alike images lie in both splits" in result.out
    assert "dataset.skip=audit.skip.txt lets others stand in for them" in result.out
    page = (workdir / "page.html").read_text()
    for words in (
        "images/train/a/005.png",
        "images/train/b/again.jpg",
        '<td class="num">7</td>',
        "data:image/png;base64,",
    ):
        assert words in page
    assert "http" not in page.replace("http-equiv", "")
    # The command that it suggests leaves the damaged file out, and can be planned.
    (line,) = (line for line in result.out.splitlines() if line.startswith("next "))
    words = shlex.split(line)[1:]
    assert words[:4] == ["sslctl", "pretrain", "dataset=imagefolder", "dataset.root=images"]
    assert words[4] == "dataset.skip=audit.skip.txt"
    assert (workdir / "audit.skip.txt").read_text() == "images/train/a/005.png\n"
    planned = cli(*words[1:], "plan_only=true", "trainer.device=cpu", "trainer.threads=1")
    assert planned.status == 0, planned.err
    assert "1 of 13 images cannot be read, or are to be skipped" in planned.out
    assert "no such file" in cli("pretrain", *words[2:4], "dataset.skip=none.txt", "plan_only=true").err.lower()


def suggested(result) -> list[str]:
    assert result.status == 0, result.err
    (line,) = (line for line in result.out.splitlines() if line.startswith("next "))
    return shlex.split(line)[1:]


def test_a_table_and_a_pack_are_looked_at_as_a_folder_is(cli, workdir):
    """The pack holds a damaged file, which has no stand-in there, and one of the table is named twice; labels are several."""
    write_images(workdir / "images", "a", "b", count=8, size=(24, 24), seed=1)
    paths = sorted(str(path.relative_to(workdir)) for path in (workdir / "images").rglob("*.png"))
    rows = [f"{path},{'x|y' if number % 4 == 0 else 'x'}" for number, path in enumerate([*paths, paths[3]])]
    (workdir / "table.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    result = cli(
        "data", "dataset=csv", "dataset.root=table.csv", "dataset.columns={split: null}", "seconds=0", "out=t.json"
    )
    words = suggested(result)
    assert words[:4] == ["sslctl", "pretrain", "dataset=csv", "dataset.root=table.csv"]
    audit = json.loads((workdir / "t.json").read_text())
    assert sum(split["images"] for split in audit["splits"].values()) == 17
    assert audit["splits"]["train"]["classes"]["x"] == audit["splits"]["train"]["images"]
    assert "x " in result.out
    (group,) = audit["copies"]
    assert [path.endswith(paths[3]) for path in group] == [True, True]

    pytest.importorskip("datasets")
    packed = cli("pack", "dataset=csv", "dataset.root=table.csv", "dataset.columns={split: null}", "out=p.pack")
    assert packed.status == 0, packed.err
    result = cli("data", "dataset=hf", "dataset.root=p.pack", "seconds=0", "out=[p.json,p.html]")
    assert suggested(result)[2:4] == ["dataset=hf", "dataset.root=p.pack"]
    of_pack = json.loads((workdir / "p.json").read_text())
    for split, own in of_pack["splits"].items():
        assert {name: own[name] for name in ("images", "classes")} == {
            name: audit["splits"][split][name] for name in ("images", "classes")
        }
    assert [path.partition("/")[0] for path in of_pack["copies"][0]] == ["p.pack"] * 2
    assert "data:image/png;base64," in (workdir / "p.html").read_text()
    assert cli(*suggested(result)[1:], "--cfg", "job").status == 0


def test_a_damaged_image_in_a_pack_is_named_and_left_out_of_the_page(cli, workdir):
    datasets = pytest.importorskip("datasets")
    write_images(workdir / "images", count=5, size=(24, 24), seed=1)
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted((workdir / "images").iterdir())]
    cells[2]["bytes"] = cells[2]["bytes"][:100]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk("pack")
    result = cli("data", "dataset=hf", "dataset.root=pack", "seconds=0", "out=[p.json,p.html]")
    assert result.status == 0, result.err
    assert list(json.loads((workdir / "p.json").read_text())["unreadable"]) == ["pack#2/002.png"]
    assert "tiles and packs can only do without them" in result.out
    assert "dataset.skip" not in result.out


def test_of_tiles_they_are_counted_and_their_images_may_be_huge(cli, workdir, monkeypatch):
    write_images(workdir / "scenes", count=2, size=(130, 200), seed=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # beyond which Pillow sees a bomb
    tiled = ("dataset.tiles={size: 32, stride: 32}", "seconds=0", "out=p.html")
    words = suggested(cli("data", "scenes", *tiled))
    assert "trainer.batch_size=8" in words  # of 48 tiles, not of 2 images
    assert not any(word.startswith("dataset.image_size") for word in words)
    assert "48 tiles of 32×32" in (workdir / "p.html").read_text()
    # Without tiles, the same images are too large to be meant.
    assert "can be read" in cli("data", "scenes", "seconds=0", "out=q.html").err


def test_what_the_suggested_command_takes_is_measured_or_why_not(monkeypatch):
    def ends(**outcome):
        monkeypatch.setattr("subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], **outcome))
        return suggestion.measure(["sslctl", "pretrain"], 9)

    out = "steps      3\ntime       5 ms a step\nspent on   all\nmemory     7 MiB\n"
    assert ends(returncode=0, stdout=out) == ["time       5 ms a step", "memory     7 MiB"]
    assert ends(returncode=2, stdout="", stderr="sslctl: no images\n") == ["time       not known: no images"]


def test_data_that_is_no_folder_is_refused(cli, workdir):
    assert cli("data", "dataset=digits").status == 2
    (workdir / "empty").mkdir()
    refused = cli("data", "dataset.root=empty")
    assert refused.status == 2
    assert "no images in empty" in refused.err
