import json
import shutil

import numpy as np
import pytest
import torch
from scipy import stats

from sslctl.cli import main
from sslctl.evaluation.console import percent
from sslctl.evaluation.labelled_rows import draw_labels
from sslctl.evaluation.provenance import as_named, settings
from sslctl.evaluation.results import interval, interval_of_mean
from sslctl.evaluation.task import draw_number
from sslctl.runs.intervals import wilson
from tests.runs import PROBE, SIMCLR, STEPS, finish, results

SUITE = (
    *("draws=2", "few_labels=[5]", "knn.k=[1,5]", "clustering.restarts=2", "clustering.iterations=10", "device=cpu"),
    *("label_free.lidar_images=20", "label_free.lidar_views=4"),
)
TRAINED = ("trainer.epochs=1", "trainer.threads=1", "trainer.device=cpu")
FIELDS = {
    "format": int,
    "protocol": str,
    "metric": str,
    "value": float,
    "subject": str,
    "run": str | None,
    "method": str | None,
    "backbone": str | None,
    "pretrain_seed": int | None,
    "labels": str,
    "dataset": str,
    "split": str,
    "content": str,
    "classes": str,
    "images": int,
    "seed": int | None,
    "step": int | None,
    "epoch": float | int | None,
    "epoch_rule": str,
    "features": str,
    "params": dict,
    "weights_sha256": str,
    "details": dict,
    "command": str,
    "cwd": str,
    "versions": dict,
    "time": str,
}
PROBED = {"lr", "weight_decay", "epochs", "most_steps", "batch_size", "validation", "draws", "training_images"}
CLASSIFIED = {"epochs", "batch_size", "precision", "optimizer", "scheduler", "augmentation", "training_images"}
PARAMS = {  # protocol -> what decides its value
    "linear-cached": PROBED,
    "linear-augmented": CLASSIFIED,
    "finetune": CLASSIFIED | {"layer_decay", "classifier_lr_scale", "least_steps", "network", "pool", "draws"},
    "knn": {"k", "temperature", "bank"},
    "cluster": {"restarts", "iterations", "images", "clusters", "fitted_on"},
    "retrieval": {"bank", "similarity"},
    "label-free": {"images"},
}


@pytest.fixture(scope="module")
def _run(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("records") / "run", *SIMCLR, "seed=3", "evaluation.closing=true", *PROBE)


@pytest.fixture
def run(_run, workdir):
    """A finished run, a copy named `run` in the current directory."""
    shutil.copytree(_run, workdir / "run", symlinks=True)
    return workdir / "run"


def added(run, *words):
    """What a verb appends to a run's results."""
    before = len(results(run / "results.jsonl"))
    assert main([words[0], "run", *words[1:]]) == 0
    return results(run / "results.jsonl")[before:]


@pytest.fixture(scope="module")
def everything(_run, tmp_path_factory):
    """Results of every protocol of this run, measured once. To be read only."""
    folder = tmp_path_factory.mktemp("everything")
    run = folder / "run"
    shutil.copytree(_run, run, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return [
            *results(run / "results.jsonl"),
            *added(run, "evaluate", *SUITE, *PROBE, "subjects=[trained,random,pixels]"),
            *added(run, "linear-eval", "protocol=augmented", *TRAINED),
            *added(run, "finetune", *TRAINED, "trainer.batch_size=500", "least_steps=2", "seed=1"),
        ]


@pytest.mark.slow
def test_every_result_has_every_field(everything):
    assert {r["protocol"] for r in everything} == PARAMS.keys()
    for record in everything:
        what = (record["protocol"], record["metric"], record["subject"])
        for name, kind in FIELDS.items():
            assert isinstance(record[name], kind), (what, name, record.get(name))
        assert record["params"].keys() >= PARAMS[record["protocol"]], what
        assert record["subject"] in ("trained", "scratch" if record["protocol"] == "finetune" else "random", "pixels")
        pixels = record["subject"] == "pixels"
        known = (None, None, None) if pixels else ("simclr", "small_resnet", 3)
        assert (record["method"], record["backbone"], record["pretrain_seed"]) == known, what
        closing = "closing" in record["details"]
        assert record["run"].endswith("run") if closing else record["run"] == "run"
        assert record["step"] == {"trained": STEPS, "pixels": None}.get(record["subject"], 0)
        assert record["seed"] == _seed_of(record), what


def _seed_of(record):
    """Of the evaluation: none where nothing is drawn."""
    drawn = record["protocol"] in ("linear-cached", "linear-augmented", "finetune", "cluster")
    drawn |= record["metric"] in ("lidar", "alignment")
    return None if not drawn else 1 if record["protocol"] == "finetune" else 0


def test_accuracies_have_an_interval_whatever_the_protocol(everything):
    for record in everything:
        if record["protocol"] != "label-free":
            low, high = record["ci95"]
            assert low <= record["value"] <= high, record
    for protocol in ("finetune", "linear-augmented"):
        (record,) = [
            r
            for r in everything
            if (r["protocol"], r["metric"], r["subject"], r["labels"]) == (protocol, "top1", "trained", "all")
        ]
        # of 359 images: half of it is 1.96 standard errors
        half, value = (record["ci95"][1] - record["ci95"][0]) / 2, record["value"]
        assert half == pytest.approx(1.96 * (value * (1 - value) / 359) ** 0.5, rel=0.2)


def test_lidar_and_augmentations_carry_their_settings(everything):
    lidar = next(r for r in everything if r["metric"] == "lidar")["params"]
    assert (lidar["images"], lidar["views"], lidar["delta"]) == (20, 4, 1e-4)
    assert lidar["augmentation"]["global"]["count"] == 2
    tuned = next(r for r in everything if r["protocol"] == "finetune")["params"]
    assert (tuned["augmentation"]["name"], tuned["optimizer"]["name"]) == ("crop", "AdamW")
    assert tuned["optimizer"]["base_lr"] == 1e-3


@pytest.mark.parametrize(
    ("verb", "words", "changed"),
    [
        ("knn-eval", ("knn.temperature=0.2",), "temperature"),
        ("linear-eval", ("probe.lr=[0.2]",), "lr"),
        ("linear-eval", ("probe.validation=0.2",), "validation"),
        ("linear-eval", ("probe.most_steps=5",), "most_steps"),
    ],
)
def test_another_setting_is_another_params(run, verb, words, changed):
    words = (*words, "subjects=[random]", "device=cpu")
    first = added(run, verb, *(PROBE if verb == "linear-eval" else ()), *words[1:])[0]["params"]
    second = added(run, verb, *(PROBE if verb == "linear-eval" else ()), *words)[0]["params"]
    assert {key for key in first if first[key] != second[key]} == {changed}


# --- Seeds ---


def test_another_seed_draws_other_labels_and_the_same_seed_the_same(run):
    words = ("linear-eval", *PROBE, "labels=5", "draws=2", "subjects=[pixels]", "device=cpu")
    actual = [added(run, *words, f"seed={seed}")[0] for seed in (0, 1, 1)]
    assert [r["seed"] for r in actual] == [0, 1, 1]
    assert actual[0]["value"] != actual[1]["value"]
    assert actual[1]["value"] == actual[2]["value"]


def test_no_two_draws_of_seeds_are_alike():
    labels = torch.arange(200) % 10
    drawn = [tuple(draw_labels(labels, 5, draw_number(s, d)).tolist()) for s in range(4) for d in range(5)]
    assert len(set(drawn)) == 20
    assert [draw_number(0, d) for d in range(3)] == [0, 1, 2]


def test_nothing_is_said_to_be_picked_from_one_setting(run):
    words = ("linear-eval", *PROBE, "subjects=[random]", "device=cpu")
    assert added(run, *words)[0]["epoch_rule"] == "last of 300 steps"
    assert "picked on held-out" in added(run, *words, "probe.lr=[0.1,0.2]")[0]["epoch_rule"]


def test_neighbours_take_no_seed(run, capsys):
    assert main(["knn-eval", "run", "seed=1"]) == 2
    assert "seed" in capsys.readouterr().err


# --- Intervals ---


def test_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(0).normal(0.7, 0.02, 5)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval_of_mean(values.tolist()) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("right", "count"), [(4, 4), (0, 36), (7, 9)])
def test_wilsons_interval_is_scipys(right, count):
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right / count, count) == pytest.approx((expected.low, expected.high))


def test_four_of_four_images_are_no_certainty():
    low, high = interval(torch.ones(4, dtype=torch.bool))
    assert (low, high) == pytest.approx((0.5101, 1.0), abs=1e-4)
    assert interval(torch.full((4,), 0.5)) == [0.5, 0.5]  # no share of images


def test_its_interval_is_shown_beside_a_deviation():
    assert percent(0.5, 0.0123, [0.45, 0.55]) == "50.00 ± 1.23 (45.0–55.0)"


def test_titles_say_how_many_images_were_judged(run, capsys):
    added(run, "evaluate", *SUITE, *PROBE, "subjects=[random]")
    added(run, "knn-eval", "subjects=[random]", "device=cpu")
    assert capsys.readouterr().out.count("digits, test split (359 images)") == 2


# --- Where they come from ---


def test_the_command_measures_again(run):
    import shlex

    words = ("linear-eval", *PROBE, "labels=5", "draws=2", "seed=4", "subjects=[pixels]", "device=cpu")
    record = added(run, *words)[0]
    printed = shlex.split(record["command"])
    assert printed[:2] == ["sslctl", "linear-eval"]
    assert {"labels=5", "draws=2", "seed=4", "probe.epochs=1"} <= set(printed)
    before = len(results(run / "results.jsonl"))
    assert main(printed[1:]) == 0
    again = results(run / "results.jsonl")[before]
    same = ("value", "params", "seed", "labels", "command")
    assert {k: again[k] for k in same} == {k: record[k] for k in same}


def test_a_run_is_named_as_the_user_named_it(run, workdir, monkeypatch):
    nested = workdir / "all" / "digits" / "one"
    nested.mkdir(parents=True)
    (workdir / "all" / "latest").symlink_to("digits/one")
    real = nested.resolve()
    assert as_named(real, ["all"]) == "all/digits/one"
    assert as_named(real, "all/digits/one") == "all/digits/one"
    assert as_named(real, ["elsewhere", "all/latest"]) == "all/digits/one"
    assert as_named(real, [str(real)]) == str(real)
    assert as_named(real, None) == str(real)
    (nested / "checkpoints" / "step-5").mkdir(parents=True)
    assert as_named(real, "all/digits/one/checkpoints/step-5") == "all/digits/one"


def test_given_weights_have_no_run(run, workdir):
    words = ("backbone=small_resnet", "backbone.widths=[4,8]", "dataset=digits", "dataset.image_size=8")
    weights = f"backbone.weights={run / 'backbone.safetensors'}"
    assert main(["knn-eval", *words, weights, "out=out.jsonl", "device=cpu"]) == 0
    for record in results(workdir / "out.jsonl"):
        assert (record["run"], record["method"], record["pretrain_seed"]) == (None, None, None)
        assert record["backbone"] == "small_resnet"


def test_settings_are_plain_and_name_their_class():
    built = settings({"_target_": "torch.optim.SGD", "base_lr": 0.1, "nesterov": None, "inner": {"_target_": "a.B"}})
    assert built == {"name": "SGD", "base_lr": 0.1, "inner": {"name": "B"}}
    assert json.loads(json.dumps(built)) == built
