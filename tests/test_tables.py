"""dataset=csv: columns, splits, groups and several labels an image, and what is refused of them."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from sslctl.data.folders import TableKeys
from sslctl.data.table import choose_columns, labels_of, read_table
from sslctl.data.table_layout import table_rows
from sslctl.data.tables import csv as csv_source
from sslctl.errors import InputError
from sslctl.evaluation.features import Features
from sslctl.evaluation.knn import shares_of
from sslctl.evaluation.labelled_rows import draw_labels, folds
from sslctl.evaluation.linear import ProbeGrid, fit_probe
from sslctl.evaluation.multi_label import average_precision, influences, interval
from sslctl.evaluation.online import online_rows
from sslctl.methods.supervised import Supervised
from tests.conftest import QUICK, write_images
from tests.methods import built, silence

NAMES = [f"images/{number:03d}.png" for number in range(16)]


@pytest.fixture
def images(tmp_path):
    """A folder with images/000.png to 015.png."""
    return write_images(tmp_path, "images")


def write_table(root, name="set.csv", delimiter=",", **columns):
    """Writes a CSV of these columns beside the images; returns its path."""
    with open(root / name, "w", encoding="utf-8-sig", newline="") as opened:
        writer = csv.writer(opened, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return str(root / name)


def rows_of(layout):
    return {
        name: layout.classes[label] if label >= 0 else None
        for name, label in zip(layout.names, layout.labels, strict=True)
    }


def source(root, split="train", **changes):
    return csv_source(split, TableKeys(root, **{"image_size": None, "channels": 3, "memory_gb": 1.0} | changes))


# --- Columns, labels and splits ---


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_are_known_by_their_names_and_splits_by_their_values(images, delimiter):
    labels, sets = ["10", "2"] * 8, ["Training"] * 8 + ["val"] * 4 + ["TEST"] * 4
    root = write_table(images, delimiter=delimiter, **{"Image Path": NAMES, "Class": labels, "subset": sets})
    train, test = (table_rows(split, root) for split in ("train", "test"))
    assert train.classes == ("2", "10")  # numbers in their order
    assert rows_of(train) == dict(zip(NAMES[:8], labels[:8], strict=True))
    assert rows_of(test) == dict(zip(NAMES[12:], labels[12:], strict=True))
    assert train.listing.left_out == {"rows whose subset is val": 4}
    assert "path from Image Path, label from Class, split from subset, no group" in train.origin
    assert "dataset.columns=" in train.origin


def test_columns_and_values_of_splits_are_named_by_keys(images):
    root = write_table(images, where=NAMES, label=["x"] * 16, kind=["a", "b"] * 8, fold=[n % 4 for n in range(16)])
    columns = {"path": "where", "label": "kind", "split": "fold"}
    train, test = (table_rows(split, root, columns, {"train": [0, 1], "test": 3}) for split in ("train", "test"))
    assert (train.names, test.names) == ([n for i, n in enumerate(NAMES) if i % 4 < 2], NAMES[3::4])
    assert train.classes == ("a", "b")
    assert table_rows("train", root, {"path": "where", "label": None, "split": None}).classes == ()


def test_parquet_is_read_as_csv_is(images):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    marks = [["a"], ["a", "b"], [], ["b"]] * 4
    pyarrow.parquet.write_table(
        pyarrow.table({"file": NAMES, "label": [1.0, 0.0] * 8, "tags": marks}), images / "set.parquet"
    )
    root = str(images / "set.parquet")
    assert set(rows_of(table_rows("train", root)).values()) == {"0", "1"}
    several = table_rows("train", root, {"label": "tags"})
    assert several.targets == [tuple({"a": 0, "b": 1}[m] for m in marks[NAMES.index(name)]) for name in several.names]


def test_images_without_a_label_are_trained_on_and_not_judged_by(images):
    root = write_table(images, path=NAMES, label=["a", "b", ""] * 5 + ["a"], split=["train"] * 12 + ["test"] * 4)
    train = source(root)
    assert (len(train), train.labelled, len(train.labelled_part())) == (12, False, 8)
    assert train.labelled_part().labelled
    assert "4 of 12 training images have no label" in " ".join(train.description.warnings)
    assert torch.equal(train.labelled_part().read(2), train.read(3))


MISTAKES = {
    "column": ({"columns": {"label": "lable"}}, r"no such column; there are path, label, split.* \(nearest: label\)"),
    "role": (
        {"columns": {"pat": "path"}},
        r"dataset\.columns\.pat: expected path, label, split, group \(nearest: path\)",
    ),
    "value": (
        {"splits": {"train": "trian"}},
        r"no row of .* has this split; there are train, test \(nearest: train\)",
    ),
    "split": ({"splits": {"test": "test"}}, r"expected \{train: VALUE, test: VALUE\}"),
    "path": ({"columns": {"path": None}}, r"dataset\.columns=\{path: COLUMN\}"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_what_is_there(images, mistake):
    root = write_table(images, path=NAMES, label=["a", "b"] * 8, split=["train"] * 8 + ["test"] * 8)
    keys, message = MISTAKES[mistake]
    with pytest.raises(InputError, match=message):
        table_rows("train", root, **keys)


def test_another_label_or_group_makes_other_data_of_the_same_files(images):
    columns = {"path": NAMES, "split": ["train"] * 16, "group": list("abcd") * 4}
    hashes = set()
    for labels, groups in (
        (["1", "2"] * 8, "abcd"),
        (["2", "1"] * 8, "abcd"),
        (["1", "3"] * 8, "abcd"),
        (["1", "2"] * 8, "abdc"),
    ):
        root = write_table(images, **columns | {"label": labels, "group": list(groups) * 4})
        hashes.add(source(root).content_hash)
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["label"], "dataset.columns=['label']: expected {path"),
        ({"label": []}, "dataset.columns.label=[]: expected names of columns"),
        ({"label": ["label", None]}, "expected names of columns"),
    ],
)
def test_columns_of_another_kind_are_refused(images, columns, message):
    with pytest.raises(InputError, match=re.escape(message)):
        choose_columns(read_table(write_table(images, path=NAMES, label=NAMES)), columns)


def test_files_and_classes_that_are_not_there_are_named_with_their_row(images):
    root = write_table(images, path=["images/gone.png", *NAMES[1:]], label=["a"] * 16)
    with pytest.raises(InputError, match=r"row 1: no file images/gone\.png in .*; 1 of \d+ are missing"):
        [table_rows(split, root) for split in ("train", "test")]
    root = write_table(images, path=NAMES, label=["cat"] * 15 + ["cats"], split=["train"] * 12 + ["test"] * 4)
    with pytest.raises(InputError, match=r"row 16: class cats has no training row \(nearest: cat\)"):
        table_rows("test", root)


# --- Groups ---


def test_a_group_lies_in_one_split_alone(images):
    patients = [f"p{number // 2}" for number in range(16)]
    root = write_table(images, path=NAMES, label=["a", "b"] * 8, patient_id=patients)
    train, test = (table_rows(split, root) for split in ("train", "test"))
    assert not set(train.groups) & set(test.groups)
    assert sorted(train.names + test.names) == NAMES
    assert (len(test.names), test.classes) == (4, ("a", "b"))
    ignored = table_rows("test", root, {"group": None})
    assert set(ignored.groups or ()) == set()


def test_a_split_that_breaks_a_group_is_refused_and_both_ways_on_work(images):
    root = write_table(
        images, path=NAMES, patient=["p1"] * 4 + [f"q{n}" for n in range(12)], split=["train", "test"] * 8
    )
    message = (
        r"1 of 13 groups lie in both splits, patient=p1 with images/000\.png to train on and images/001\.png to test"
    )
    with pytest.raises(InputError, match=message):
        table_rows("train", root)
    assert len(table_rows("train", root, {"group": None}).names) == 8
    train, test = (table_rows(split, root, {"split": None}) for split in ("train", "test"))
    assert not set(train.groups) & set(test.groups)


def test_no_held_out_part_of_an_evaluation_breaks_a_group():
    draw = torch.Generator().manual_seed(0)
    labels, groups = torch.randint(0, 2, (90,), generator=draw), torch.arange(90) // 3
    for count in (30, 90):  # few labels, and enough for a share
        data = Features(torch.zeros(90, 2), labels, 2, groups=groups).take(torch.arange(count))
        for part in folds(data, 0.2, seed=1):
            assert not set(data.groups[part].tolist()) & set(data.groups[~part].tolist())
            assert 0.1 < part.double().mean() < 0.3
    queries, bank = online_rows(90, groups)
    assert not set(groups[queries].tolist()) & set(groups[bank].tolist())
    assert (len(queries), len(bank)) == (9, 81)


# --- Several labels an image ---


def test_average_precision_is_scikit_learns():
    draw = np.random.default_rng(0)
    targets = draw.random((200, 4)) < (0.5, 0.1, 0.02, 0.9)
    weight = draw.integers(0, 4, 200)
    for scores in (draw.normal(size=(200, 4)), draw.integers(0, 5, (200, 4)).astype(float)):  # without ties, and with
        for own in (None, weight):
            expected = [average_precision_score(targets[:, c], scores[:, c], sample_weight=own) for c in range(4)]
            given = None if own is None else torch.from_numpy(own)
            actual = average_precision(torch.from_numpy(scores), torch.from_numpy(targets), given)
            np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)
    assert average_precision(torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.bool)).isnan().all()
    low, high = interval(torch.from_numpy(scores), torch.from_numpy(targets), None)
    assert low < np.mean(expected) < high


def test_influences_are_the_derivatives_of_the_map():
    draw = torch.Generator().manual_seed(0)
    targets = torch.rand(20, 4, generator=draw) < torch.tensor([0.5, 0.1, 0.9, 0])  # the last no image has
    for scores in (torch.randn(20, 4, generator=draw), torch.randint(0, 5, (20, 4), generator=draw)):
        step, expected = 1e-5, []
        for row in range(20):
            weight = torch.ones(2, 20, dtype=torch.float64)
            weight[:, row] += torch.tensor([step, -step], dtype=torch.float64)
            up, down = (average_precision(scores, targets, own).nanmean() for own in weight)
            expected.append(20 * (up - down) / (2 * step))
        actual = influences(scores, targets)
        torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-6, atol=1e-6)
        assert actual.mean().item() == pytest.approx(0, abs=1e-12)


def test_a_probe_of_several_labels_learns_each_and_is_picked_by_map():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=draw)
    targets = torch.stack([x[:, 0] > 0, x[:, 1] > 1, x[:, 2] > -1], 1)
    data = Features(x, torch.full((400,), -1), 3, targets)
    classifier, picked = fit_probe(data.take(torch.arange(300)), ProbeGrid([1e-4, 0.1], [1e-4], 30, 64, 0.2), seed=0)
    ap = average_precision(classifier.scores(x[300:])[0], targets[300:])
    assert (ap > 0.95).all()
    assert (picked["lr"], picked["validation_mAP"] > 0.95) == (0.1, True)


def test_neighbours_share_their_labels_by_weight():
    similarity = torch.tensor([[0.9, 0.8], [0.5, 0.5]])
    targets = torch.tensor([[True, False], [True, True], [False, False]])
    shares = shares_of(similarity, targets, torch.tensor([[0, 1], [1, 2]]), temperature=0.1)
    weight = np.exp(-1) / (1 + np.exp(-1))
    torch.testing.assert_close(shares, torch.tensor([[1.0, weight], [0.5, 0.5]], dtype=torch.float32))


def test_labels_of_a_cell_and_columns_of_zeros_and_ones_say_the_same(images):
    cells = ["a|b", "a", "", "b"] * 4
    table = read_table(
        write_table(images, path=NAMES, label=cells, a=[int("a" in c) for c in cells], b=["b" in c for c in cells])
    )
    assert choose_columns(table, None).separator == "|"
    by_cell = labels_of(table, choose_columns(table, None))
    assert by_cell == labels_of(table, choose_columns(table, {"label": ["a", "b"]}))
    assert by_cell == ([("a", "b"), ("a",), (), ("b",)] * 4, True)
    assert labels_of(table, choose_columns(table, None, separator=None))[0][0] == ("a|b",)
    with pytest.raises(InputError, match=r"row 1: label is a\|b; a label of several is 0 or 1"):
        labels_of(table, choose_columns(table, {"label": ["label"]}))


@pytest.mark.slow
def test_several_labels_are_pretrained_on_and_judged_from_a_command(images, cli):
    cells = ["round;red", "red", "", "round"] * 4
    write_table(images, path=NAMES, label=cells, slide=[n // 2 for n in range(16)])
    data = ("dataset=csv", "dataset.root=set.csv")
    words = ("trainer.batch_size=4", "evaluation.closing=true", "evaluation.knn_every_epochs=1", "run_dir=run")
    done = cli("pretrain", *QUICK, *data, *words)
    assert done.status == 0, done.err
    assert "an image has 1 of them on average; " in done.out
    assert "label from label (separated by ;), no split, group from slide" in done.out
    assert "mAP %" in done.out
    assert "has a mAP of" in done.out
    assert '"knn_mAP"' in (images / "run" / "metrics.jsonl").read_text()
    assert "already finished" in cli("pretrain", *QUICK, *data, *words).out
    evaluated = cli("evaluate", "run", "device=cpu", "cache=false", "protocols=[knn,linear,clustering,retrieval]")
    assert evaluated.status == 0, evaluated.err
    assert "left out: clustering: set has several labels an image, these measures know one" in evaluated.out
    assert "map@100" in (images / "run" / "results.jsonl").read_text()


@pytest.mark.slow
def test_several_labels_are_fine_tuned_and_probed_from_all_images_and_from_draws_of_few(images, cli):
    write_table(images, path=NAMES, label=["round;red", "red", "", "round"] * 4)
    words = ("trainer.batch_size=4", "evaluation.closing=false", "evaluation.knn_every_epochs=null", "run_dir=run")
    assert cli("pretrain", *QUICK, "dataset=csv", "dataset.root=set.csv", *words).status == 0
    small = ("device=cpu", "trainer.epochs=1", "trainer.batch_size=4", "trainer.threads=1", "trainer.tensorboard=false")
    for words in (
        ("finetune", "run", "trainer.device=cpu", *small[1:], "least_steps=2", "labels=1", "draws=2"),
        ("linear-eval", "run", *small, "trainer.device=cpu", "protocol=augmented", "cache=false"),
        ("linear-eval", "run", "device=cpu", "labels=1", "draws=2", "cache=false", "probe.epochs=1"),
    ):
        done = cli(*words)
        assert done.status == 0, done.err
        assert "mAP %" in done.out
    results = [json.loads(line) for line in (images / "run" / "results.jsonl").read_text().splitlines()]
    latest = {result["protocol"]: result for result in results}
    for protocol in ("finetune", "linear-augmented", "linear-cached"):
        assert latest[protocol]["metric"] == "mAP"
        assert set(latest[protocol]["details"]["of_each_class"]) <= {"red", "round"}
    assert latest["finetune"]["draws"] == latest["linear-cached"]["draws"] == 2
    # The fine-tuned network gives each label a probability of its own.
    done = cli("finetune", "run", "trainer.device=cpu", *small[1:], "least_steps=2", "subjects=[trained]")
    assert done.status == 0, done.err
    done = cli("predict", "run", "classifier=finetune", "dataset=folder", "dataset.root=images", "out=new.csv")
    assert done.status == 0, done.err
    rows = list(csv.DictReader((images / "new.csv").open()))
    assert {"probability_red", "probability_round"} <= rows[0].keys()
    sums = [float(row["probability_red"]) + float(row["probability_round"]) for row in rows]
    assert any(abs(total - 1) > 1e-3 for total in sums)


def test_a_draw_has_as_many_of_each_label_as_were_asked_for():
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(400, 4, generator=generator) < torch.tensor([0.5, 0.2, 0.05, 0.9])
    labels = torch.full((400,), -1)
    for amount in (5, 12, 0.1, 0.5):
        rows = draw_labels(labels, amount, 3, targets)
        of_each = targets[rows].sum(0)
        wanted = torch.full((4,), amount) if amount >= 1 else (targets.sum(0) * amount).round()
        assert (of_each >= wanted).all()
        # No image is in it without need: each was taken for a label of which there were too few.
        assert len(rows) <= int(wanted.sum()) + round(amount if amount >= 1 else amount * 400)
        assert torch.equal(rows, draw_labels(labels, amount, 3, targets))
        assert not torch.equal(rows, draw_labels(labels, amount, 4, targets))
        assert (~targets[rows].any(1)).any() == (~targets.any(1)).any()
    with pytest.raises(InputError, match=r"labels=30: class 2 has only"):
        draw_labels(labels, 30, 0, targets)


def test_several_labels_are_learned_as_one_logistic_regression_each():
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[True, False, True]] * 4 + [[False, True, True]] * 4)
    its = built("supervised")
    method = Supervised(
        its.method.backbone,
        replace(its.method.facts, num_classes=3),
        frozen=False,
        pool="own",
        layer_decay=1.0,
        classifier_lr_scale=1.0,
    )
    method.several = True
    batch = replace(its.batch, views={"global": images[None]}, label=targets)
    out = method(batch, {})
    logits = method.classifier(method.backbone(images)).detach().double().numpy()
    p = 1 / (1 + np.exp(-logits))
    expected = -np.where(targets.numpy(), np.log(p), np.log(1 - p)).sum(1).mean()
    assert out["loss"].item() == pytest.approx(expected, rel=1e-4)
    silence(method.classifier)
    assert method(batch, {})["loss"].item() == pytest.approx(method.uninformative_loss(), rel=1e-6)
