"""The verbs that evaluate a run, end to end: subjects, results, the probe on augmented views, given weights."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

import sslctl.commands.pretrain
from sslctl.cli import main
from sslctl.config.command_line import Prepared
from sslctl.config.diagnose import compose_choices
from sslctl.data.sources import digits
from sslctl.errors import InputError
from sslctl.evaluation import linear_augmented, subjects
from sslctl.evaluation.console import percent
from sslctl.evaluation.features import Features, extract
from sslctl.evaluation.knn import accuracy, knn_votes
from sslctl.evaluation.linear_augmented import LinearAugmented
from sslctl.evaluation.online import online_rows
from sslctl.evaluation.subjects import Preprocess
from sslctl.evaluation.task import Task
from sslctl.factory.from_run import resolve_runs
from sslctl.models.weights import weights_sha256
from sslctl.runs import checkpoint
from tests.by_hand import facts, tiny_backbone
from tests.runs import PROBE, SIMCLR, STEPS, differences, finish, metrics, newest, results, signal_at, slow
from tests.test_knn import knn_by_hand

KEYS = {
    *("protocol", "metric", "value", "subject", "labels", "dataset", "split", "seed", "step", "epoch_rule", "params"),
    *("weights_sha256", "versions"),
}


def pixels(split):
    source = digits(split, image_size=8)
    return Features(source.images.flatten(1).float() / 255, source.labels, 10)


# --- Verbs, end to end ---

EVALUATION = ("device=cpu", "cache=false")
AUGMENTED = (
    *("protocol=augmented", "subjects=[trained]", "trainer.epochs=1", "trainer.threads=1", "trainer.device=cpu"),
    *EVALUATION,
)


@pytest.fixture(scope="module")
def _run(tmp_path_factory):
    words = (*SIMCLR, "evaluation.closing=true", "evaluation.knn_every_epochs=1", *PROBE)
    words = (*words, "trainer.save_every_steps=5", "seed=3")
    return finish(tmp_path_factory.mktemp("finished") / "run", *words)


@pytest.fixture
def run(_run, tmp_path, capsys):
    """A finished run; a copy."""
    shutil.copytree(_run, tmp_path / "run", symlinks=True)
    capsys.readouterr()
    return tmp_path / "run"


def added(run, *words):
    """What a verb appends to a run's results."""
    before = len(results(run / "results.jsonl"))
    assert main([words[0], str(run), *words[1:]]) == 0
    return results(run / "results.jsonl")[before:]


def by_subject(records, metric="top1"):
    return {record["subject"]: record for record in records if record["metric"] == metric}


def test_closing_results_carry_their_protocol(run):
    actual = results(run / "results.jsonl")
    keys = {(r["subject"], r["protocol"], r["metric"]) for r in actual}
    protocols, metrics_ = ("knn", "linear-cached"), ("top1", "top5")
    assert keys == {(s, p, m) for s in ("trained", "random") for p in protocols for m in metrics_}
    for record in actual:
        assert record.keys() >= KEYS
        assert 0 <= record["value"] <= 1
        assert (record["dataset"], record["split"], record["labels"]) == ("digits", "test", "all")
        assert record["details"]["closing"] is True
        assert record["step"] == (STEPS if record["subject"] == "trained" else 0)
        assert {"torch", "sslctl"} <= record["versions"].keys()
    assert len({r["weights_sha256"] for r in actual}) == 2


def test_the_run_ends_with_its_backbone_in_python(run):
    import sslctl

    backbone, transform = sslctl.load(run)
    source = digits("test", image_size=8)
    images = torch.stack([transform(image) for image in source.images[:5]])
    stored = checkpoint.load_tensors(newest(run) / "weights.safetensors")
    own = {n.removeprefix("backbone."): t for n, t in stored.items() if n.startswith("backbone.")}
    assert differences(backbone.state_dict(), own) == []
    assert backbone(images).shape == (5, 8)
    assert not backbone.training


@pytest.mark.parametrize("verb", ["knn-eval", "linear-eval"])
def test_a_verb_finds_what_the_closing_evaluation_found(verb, run):
    closing = [r for r in results(run / "results.jsonl") if (r["protocol"] == "knn") == (verb == "knn-eval")]
    actual = added(run, verb, *EVALUATION, *(PROBE if verb == "linear-eval" else ()))
    compared = ("subject", "protocol", "metric", "value", "step", "weights_sha256", "params", "labels", "epoch_rule")
    assert [{k: r[k] for k in compared} for r in actual] == [{k: r[k] for k in compared} for r in closing]


def test_training_beats_random_weights_by_neighbours_of_augmentations(run):
    actual = by_subject(results(run / "results.jsonl"))
    assert actual["trained"]["weights_sha256"] != actual["random"]["weights_sha256"]
    assert actual["trained"]["value"] != actual["random"]["value"]


@pytest.mark.parametrize(
    ("labels", "words", "images"), [slow("5", "5/class", 50), slow("0.1", "0.1", 144), ("all", "all", 1438)]
)
def test_a_linear_probe_of_any_subject_and_label_budget(labels, words, images, run):
    actual = by_subject(
        added(
            run, "linear-eval", f"labels={labels}", "draws=2", "subjects=[trained,random,pixels]", *EVALUATION, *PROBE
        )
    )
    assert set(actual) == {"trained", "random", "pixels"}
    for record in actual.values():
        assert record.keys() >= KEYS
        assert record["labels"] == words
        assert record["details"]["images_with_labels"] == pytest.approx(images, abs=5)
        assert len(record["details"]["picked"]) == (1 if labels == "all" else 2)
        assert ("std" in record) == (labels != "all")
    assert actual["pixels"]["backbone_parameters"] == 0
    assert actual["pixels"]["value"] > 0.6
    assert actual["trained"]["value"] > 0.2


def test_knn_of_pixels_is_that_of_the_images(run):
    actual = by_subject(added(run, "knn-eval", "subjects=[pixels]", "knn.k=1", *EVALUATION))
    train, test = pixels("train"), pixels("test")
    expected = accuracy(knn_by_hand(test.features[:60], train, 1, 0.1), test.labels[:60])["top1"]
    votes = knn_votes(test.features, train, k=1, temperature=0.1)
    assert accuracy(votes[:60], test.labels[:60])["top1"] == expected
    assert actual["pixels"]["value"] == accuracy(votes, test.labels)["top1"]
    assert actual["pixels"]["value"] > 0.95


def test_a_checkpoint_of_a_run_can_be_evaluated(run):
    (path,) = (run / "checkpoints").glob("step-5")
    before = len(results(run / "results.jsonl"))
    assert main(["knn-eval", str(path), "subjects=[trained]", *EVALUATION]) == 0
    (record, _) = results(run / "results.jsonl")[before:]
    assert record["step"] == 5


def test_the_cache_changes_no_result(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    actual = [added(run, "knn-eval", "device=cpu", f"cache={cache}") for cache in ("false", "true", "true")]
    assert len(list((tmp_path / "cache" / "sslctl" / "features").iterdir())) == 4  # two subjects, two splits
    values = [[r["value"] for r in records] for records in actual]
    assert values[0] == values[1] == values[2]


def test_the_random_subject_has_the_weights_the_run_began_with(tmp_path, monkeypatch):
    began, real = [], sslctl.commands.pretrain.fit

    def fit(setup, signals):
        began.append(weights_sha256(setup.method))
        return real(setup, signals)

    monkeypatch.setattr(sslctl.commands.pretrain, "fit", fit)
    run = finish(tmp_path / "run", *SIMCLR, "seed=7", "trainer.epochs=2")
    assert subjects.random(run, None).weights_sha256 == began[0]
    path = newest(run)
    assert subjects.trained(run, path, None).weights_sha256 != began[0]


def test_the_logged_knn_is_that_of_the_weights_at_that_step(run):
    logged = {m["step"]: m["knn"] for m in metrics(run) if "knn" in m}
    source = digits("train", image_size=8)
    queries, bank = online_rows(len(source))
    for step in (5, 10):
        subject = subjects.trained(run, run / "checkpoints" / f"step-{step}", None)
        actual = extract(subject.function, source, torch.cat([queries, bank]), resize=8)
        held = Features(actual[len(queries) :], source.labels[bank], 10)
        votes = knn_votes(actual[: len(queries)], held, k=200, temperature=0.1)
        assert logged[step] == accuracy(votes, source.labels[queries])["top1"]


def test_evaluating_leaves_the_run_as_it_is(run):
    names = ("checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "backbone.safetensors")
    before = {name: (run / name).stat().st_mtime_ns for name in names}
    added(run, "knn-eval", *EVALUATION)
    assert {name: (run / name).stat().st_mtime_ns for name in names} == before


def test_results_go_where_they_are_asked_to(run, tmp_path):
    before = (run / "results.jsonl").read_text()
    out = tmp_path / "elsewhere" / "mine.jsonl"
    assert main(["knn-eval", str(run), f"out={out}", *EVALUATION]) == 0
    assert len(results(out)) == 4
    assert (run / "results.jsonl").read_text() == before


# --- The probe on augmented views ---


@pytest.mark.parametrize("dataset", [(), ("dataset=digits", "dataset.image_size=8")], ids=["the run's own", "named"])
def test_the_augmented_probe_trains_a_classifier_and_nothing_else(dataset, run):
    words = (*AUGMENTED, "trainer.epochs=6", "optimizer.base_lr=1.0", *dataset)
    (record, _) = added(run, "linear-eval", *words)
    assert record.keys() >= KEYS
    assert (record["protocol"], record["epoch_rule"], record["labels"]) == ("linear-augmented", "last of 6", "all")
    assert record["value"] > 0.2
    (work,) = (run / "probes").iterdir()
    probe = checkpoint.load_tensors(newest(work) / "weights.safetensors")
    pretrained = checkpoint.load_tensors(newest(run) / "weights.safetensors")
    own = {name: t for name, t in probe.items() if name.startswith("backbone.")}
    assert differences(own, {name: t for name, t in pretrained.items() if name.startswith("backbone.")}) == []


def test_the_augmented_probe_resumes_exactly(run, tmp_path):
    (straight, _) = added(run, "linear-eval", *AUGMENTED)
    (work,) = (run / "probes").iterdir()
    work.rename(tmp_path / "straight")
    with signal_at(3):
        assert main(["linear-eval", str(run), *AUGMENTED]) == 143
    assert newest(work).name == "step-3"
    (again, _) = added(run, "linear-eval", *AUGMENTED)
    assert again["value"] == straight["value"]
    both = (checkpoint.load_tensors(newest(w) / "weights.safetensors") for w in (work, tmp_path / "straight"))
    assert differences(*both) == []


@pytest.fixture
def probed(monkeypatch, tmp_path):
    """probed(backbone, …) -> (directory, method) of a probe on augmented views that is not trained; …: of its subject."""

    class NotTrained(Exception):
        pass

    def instead(build, source, settings, run_dir, heading):
        raise NotTrained(run_dir, build(facts(num_classes=10)))

    def of(backbone, **changes):
        words = ["protocol=augmented", "trainer.epochs=1", "trainer.threads=1", "trainer.device=cpu"]
        config = compose_choices("linear-eval", Prepared(config_dirs=[]), words)
        source = digits("train", image_size=8)
        task = Task(source, None, config=config, dataset=OmegaConf.create({"_target_": "digits"}), work=tmp_path)
        subject = subjects.pixels(Preprocess(1, 8, 8, [0.3], [0.3]))
        own = {"backbone": backbone, "features": "backbone", "weights_sha256": weights_sha256(backbone)}
        with pytest.raises(NotTrained) as caught:
            LinearAugmented()(replace(subject, **own | changes), task)
        return caught.value.args

    monkeypatch.setattr(linear_augmented, "train_classifier", instead)
    return of


def test_the_augmented_probe_is_frozen_and_other_weights_have_another_directory(probed):
    backbone = tiny_backbone()
    (first, method), (again, _) = probed(backbone), probed(backbone)
    assert first == again
    assert not any(p.requires_grad for p in method.backbone.parameters())
    assert all(p.requires_grad for p in backbone.network.parameters())  # a copy is frozen
    backbone.network.conv1.weight.data.add_(1)
    assert probed(backbone)[0] != first


def test_the_augmented_probe_takes_a_backbones_output_only(probed):
    with pytest.raises(InputError, match="probes a backbone's output, not pixels projection"):
        probed(tiny_backbone(), features="projection")


# --- Foreign weights ---

FOREIGN = ("backbone=small_resnet", "backbone.widths=[4,8]", "dataset=digits", "dataset.image_size=8")


@pytest.mark.parametrize("kind", ["safetensors", "pt", "run", "wrapped"])
def test_given_weights_are_evaluated_as_the_run_they_came_from(kind, run, tmp_path):
    stored = checkpoint.load_tensors(run / "backbone.safetensors")
    path = tmp_path / "weights.pt"
    if kind == "safetensors":
        path = run / "backbone.safetensors"
    elif kind == "run":
        path = run
    elif kind == "pt":
        torch.save(stored, path)
    else:
        torch.save(
            {"epoch": 3, "state_dict": {f"module.{n.removeprefix('network.')}": t for n, t in stored.items()}}, path
        )
    out = tmp_path / "out.jsonl"
    assert main(["knn-eval", *FOREIGN, f"backbone.weights={path}", f"out={out}", *EVALUATION]) == 0
    actual, own = by_subject(results(out)), by_subject(results(run / "results.jsonl"))
    closing = next(r for r in results(run / "results.jsonl") if (r["subject"], r["protocol"]) == ("trained", "knn"))
    assert set(actual) == {"given", "random"}
    assert actual["given"].keys() >= KEYS
    assert actual["given"]["value"] == closing["value"]
    assert actual["given"]["step"] is None
    assert actual["given"]["backbone_parameters"] == own["trained"]["backbone_parameters"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("backbone=small_resnet", "backbone.widths=[4,16]", "dataset=digits", "dataset.image_size=8"),
            "another shape",
        ),
        (("backbone=resnet18", "dataset=digits", "dataset.image_size=8"), "missing"),
        (FOREIGN[:2], "dataset="),
        ((), "name a run"),
    ],
    ids=["widths", "network", "no dataset", "nothing"],
)
def test_weights_that_do_not_fit_are_not_evaluated(words, message, run, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    weights = (f"backbone.weights={run / 'backbone.safetensors'}",) if words else ()
    assert main(["knn-eval", *words, *weights, f"out={out}", *EVALUATION]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


# --- What is refused ---


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("linear-eval", ("labels=0",), "labels=0"),
        ("linear-eval", ("labels=few",), "labels=few"),
        ("linear-eval", ("labels=5000",), "has only"),
        ("linear-eval", ("protocol=augmented", "labels=5"), "all labels"),
        ("linear-eval", (*AUGMENTED, "subjects=[pixels]"), "pixels"),
        ("linear-eval", ("subjects=[trained,mine]",), "mine"),
        ("knn-eval", ("subjects=[]",), "subjects"),
        ("knn-eval", ("knn.k=0",), "knn.k=0"),
        ("knn-eval", ("knn.temperature=0",), "knn.temperature=0"),
        ("knn-eval", ("features=none",), "backbone"),
        ("knn-eval", ("dataset=digits", "dataset.image_size=12"), "dataset.image_size=8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_what_cannot_be_evaluated_is_refused(verb, words, message, run, capsys):
    before = (run / "results.jsonl").read_text()
    assert main([verb, str(run), *EVALUATION, *words]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert (run / "results.jsonl").read_text() == before


def test_a_directory_without_runs_is_refused(tmp_path, capsys):
    assert main(["knn-eval", str(tmp_path), *EVALUATION]) == 2
    assert main(["knn-eval", str(tmp_path / "none"), *EVALUATION]) == 2
    printed = capsys.readouterr().err
    assert f"{tmp_path}: no run directory" in printed
    assert f"{tmp_path / 'none'}: no such run" in printed


def test_a_run_without_a_checkpoint_is_refused(run, capsys):
    shutil.rmtree(run / "checkpoints")
    assert main(["knn-eval", str(run), *EVALUATION]) == 2
    assert "no valid checkpoint" in capsys.readouterr().err


def test_of_a_directory_runs_without_a_checkpoint_are_left_out_by_name(run, tmp_path, capsys):
    for name in ("whole", "begun"):
        shutil.copytree(run, tmp_path / "all" / name)
    shutil.rmtree(tmp_path / "all" / "begun" / "checkpoints")
    assert [path.name for path, _ in resolve_runs(str(tmp_path / "all"))] == ["whole"]
    assert f"left out: {tmp_path / 'all' / 'begun'} has no valid checkpoint yet" in capsys.readouterr().out


def test_values_are_shown_in_percent():
    assert percent(0.91239) == "91.24"
    assert percent(0.5, 0.0123) == "50.00 ± 1.23"


def test_results_are_lines_of_json(run):
    for line in (run / "results.jsonl").read_text().splitlines():
        assert json.loads(line)["details"]
