"""sslctl predict: what a kept classifier says of new images is what its evaluation judged, image by image."""

import csv
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import sslctl
from sslctl.cli import main
from sslctl.evaluation import features
from sslctl.evaluation.multi_label import mean_average_precision
from sslctl.runs.classifiers import choose, kept_in
from tests.conftest import QUICK
from tests.runs import PROBE, results, unsigned_metadata

CLASSES = ("dim", "grey", "light")
KINDS = {"linear": "linear-cached", "knn": "knn", "finetune": "finetune"}
EVALUATE = ("device=cpu", "cache=false", "subjects=[trained]")


def write_classes(root, splits, count):
    """Noise of three brightnesses that overlap, of several sizes, so that it is resized and cut."""
    generator = np.random.default_rng(0)
    for split in splits:
        for number in range(3 * count):
            folder = root / split / CLASSES[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            brightness = generator.normal(60 + 60 * (number % 3), 45)
            pixels = generator.normal(brightness, 40, (*generator.integers(18, 30, 2), 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")
    return root


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("classes"), ("train", "test"), 20)


@pytest.fixture(scope="module")
def judged(labelled, tmp_path_factory):
    """A run with the three kinds of classifiers. To be read only."""
    run = tmp_path_factory.mktemp("judged") / "run"
    data = ("dataset=imagefolder", f"dataset.root={labelled}", "dataset.image_size=16")
    closing = ("evaluation.closing=true", "evaluation.knn.k=7", *PROBE)
    assert main(["pretrain", *QUICK, *data, *closing, f"run_dir={run}"]) == 0
    small = ("trainer.epochs=2", "least_steps=20", "layer_decay=1", "trainer.batch_size=16", "trainer.device=cpu")
    assert main(["finetune", str(run), "subjects=[trained]", *small, "trainer.threads=1"]) == 0
    return run


@pytest.fixture(scope="module")
def flat(labelled, tmp_path_factory):
    """The test images without their folders: <class>-<number>.png."""
    folder = tmp_path_factory.mktemp("flat")
    for path in labelled.glob("test/*/*.png"):
        shutil.copy(path, folder / f"{path.parent.name}-{path.name}")
    return folder


@pytest.fixture
def own(judged, workdir):
    """A copy of the run, that may be changed."""
    return shutil.copytree(judged, workdir / "own", symlinks=True)


@pytest.fixture
def predicted(cli, workdir):
    """predicted(run, *words): the rows of the file, and what the command printed."""

    def rows(run, *words, out="x.csv"):
        result = cli("predict", run, "device=cpu", f"out={workdir / out}", *words)
        assert result.status == 0, result.err
        with (workdir / out).open(newline="", encoding="utf-8") as opened:
            return list(csv.DictReader(opened)), result.out

    return rows


def reported(run, kind, metric="top1"):
    """The number of test images that an evaluation found to be right."""
    (line,) = (
        line
        for line in results(run / "results.jsonl")
        if (line["protocol"], line["metric"], line["subject"]) == (KINDS[kind], metric, "trained")
    )
    return round(line["value"] * line["images"]), line


def class_in(name):
    return os.path.basename(name).partition("-")[0]


# --- Predictions are what was judged ---


def test_as_many_are_right_of_unlabelled_files_as_the_evaluation_reported(predicted, judged, flat):
    said = {}
    for kind in KINDS:
        rows, printed = predicted(judged, f"dataset.root={flat}", f"classifier={kind}")
        assert [row["name"] for row in rows] == [str(path) for path in sorted(flat.glob("*.png"))]
        hits, line = reported(judged, kind)
        assert sum(row["class"] == class_in(row["name"]) for row in rows) == hits
        assert line["details"]["classifier"] in {str(one.path.relative_to(judged)) for one in kept_in(judged)[0]}
        assert f"top1 {line['value']:.2%} of 60 images" in printed
        said[kind] = [row["class"] for row in rows]
    assert len({tuple(classes) for classes in said.values()}) == 3  # else another classifier would do as well
    assert 20 < reported(judged, "linear")[0] < 60


def test_probabilities_and_neighbours_are_those_calculated_by_hand(predicted, judged, labelled, flat):
    rows, _ = predicted(judged, f"dataset.root={flat}", "classifier=linear", "neighbours=3")
    backbone, preprocess = sslctl.load(judged)

    def embed(paths):
        with torch.no_grad():
            return torch.cat([backbone(preprocess(Image.open(path))[None]) for path in paths])

    new, bank = embed(row["name"] for row in rows), sorted(labelled.glob("train/*/*.png"))
    held = load_file(next(one.path for one in kept_in(judged)[0] if one.kind == "linear"))
    expected = ((new - held["mean"]) / held["std"] @ held["weight"] + held["bias"]).softmax(1).max(1).values
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    similarity, order = (F.normalize(new, dim=1) @ F.normalize(embed(bank), dim=1).T).sort(dim=1, descending=True)
    for number in range(3):
        actual = [float(row[f"near_{number + 1}_similarity"]) for row in rows]
        assert actual == pytest.approx(similarity[:, number].tolist(), abs=1e-5)
    nearest = [bank[place] for place in order[:, 0].tolist()]
    alike = sum(row["near_1"] == str(path) for row, path in zip(rows, nearest, strict=True))
    assert alike >= len(rows) - 2  # equally near ones may change places
    assert all(row["near_1_class"] == os.path.basename(os.path.dirname(row["near_1"])) for row in rows)


def test_the_fine_tuned_one_of_those_judged_on_the_same_images_is_taken(predicted, judged, flat):
    kept, errors = kept_in(judged)
    assert sorted(one.kind for one in kept) == ["finetune", "knn", "linear"]
    assert errors == []
    rows, printed = predicted(judged, f"dataset.root={flat}", "neighbours=0")
    assert "classifier  finetune, 3 classes, of 60 images" in printed
    assert "classifier=… takes another of those kept" in printed
    assert choose([one for one in kept if one.kind != "finetune"]).kind == "linear"  # whatever their figures
    assert not any(name.startswith("near") for name in rows[0])
    other = [*kept[:2], *(type(one)(**vars(one) | {"judged_on": {}, "time": "9", "value": 0.0}) for one in kept[2:])]
    assert choose(other) is other[2]  # others were judged on other images


def test_labels_of_the_data_are_compared_with_and_both_splits_are_all(predicted, judged, labelled):
    data = ("dataset=imagefolder", f"dataset.root={labelled}", "classifier=linear")
    rows, printed = predicted(judged, *data, "split=test")
    assert all(row["label"] == os.path.basename(os.path.dirname(row["name"])) for row in rows)
    _, line = reported(judged, "linear")
    assert f"  top1 {line['value']:.2%} of 60 images whose class the data name" in printed
    assert "was fitted on these images" not in printed
    rows, printed = predicted(judged, *data)
    assert len(rows) == 120
    assert "was fitted on these images" in printed


def test_parquet_holds_the_same_as_csv(predicted, cli, judged, flat, workdir):
    files = pytest.importorskip("pyarrow.parquet")
    rows, _ = predicted(judged, f"dataset.root={flat}", "workers=1")
    assert cli("predict", judged, "device=cpu", f"dataset.root={flat}", "out=x.parquet").status == 0
    table = files.read_table(workdir / "x.parquet")
    assert table.schema.names == list(rows[0])
    for name in ("name", "class", "near_2", "near_2_class"):
        assert table[name].to_pylist() == [row[name] for row in rows]
    assert table["probability"].to_pylist() == pytest.approx([float(row["probability"]) for row in rows], abs=1e-6)
    assert set(table["error"].to_pylist()) == {None}
    assert json.loads(table.schema.metadata[b"predict"])["classes"] == list(CLASSES)


# --- Other images ---


def test_an_image_that_cannot_be_read_has_a_row_with_its_error(predicted, cli, judged, flat, workdir):
    whole, _ = predicted(judged, f"dataset.root={flat}")
    folder = shutil.copytree(flat, workdir / "broken")
    first, second = sorted(folder.glob("*.png"))[1:41:39]
    first.write_bytes(first.read_bytes()[:120])
    second.write_bytes(b"none")
    shutil.copy(workdir / "x.csv", workdir / "before.csv")
    refused = cli("predict", judged, "device=cpu", f"dataset.root={folder}", f"out={workdir}/x.csv")
    assert refused.status in (1, 2)
    assert str(second) in refused.err or str(first) in refused.err
    assert (workdir / "x.csv").read_bytes() == (workdir / "before.csv").read_bytes()

    rows, printed = predicted(judged, f"dataset.root={folder}", "dataset.on_error=skip", "batch_size=7")
    assert {row["name"] for row in rows if row["error"]} == {str(first), str(second)}
    for row, before in zip(rows, whole, strict=True):
        if row["error"]:
            assert row["name"] in row["error"]
            assert row["class"] == row["probability"] == row["near_1"] == ""
        else:
            assert (row["class"], row["near_1"]) == (before["class"], before["near_1"])
    assert "2 of 60 images have no class" in printed
    assert sorted(path.name for path in workdir.iterdir()) == ["before.csv", "broken", "x.csv"]


def test_a_folder_of_unreadable_images_but_one_is_told_so(predicted, judged, flat, workdir):
    folder = workdir / "most"
    folder.mkdir()
    for number in range(70):  # the first batch has none that can be read
        (folder / f"{number:02}.png").write_bytes(b"none")
    shutil.copy(next(flat.glob("*.png")), folder / "70.png")
    rows, _ = predicted(judged, f"dataset.root={folder}", "dataset.on_error=skip")
    assert [bool(row["class"]) for row in rows] == [False] * 70 + [True]


def test_every_row_of_a_table_is_predicted(predicted, judged, flat, workdir):
    paths = sorted(flat.glob("*.png"))[:9]
    table = workdir / "t.csv"
    table.write_text("path\n" + "".join(f"{path}\n" for path in reversed(paths)))
    rows, _ = predicted(judged, "dataset=csv", f"dataset.root={table}", "classifier=knn")
    assert [row["name"] for row in rows] == [str(path) for path in reversed(paths)]
    whole = {row["name"]: row for row in predicted(judged, f"dataset.root={flat}", "classifier=knn")[0]}
    assert all(row == whole[row["name"]] for row in rows)


@pytest.mark.slow
def test_packs_are_predicted(predicted, cli, judged, labelled, flat, workdir):
    pytest.importorskip("datasets")
    assert cli("pack", "dataset=imagefolder", f"dataset.root={labelled}", f"out={workdir}/pack").status == 0
    data = ("dataset=hf", f"dataset.root={workdir}/pack", "classifier=linear")
    _, printed = predicted(judged, *data, "split=test")
    assert f"  top1 {reported(judged, 'linear')[1]['value']:.2%} of 60 images" in printed


def test_tiles_have_places(predicted, judged, flat, workdir):
    (workdir / "huge").mkdir()
    parts = [np.asarray(Image.open(path))[:16, :16] for path in sorted(flat.glob("*.png"))[18:24]]
    sheet = np.concatenate([np.concatenate(parts[:3], 1), np.concatenate(parts[3:], 1)])
    Image.fromarray(sheet).save(workdir / "huge" / "sheet.png")
    (workdir / "parts").mkdir()
    for number, part in enumerate(parts):
        Image.fromarray(part).save(workdir / "parts" / f"{number}.png")
    rows, _ = predicted(judged, f"dataset.root={workdir}/huge", "dataset.tiles={size: 16}")
    assert [(row["top"], row["left"]) for row in rows] == [(t, left) for t in ("0", "16") for left in ("0", "16", "32")]
    alone, _ = predicted(judged, f"dataset.root={workdir}/parts")
    names = ("class", "probability", "near_1")
    assert [[row[name] for name in names] for row in rows] == [[row[name] for name in names] for row in alone]


@pytest.mark.slow
def test_images_of_several_classes_have_a_probability_for_each(predicted, cli, own, labelled, workdir):
    paths = sorted(labelled.glob("*/*/*.png"))
    lines = [
        f"{p},{'|'.join({'dim': ['dark'], 'light': ['pale'], 'grey': ['dark', 'pale']}[p.parent.name])}" for p in paths
    ]
    splits = [p.parent.parent.name for p in paths]
    table = workdir / "t.csv"
    table.write_text("path,label,split\n" + "".join(f"{line},{s}\n" for line, s in zip(lines, splits, strict=True)))
    data = ("dataset=csv", f"dataset.root={table}")
    for verb in (("linear-eval", *PROBE), ("knn-eval", "knn.k=5")):
        assert cli(verb[0], own, *verb[1:], *data, *EVALUATE).status == 0
    for kind in ("linear", "knn"):
        rows, printed = predicted(own, *data, "split=test", f"classifier={kind}")
        scores = torch.tensor([[float(row[f"probability_{name}"]) for name in ("dark", "pale")] for row in rows])
        targets = torch.tensor([[name in row["label"].split("|") for name in ("dark", "pale")] for row in rows])
        _, line = reported(own, kind, "mAP")
        assert mean_average_precision(scores, targets) == pytest.approx(line["value"], abs=1e-6)
        assert "images, 0.5 or more" in printed
        assert {"dark|pale", "dark"} <= {row["near_1_class"] for row in rows}


def test_deep_images_do_not_decide_their_own_range(cli, judged, workdir):
    (workdir / "deep").mkdir()
    for number in range(3):
        Image.fromarray(np.full((20, 20), 900 * number, np.uint16)).save(workdir / "deep" / f"{number}.png")
    refused = cli("predict", judged, "dataset.root=deep", "device=cpu")
    assert refused.status == 2
    assert "dataset.range=[0,1800]" in refused.err
    assert cli("predict", judged, "dataset.root=deep", "device=cpu", "dataset.range=[0,1800]", "out=x.csv").status == 0


@pytest.mark.slow
def test_texts_are_predicted(cli, workdir):
    words = {"a": range(0, 400), "b": range(300, 700)}
    for name, numbers in words.items():
        (workdir / "texts" / name).mkdir(parents=True)
        drawn = np.random.default_rng(ord(name)).choice(list(numbers), 900)
        (workdir / "texts" / name / "words.txt").write_text(" ".join(map(str, drawn)))
    tiny = (
        "backbone.embed_dim=8",
        "backbone.depth=1",
        "backbone.heads=2",
        "dataset.vocabulary=300",
        "dataset.length=16",
    )
    other = [word for word in QUICK if not word.startswith(("backbone", "method", "evaluation.closing"))]
    data = ("method=masked_language", "dataset.root=texts", *tiny, "evaluation.knn.k=5", *PROBE)
    assert cli("pretrain", *other, *data, "run_dir=run").status == 0
    result = cli("predict", "run", "dataset=text", "dataset.root=texts", "split=test", "classifier=knn", "out=x.csv")
    assert result.status == 0, result.err
    _, line = reported(workdir / "run", "knn")
    assert f"top1 {line['value']:.2%} of {line['images']} " in result.out


# --- What is kept ---


def test_the_same_evaluation_replaces_its_own_and_another_stands_beside_it(cli, own):
    before = {one.path.name for one in kept_in(own)[0]}
    assert cli("knn-eval", own, "knn.k=7", *EVALUATE).status == 0
    assert {one.path.name for one in kept_in(own)[0]} == before
    assert cli("knn-eval", own, "knn.k=9", *EVALUATE).status == 0
    (new,) = (one for one in kept_in(own)[0] if one.path.name not in before)
    assert (new.kind, new.settings["k"]) == ("knn", 9)


@pytest.mark.slow
def test_of_several_k_the_largest_is_kept(cli, own):
    shutil.rmtree(own / "classifiers")
    words = ("protocols=[knn]", "knn.k=[1,5,40]", "few_labels=[]")
    assert cli("evaluate", own, *words, *EVALUATE).status == 0
    (kept,), _ = kept_in(own)
    lines = [r for r in results(own / "results.jsonl")[-3:] if r["metric"] == "top1"]
    largest = max(lines, key=lambda line: line["params"]["k"])
    assert (kept.settings["k"], kept.value) == (40, largest["value"])
    assert [("classifier" in line["details"]) for line in lines] == [line is largest for line in lines]


@pytest.mark.slow
def test_a_probe_on_augmented_views_is_kept_too(predicted, cli, own, flat):
    shutil.rmtree(own / "classifiers")
    small = (
        "trainer.epochs=1",
        "trainer.batch_size=16",
        "trainer.device=cpu",
        "trainer.threads=1",
        "subjects=[trained]",
    )
    assert cli("linear-eval", own, "protocol=augmented", *small, "device=cpu").status == 0
    rows, _ = predicted(own, f"dataset.root={flat}")
    hits = [line for line in results(own / "results.jsonl") if line["protocol"] == "linear-augmented"][-1]
    assert sum(row["class"] == class_in(row["name"]) for row in rows) == round(hits["value"] * 60)


@pytest.mark.parametrize("words", [("keep_mb=0",), ("keep_mb=0.0001",), ("subjects=[random]",)])
def test_what_is_too_large_or_not_of_trained_weights_is_not_kept(cli, own, words):
    shutil.rmtree(own / "classifiers")
    result = cli("knn-eval", own, *EVALUATE, *words)
    assert result.status == 0, result.err
    assert not (own / "classifiers").exists()
    assert ("not kept for sslctl predict" in result.out) == (words == ("keep_mb=0.0001",))


# --- What is refused ---


def test_without_a_classifier_the_command_that_keeps_one_is_named(cli, own, flat):
    shutil.rmtree(own / "classifiers")
    words = ("predict", own, f"dataset.root={flat}", "device=cpu")
    refused = cli(*words)
    assert refused.status == 2
    assert f"keeps no classifier of step 3 (kept: none): sslctl linear-eval {own} keeps one" in refused.err
    assert f"sslctl finetune {own} keeps one" in cli(*words, "classifier=finetune").err
    assert cli("linear-eval", own, *PROBE, "device=cpu", "cache=false").status == 0
    assert "nearest     none" in cli(*words).out
    refused = cli(*words, "neighbours=2")
    assert refused.status == 2
    assert f"sslctl knn-eval {own} keeps them" in refused.err


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ((), ("dataset.root is not set",)),
        (("classifier=probe",), ("classifier=probe", "linear, knn")),
        (("dataset.root=IMAGES", "out=x.npz"), ("expected a file ending in .csv, .parquet",)),
        (("dataset.root=IMAGES", "out=x.csv", "format=parquet"), ("ends in .csv, format=parquet",)),
        (("dataset.root=IMAGES", "dataset.image_size=24"), ("takes 3×16×16", "dataset.image_size=16")),
        (("dataset.root=IMAGES", "dataset.max_bad=3"), ("are of training", "on_error=skip")),
        (("dataset=digits",), ("takes 3×16×16", "name other images")),
        (("dataset.root=IMAGES", "out=/proc/none/x.csv"), ("out=/proc/none/x.csv cannot be written",)),
    ],
)
def test_bad_input_is_refused_in_a_line(cli, judged, flat, workdir, words, fragments):
    result = cli("predict", judged, "device=cpu", *(word.replace("IMAGES", str(flat)) for word in words))
    assert result.status == 2
    assert len(result.err.splitlines()) == 1, result.err
    assert all(fragment in result.err for fragment in fragments), result.err
    assert list(workdir.iterdir()) == []


def test_anothers_file_is_not_replaced(cli, predicted, judged, flat, workdir):
    (workdir / "x.csv").write_text("name,class\n")
    refused = cli("predict", judged, "device=cpu", f"dataset.root={flat}", "out=x.csv")
    assert "there is a file already, that sslctl predict did not write" in refused.err
    (workdir / "x.csv").unlink()
    predicted(judged, f"dataset.root={flat}")
    assert "was written by sslctl predict before: it is replaced" in predicted(judged, f"dataset.root={flat}")[1]


def test_a_signal_leaves_no_file(cli, judged, flat, workdir, monkeypatch):
    real = features.readable_batches

    def batches(*words, **keywords):
        for batch in real(*words, **keywords):
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(features, "readable_batches", batches)
    assert cli("predict", judged, "device=cpu", f"dataset.root={flat}", "out=x.csv").status == 143
    assert list(workdir.iterdir()) == []


def test_parquet_says_which_package_is_missing(cli, judged, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs pyarrow: pip install 'sslctl[parquet]', or format=csv" in cli("predict", judged, "format=parquet").err


def test_a_damaged_classifier_is_named_with_what_makes_it_again(cli, own, flat):
    path = next(one.path for one in kept_in(own)[0] if one.kind == "linear")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    refused = cli("predict", own, "device=cpu", f"dataset.root={flat}", "classifier=linear")
    assert refused.status == 2
    assert f"{path} is damaged; sslctl linear-eval {own} makes it again" in refused.err


def test_a_classifier_of_other_weights_is_not_taken(cli, own, flat):
    path = next(one.path for one in kept_in(own)[0] if one.kind == "linear")
    about = json.loads(unsigned_metadata(path)["classifier"])
    save_file(load_file(path), path, {"classifier": json.dumps(about | {"weights_sha256": "0" * 64})})
    refused = cli("predict", own, "device=cpu", f"dataset.root={flat}", "classifier=linear")
    assert f"{path} is of other weights than" in refused.err
    save_file(load_file(path), path, {"classifier": json.dumps(about | {"step": 1})})
    refused = cli("predict", own, "device=cpu", f"dataset.root={flat}", "classifier=linear")
    assert "keeps no linear classifier of step 3" in refused.err
