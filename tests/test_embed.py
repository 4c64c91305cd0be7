"""sslctl embed: what is written is what the network gives, row by row, in every format."""

import csv
import json
import os
import shutil
import signal
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import sslctl
from sslctl.cli import main
from sslctl.evaluation import feature_files as tables
from sslctl.evaluation import features
from sslctl.evaluation.subjects import trained
from sslctl.models.backbones import SmallResNet
from sslctl.runs.checkpoint import load_tensors, newest_valid, save_tensors
from tests.conftest import QUICK, write_images


@pytest.fixture(scope="module")
def images(labelled_images):
    """The test images' paths in the order of the dataset, and their labels."""
    paths = sorted(labelled_images.glob("test/*/*.png"))
    return [str(path) for path in paths], [int(path.parent.name == "b") for path in paths]


@pytest.fixture(scope="module")
def wanted(finished_run, images):
    """(32, 8): the features of the test images, each taken alone from its file."""
    backbone, preprocess = sslctl.load(finished_run)
    with torch.no_grad():
        return torch.cat([backbone(preprocess(Image.open(path))[None]) for path in images[0]]).numpy()


@pytest.fixture
def embedded(cli):
    def run(*words, status=0):
        result = cli("embed", *words)
        assert result.status == status, result
        return result

    return run


def read(path):
    """name, split, index, label, class and features of a file, whatever its format."""
    if path.suffix == ".npz":
        held = np.load(path)  # without pickles
        classes = [held["classes"][label] if label >= 0 else "" for label in held["labels"]]
        parts = [held[name].tolist() for name in ("names", "split", "index", "labels")]
        return [*zip(*parts, classes, strict=True)], held["features"]
    if path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(path).to_pydict()
        features = np.array(table.pop("features"), np.float32)
        return [*zip(*table.values(), strict=True)], features
    with path.open(newline="", encoding="utf-8") as opened:
        header, *rows = csv.reader(opened)
    assert header[:5] == ["name", "split", "index", "label", "class"]
    return [(r[0], r[1], int(r[2]), int(r[3]), r[4]) for r in rows], np.array([r[5:] for r in rows], np.float32)


FORMATS = ("npz", "csv", "parquet")


@pytest.mark.parametrize("format", FORMATS)
def test_only_a_file_of_features_is_replaced_and_that_is_said(embedded, finished_run, tmp_path, format):
    out = tmp_path / f"x.{format}"
    out.write_text("mine")
    refused = embedded(finished_run, f"out={out}", status=2).err
    assert f"out={out}: there is a file already, that sslctl embed did not write" in refused
    assert out.read_text() == "mine"
    out.unlink()
    embedded(finished_run, f"out={out}")
    assert f"{out} was written by sslctl embed before: it is replaced" in embedded(finished_run, f"out={out}").out


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_the_networks_features_in_the_order_of_the_dataset(
    embedded, finished_run, images, wanted, tmp_path, format
):
    out = tmp_path / f"made.{format}"
    printed = embedded(finished_run, "split=test", f"out={out}", "batch_size=7").out  # the last batch is a short one
    rows, features = read(out)
    expected = [(path, "test", i, label, "ab"[label]) for i, (path, label) in enumerate(zip(*images, strict=True))]
    assert rows == expected
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, wanted, rtol=1e-5, atol=1e-6)
    assert features.std(0).max() > 0
    assert f"{out}: 32 rows × 8 backbone features, " in printed
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_formats_hold_the_same_numbers_to_the_bit(embedded, finished_run, tmp_path):
    actual = []
    for format in FORMATS:
        embedded(finished_run, f"out={tmp_path}/x.{format}")
        actual.append(read(tmp_path / f"x.{format}"))
    assert all(rows == actual[0][0] and np.array_equal(features, actual[0][1]) for rows, features in actual)


def test_a_file_says_where_its_features_come_from(embedded, finished_run, tmp_path):
    embedded(finished_run, f"out={tmp_path}/x.npz", "split=test", "features=projector")
    held = np.load(tmp_path / "x.npz")
    printed = json.loads(str(held["about"]))
    subject = trained(finished_run, newest_valid(finished_run), "projector")
    assert printed["weights_sha256"] == subject.weights_sha256
    assert (printed["features"], printed["split"]) == ("projector", "test")
    assert held["classes"].tolist() == ["a", "b"]
    assert held["features"].shape[1] == subject.function(torch.zeros(2, 3, 16, 16)).shape[1] != 8


def test_all_is_both_splits_one_after_the_other(embedded, finished_run):
    run = finished_run
    embedded(run, "split=all")
    (built,) = (run / "embeddings").glob("*-all.npz")
    held = np.load(built)
    assert held["split"].tolist() == ["train"] * 32 + ["test"] * 32
    assert held["index"].tolist() == [*range(32)] * 2
    shutil.rmtree(run / "embeddings")


@pytest.mark.parametrize("split", ["train", "all"])
def test_images_without_labels_get_minus_one(embedded, finished_run, tmp_path, split):
    root = write_images(tmp_path / "loose", count=5)
    embedded(finished_run, "dataset=folder", f"dataset.root={root}", f"split={split}", f"out={tmp_path}/x.csv")
    rows, _ = read(tmp_path / "x.csv")
    assert [(name, label, kind) for name, _, _, label, kind in rows] == [
        (f"{root}/{number:03d}.png", -1, "") for number in range(5)
    ]


def test_images_in_memory_are_named_by_their_number(embedded, tmp_path):
    torch.manual_seed(0)
    torch.save(SmallResNet([4, 8], 1, 0, "batch", 1, 16).state_dict(), tmp_path / "w.pth")
    words = ("backbone=small_resnet", "backbone.widths=[4,8]", f"backbone.weights={tmp_path}/w.pth", "dataset=digits")
    embedded(*words, "split=test")
    held = np.load(tmp_path / "runs" / "digits" / "given" / "embeddings" / "digits-test.npz")
    assert held["names"][3] == "digits test image 3"
    assert held["features"].shape == (359, 8)


def test_names_that_are_no_utf8_are_escaped(embedded, finished_run, tmp_path):
    root = write_images(tmp_path / "odd", count=1)
    os.rename(root / "000.png", os.fsencode(root) + b"/\xff,\n.png")
    for format in FORMATS:
        embedded(finished_run, "dataset=folder", f"dataset.root={root}", f"out={tmp_path}/x.{format}")
        assert read(tmp_path / f"x.{format}")[0][0][0] == f"{root}/\\xff,\n.png"


def test_worker_processes_change_nothing(embedded, finished_run, labelled_images, wanted, tmp_path):
    files = ("dataset=imagefolder", f"dataset.root={labelled_images}", "dataset.memory_gb=0", "dataset.image_size=16")
    embedded(finished_run, "split=test", f"out={tmp_path}/x.npz", "workers=1", *files)
    np.testing.assert_allclose(np.load(tmp_path / "x.npz")["features"], wanted, rtol=1e-5, atol=1e-6)


def test_row_groups_of_parquet_stay_small(tmp_path, monkeypatch):
    files = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(tables, "_GROUP", 100 * 4 * 4)
    with tables.parquet(tmp_path / "x.parquet", tables.About(1000, 4, (), "{}")) as write:
        for start in range(0, 1000, 25):
            index = np.arange(start, start + 25)
            features = np.repeat(index[:, None], 4, 1).astype(np.float32)
            write(tables.Rows(features, index, np.full(25, -1), [str(i) for i in index], "train"))
    held = files.ParquetFile(tmp_path / "x.parquet")
    assert [held.metadata.row_group(i).num_rows for i in range(held.num_row_groups)] == [100] * 10
    assert held.read().to_pydict()["features"][777] == [777.0] * 4


def test_features_that_are_written_are_not_kept(tmp_path):
    """40 MB of features; what may be kept is a name and two numbers a row."""
    index = np.arange(100)
    tracemalloc.start()
    try:
        with tables.npz(tmp_path / "x.npz", tables.About(2_000, 5_000, (), "{}")) as write:
            for _ in range(20):
                write(tables.Rows(np.ones((100, 5_000), np.float32), index, index - 200, ["name"] * 100, "train"))
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


# --- What goes wrong on the way ---


def test_a_bad_image_leaves_no_file(embedded, finished_run, tmp_path):
    root = write_images(tmp_path / "bad", count=6)
    Image.new("RGB", (20, 16)).save(root / "000.png")  # of another size: the images are not read beforehand
    (root / "004.png").write_bytes((root / "004.png").read_bytes()[:60])
    out = tmp_path / "made" / "x.npz"
    embedded(finished_run, f"out={out}")
    older = out.read_bytes()
    words = ("dataset=folder", f"dataset.root={root}", "dataset.image_size=16", "batch_size=2", f"out={out}")
    assert "004.png" in embedded(finished_run, *words, status=1).err
    assert [path.name for path in out.parent.iterdir()] == ["x.npz"]
    assert out.read_bytes() == older


def test_a_signal_leaves_no_file(embedded, finished_run, tmp_path, monkeypatch):
    real = features.clean_batches

    def batches(*words, **keywords):
        for batch in real(*words, **keywords):
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(features, "clean_batches", batches)
    embedded(finished_run, f"out={tmp_path}/x.npz", status=143)
    assert list(tmp_path.iterdir()) == []


def test_features_that_are_no_numbers_are_counted(embedded, finished_run, tmp_path):
    tensors = load_tensors(finished_run / "backbone.safetensors")
    save_tensors(tmp_path / "w.safetensors", tensors | {"std": torch.zeros(1, 3, 1, 1)})
    root = write_images(tmp_path / "own", "a", "b", count=8)
    images = ("dataset=imagefolder", f"dataset.root={root}", "dataset.image_size=16", f"out={tmp_path}/x.npz")
    printed = embedded("backbone=mlp", "backbone.widths=[8]", f"backbone.weights={tmp_path}/w.safetensors", *images).out
    assert "of these rows have features that are not finite numbers" in printed


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("format=npy",), ("format=npy", "nearest: npz")),
        (("out=x.txt",), ("out=x.txt", ".npz, .csv, .parquet")),
        (("out=x.csv", "format=npz"), ("ends in .csv, format=npz",)),
        (("split=tset",), ("split=tset", "nearest: test")),
        (("features=projecter",), ("features=projecter", "backbone, projector")),
        (("dataset=digits",), ("takes 3×16×16", "name other images")),
        (("out=/proc/none/x.npz",), ("out=/proc/none/x.npz cannot be written",)),
        (("backbone=mlp",), ("not both",)),
        (("dataset=folder", "dataset.root=nowhere"), ("dataset.root=nowhere", "no such folder")),
    ],
)
def test_bad_input_is_refused_in_a_line(embedded, finished_run, workdir, words, fragments):
    result = embedded(finished_run, *words, status=2)
    assert len(result.err.splitlines()) == 1, result.err
    assert all(fragment in result.err for fragment in fragments), result.err
    assert list(workdir.iterdir()) == []


def test_unlabelled_images_have_no_test_split(embedded, finished_run, tmp_path):
    root = write_images(tmp_path / "loose", count=2)
    printed = embedded(finished_run, "dataset=folder", f"dataset.root={root}", "split=test", status=2).err
    assert "no labels" in printed


def test_parquet_says_which_package_is_missing(embedded, finished_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    printed = embedded(finished_run, "format=parquet", status=2).err
    assert "needs pyarrow: pip install 'sslctl[parquet]'" in printed


def test_texts_are_embedded(embedded, tmp_path):
    folder = tmp_path / "texts"
    for kind in ("a", "b"):
        (folder / kind).mkdir(parents=True)
        numbers = np.random.default_rng(ord(kind)).integers(0, 1000, 600)
        (folder / kind / "words.txt").write_text(" ".join(map(str, numbers)))
    tiny = (
        "backbone.embed_dim=8",
        "backbone.depth=1",
        "backbone.heads=2",
        "dataset.vocabulary=300",
        "dataset.length=16",
    )
    other = [word for word in QUICK if not word.startswith(("backbone", "method"))]
    run = tmp_path / "run"
    words = ("method=masked_language", f"dataset.root={folder}", *tiny, f"run_dir={run}")
    assert main(["pretrain", *other, *words]) == 0
    embedded(run, "split=all", f"out={tmp_path}/x.npz")
    held = np.load(tmp_path / "x.npz")
    assert held["features"].shape == (len(held["labels"]), 8)
    assert set(held["labels"].tolist()) == {0, 1}
    assert held["names"][0] == f"{folder}/a/words.txt, text 0"


@pytest.mark.parametrize("workers", [0, 1])
def test_folders_that_are_read_ahead_are_embedded_whole(embedded, finished_run, tmp_path, workers):
    """Batches of fewer images than asked for: the rows' names must still be their own."""
    root = write_images(tmp_path / "many", count=150)
    data = ("dataset=folder", f"dataset.root={root}", "dataset.memory_gb=0", f"workers={workers}")
    embedded(finished_run, *data, f"out={tmp_path}/x.csv")
    rows, features = read(tmp_path / "x.csv")
    assert [row[0] for row in rows] == [str(path) for path in sorted(root.glob("*.png"))]
    backbone, preprocess = sslctl.load(finished_run)
    with torch.no_grad():
        last = backbone(preprocess(Image.open(rows[-1][0]))[None]).numpy()[0]
    np.testing.assert_allclose(features[-1], last, rtol=1e-4, atol=1e-5)


def test_weights_that_were_loaded_in_part_are_not_handed_on(embedded, finished_run, tmp_path):
    weights = f"backbone.weights={finished_run / 'backbone.safetensors'}"
    words = ("backbone=mlp", "backbone.widths=[8]", weights, "backbone.partial=true", "dataset=digits")
    assert "backbone.partial=true: weights of which only some were loaded" in embedded(*words, status=2).err
