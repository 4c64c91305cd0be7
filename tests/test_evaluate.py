import json
import re
import shutil

import pytest
import torch

from sslctl.data.sources import digits
from sslctl.evaluation import label_free, linear
from sslctl.evaluation import task as protocols
from sslctl.runs import checkpoint
from tests.conftest import write_images
from tests.runs import PROBE, SIMCLR, STEPS, STEPS_PER_EPOCH, edit, finish, newest, results

FAST = (
    *PROBE,
    *("device=cpu", "draws=2", "few_labels=[]", "knn.k=[1,5]", "clustering.restarts=2", "clustering.iterations=10"),
    *("label_free.lidar_images=20", "label_free.lidar_views=4"),
)
FIGURES = {"rankme", "feature_std", "uniformity", "lidar", "alignment"}  # α-ReQ takes more than eight dimensions


@pytest.fixture(scope="module")
def _run(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("suite") / "run", *SIMCLR, "trainer.save_every_steps=5")


@pytest.fixture
def run(_run, workdir):
    """A finished run, a copy; the current directory and the cache are its test's own."""
    shutil.copytree(_run, workdir / "run", symlinks=True)
    return workdir / "run"


def evaluated(cli, run, *words):
    """What `evaluate` adds to a run's results, and what it printed."""
    before = len(results(run / "results.jsonl")) if (run / "results.jsonl").exists() else 0
    done = cli("evaluate", run, *FAST, *words)
    assert done.status == 0, done.err
    return results(run / "results.jsonl")[before:], done.out


def named(record):
    return record["subject"], record["protocol"], record["labels"], record["metric"], record["params"].get("k")


def test_everything_is_measured_and_carries_its_protocol(cli, run):
    actual, out = evaluated(cli, run, "subjects=[trained,random,pixels]", "few_labels=[5]")
    both = {
        *(("linear-cached", labels, metric, None) for labels in ("all", "5/class") for metric in ("top1", "top5")),
        *(("knn", "all", metric, k) for metric in ("top1", "top5") for k in (1, 5)),
        *(("cluster", "none", metric, None) for metric in ("accuracy", "nmi", "ari")),
        *(("retrieval", "all", metric, None) for metric in ("recall@1", "recall@5", "recall@10", "map@100")),
    }
    for subject, metrics in (("trained", FIGURES), ("random", FIGURES), ("pixels", FIGURES - {"lidar", "alignment"})):
        here = [named(r)[1:] for r in actual if r["subject"] == subject]
        extra = {"alpha_req"} if subject == "pixels" else set()
        assert set(here) == both | {("label-free", "none", metric, None) for metric in metrics | extra}
        assert len(here) == len(set(here))
    for record in actual:
        step, epoch = {"trained": (STEPS, STEPS / STEPS_PER_EPOCH), "random": (0, 0), "pixels": (None, None)}[
            record["subject"]
        ]
        assert (record["step"], record["epoch"]) == (step, epoch) or record["subject"] == "pixels"
        assert record["split"] == ("train" if record["protocol"] == "label-free" else "test")
        assert {"seed", "epoch_rule", "weights_sha256", "versions", "dataset", "params"} <= record.keys()
        assert ("std" in record) == (record["labels"] == "5/class")
        if record["protocol"] != "label-free" and "std" not in record:
            low, high = record["ci95"]
            assert low <= record["value"] <= high
    for words in (
        "linear-cached",
        "knn, k = 5",
        "cluster",
        "map@100",
        "RankMe",
        "LiDAR",
        "healthy",
        "trained",
        "pixels",
    ):
        assert words in out
    assert "left out: LiDAR and alignment of pixels" in out
    assert "left out: α-ReQ of trained" in out


def test_the_suite_finds_what_the_verbs_find(cli, run):
    actual, _ = evaluated(cli, run, "subjects=[trained]", "few_labels=[5]")
    verbs = [
        ("knn-eval", "knn.k=5"),
        ("linear-eval", *PROBE),
        ("linear-eval", *PROBE, "labels=5", "draws=2"),
    ]
    for words in verbs:
        before = len(results(run / "results.jsonl"))
        assert cli(words[0], run, "subjects=[trained]", "device=cpu", *words[1:]).status == 0
        for record in results(run / "results.jsonl")[before:]:
            (same,) = [r for r in actual if named(r) == named(record)]
            for key in ("value", "ci95", "std", "epoch_rule", "weights_sha256", "step", "epoch"):
                assert same.get(key) == record.get(key), key


def test_recall_at_one_is_the_nearest_neighbours_accuracy(cli, run):
    actual = {named(r): r["value"] for r in evaluated(cli, run, "subjects=[trained]")[0]}
    assert actual["trained", "retrieval", "all", "recall@1", None] == pytest.approx(
        actual["trained", "knn", "all", "top1", 1]
    )


@pytest.fixture
def counted(monkeypatch):
    """What is extracted: (split, images) each."""
    calls, real, real_views = [], protocols.extract, label_free.drawn_views

    def extract(function, source, rows, **keywords):
        calls.append((source.split, len(rows)))
        return real(function, source, rows, **keywords)

    def drawn_views(source, views, rows, epochs, seed):
        calls.append(("views", len(rows)))
        return real_views(source, views, rows, epochs, seed)

    monkeypatch.setattr(protocols, "extract", extract)
    monkeypatch.setattr(label_free, "drawn_views", drawn_views)
    return calls


def test_features_are_extracted_once(cli, run, counted):
    first, _ = evaluated(cli, run, "subjects=[trained]")
    assert sorted(counted) == [("test", 359), ("train", 1438), ("views", 20)]
    again, _ = evaluated(cli, run, "subjects=[trained]", "knn.k=[1,5]")
    assert len(counted) == 3, "a second evaluation extracts nothing"
    assert [r["value"] for r in again] == [r["value"] for r in first]
    evaluated(cli, run, "subjects=[trained]", "seed=1")
    assert counted[3:] == [("views", 20)], "other views are other features"


def test_without_a_cache_features_are_extracted_once_all_the_same(cli, run, counted):
    evaluated(cli, run, "subjects=[trained]", "cache=false", "few_labels=[5]")
    assert sorted(counted) == [("test", 359), ("train", 1438), ("views", 20)]


def test_few_labels_that_cannot_be_drawn_are_left_out_and_named(cli, run):
    actual, out = evaluated(cli, run, "subjects=[random]", "few_labels=[5000,0.05]")
    assert {r["labels"] for r in actual if r["protocol"] == "linear-cached"} == {"all", "0.05"}
    assert "left out: few_labels=5000: class 0 has" in " ".join(out.split())


GRID = ("probe.lr=[0.01,0.1,0.3]", "probe.weight_decay=[0.0,0.001]")


def test_a_label_a_class_is_probed_with_settings_that_nothing_has_chosen(cli, run, monkeypatch):
    """1 % of digits is an image or two a class: nothing of it can be held out."""
    drawn, real = [], linear.draw_labels

    def draw_labels(labels, amount, draw, targets=None):
        rows = real(labels, amount, draw, targets)
        drawn.append((amount, torch.bincount(labels[rows]).tolist()))
        return rows

    monkeypatch.setattr(linear, "draw_labels", draw_labels)
    actual, out = evaluated(cli, run, *GRID, "subjects=[trained]", "few_labels=[0.01,5]")
    one_or_two = [2, 2, *[1] * 8]  # 1 % of 150 and 151 images is two
    assert drawn == [(0.01, one_or_two)] * 2 + [(5, [5] * 10)] * 2, "every class has a label"
    probes = {r["labels"]: r for r in actual if (r["protocol"], r["metric"]) == ("linear-cached", "top1")}
    words = "lr 0.1 and weight decay 0 fixed beforehand, too few labels to choose by"
    assert probes["0.01"]["params"]["regularisation"] == words
    assert probes["0.01"]["epoch_rule"] == f"last of 300 steps, {words}"
    assert {(p["lr"], p["weight_decay"]) for p in probes["0.01"]["details"]["picked"]} == {(0.1, 0.0)}
    assert probes["0.01"]["value"] > 0.15, "chance is 0.1"
    for labels in ("all", "5/class"):
        assert "regularisation" not in probes[labels]["params"]
        assert "picked on held-out training images" in probes[labels]["epoch_rule"]
    assert sum("│ linear-cached │ 0.01 " in line for line in out.splitlines()) == 2, "top1 and top5"
    assert f"linear-cached, 0.01 labels: {words}" in out
    assert "left out: few_labels" not in out


def test_a_logged_teacher_entropy_is_shown(cli, run):
    lines = results(run / "metrics.jsonl")
    for line in lines:
        line["teacher_entropy"] = line["step"] / 100
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = cli("evaluate", run / "checkpoints" / "step-5", *FAST, "subjects=[trained]", f"out={run}/results.jsonl")
    assert done.status == 0, done.err
    (record,) = [r for r in results(run / "results.jsonl") if r["metric"] == "teacher_entropy"]
    assert (record["subject"], record["value"], record["step"]) == ("trained", 0.05, 5)
    assert "teacher entropy" in done.out


def test_the_health_of_the_run_is_told(cli, run):
    from sslctl.runs.health import findings

    _, out = evaluated(cli, run, "subjects=[random]")
    assert findings(run)[0].sentence in out


# --- Data without labels, labels from elsewhere, weights from elsewhere ---

GREY = ("dataset.channels=1", "dataset.mean=[0.5]", "dataset.std=[0.5]")


@pytest.fixture
def unlabelled(cli, workdir):
    """A run on images without labels."""
    write_images(workdir / "images", count=40, size=(8, 8))
    data = ("dataset=folder", "dataset.root=images", "dataset.image_size=8", *GREY)
    return finish(workdir / "unlabelled", *SIMCLR, *data, "trainer.batch_size=20", "trainer.epochs=2")


def test_without_labels_there_are_figures_and_what_is_missing_is_named(cli, unlabelled):
    actual, out = evaluated(cli, unlabelled)
    assert {r["protocol"] for r in actual} == {"label-free"}
    assert {r["metric"] for r in actual if r["subject"] == "trained"} == FIGURES
    assert {(r["dataset"], r["split"], r["details"]["images"]) for r in actual} >= {("images", "train", 40)}
    assert "left out: linear, knn, clustering, retrieval: images has no labels" in out
    assert "eval_dataset=" in out
    assert "protocol" not in out


@pytest.mark.parametrize("key", ["eval_dataset", "dataset"])
def test_labels_from_elsewhere_judge_a_run_without(cli, unlabelled, key):
    actual, out = evaluated(cli, unlabelled, f"{key}=digits", f"{key}.image_size=8", "subjects=[trained]")
    assert {r["protocol"] for r in actual} == {"linear-cached", "knn", "cluster", "retrieval", "label-free"}
    assert {r["dataset"] for r in actual if r["protocol"] != "label-free"} == {"digits"}
    assert "without labels, of images's train split" in out


DIGITS = ("eval_dataset=digits", "eval_dataset.image_size=8")


def values_without_labels(records):
    return {r["metric"]: r["value"] for r in records if r["protocol"] == "label-free"}


@pytest.mark.slow
@pytest.mark.parametrize("most", [25600, 30])
def test_figures_without_labels_are_of_the_images_pretrained_on(cli, unlabelled, most, counted):
    words = ("subjects=[trained]", f"label_free.images={most}")
    actual, _ = evaluated(cli, unlabelled, *DIGITS, *words)
    figures = [r for r in actual if r["protocol"] == "label-free"]
    assert {(r["dataset"], r["split"], r["images"]) for r in figures} == {("images", "train", 40)}
    assert {r["params"]["images"] for r in figures if r["metric"] == "rankme"} == {min(most, 40)}
    assert sorted(counted) == [("test", 359), ("train", min(most, 40)), ("train", 1438), ("views", 20)]
    again, _ = evaluated(cli, unlabelled, *DIGITS, *words)
    assert len(counted) == 4, "kept: a second evaluation extracts nothing"
    alone, _ = evaluated(cli, unlabelled, *words)
    assert values_without_labels(actual) == values_without_labels(again)
    assert values_without_labels(actual) == pytest.approx(values_without_labels(alone))


def test_images_pretrained_on_that_are_gone_or_changed_are_said_to_be_so(cli, unlabelled, workdir):
    write_images(workdir / "images", "more", count=3, size=(8, 8), seed=9)
    actual, out = evaluated(cli, unlabelled, *DIGITS, "subjects=[trained]")
    assert {r["images"] for r in actual if r["protocol"] == "label-free"} == {43}
    assert "figures without labels: images has changed since the run was trained on it" in out
    _, out = evaluated(cli, unlabelled, "subjects=[trained]")
    assert "figures without labels: images has changed since the run was trained on it" in out
    shutil.rmtree(workdir / "images")
    actual, out = evaluated(cli, unlabelled, *DIGITS, "subjects=[trained]")
    assert {r["dataset"] for r in actual} == {"digits"}
    assert {r["metric"] for r in actual if r["protocol"] == "label-free"} == FIGURES
    (line,) = [line for line in out.splitlines() if line.startswith("figures without labels")]
    assert "are of digits, those pretrained on are not there any more" in line


def test_images_of_different_sizes_are_read_from_files(cli, unlabelled, workdir):
    for number, size in enumerate(((8, 8), (20, 30), (11, 9))):
        write_images(workdir / "mixed", str(number), count=12, size=size, seed=number)
    data = ("dataset=imagefolder", "dataset.root=mixed", "dataset.image_size=8", *GREY)
    actual, _ = evaluated(cli, unlabelled, *data, "subjects=[trained]")
    assert {r["metric"] for r in actual} >= {"top1", "nmi", "map@100", "lidar"}


FOREIGN = ("backbone=small_resnet", "backbone.widths=[4,8]", "dataset=digits", "dataset.image_size=8")


def test_given_weights_are_measured_without_views(cli, run, workdir):
    own, _ = evaluated(cli, run, "subjects=[trained]")
    weights = run / "backbone.safetensors"
    done = cli("evaluate", *FOREIGN, *FAST, f"backbone.weights={weights}", "out=out.jsonl")
    assert done.status == 0, done.err
    actual = results(workdir / "out.jsonl")
    assert {r["subject"] for r in actual} == {"given", "random"}
    assert "left out: LiDAR and alignment of given: given weights have no views of their own" in done.out
    values = {named(r)[1:]: r["value"] for r in own}
    for record in actual:
        if record["subject"] == "given":
            assert record["value"] == values[named(record)[1:]]
            assert record["epoch"] is None


def test_a_plan_measures_nothing(cli, run):
    before = sorted(run.rglob("*"))
    done = cli("evaluate", run, "plan_only=true")
    assert done.status == 0
    assert "trained: 1,438 training and 359 test images" in done.out
    assert sorted(run.rglob("*")) == before


# --- What is refused ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("few_labels=[0]",), "few_labels=0"),
        (("few_labels=[2.5]",), "few_labels=2.5"),
        (("knn.k=[]",), "knn.k=[]: expected at least one value"),
        (("knn.k=[1,0]",), "knn.k=0"),
        (("retrieval.recall=[]",), "retrieval.recall=[]: expected at least one value"),
        (("dataset=digits", "eval_dataset=digits"), "leave one out"),
        (("eval_dataset=digits", "eval_dataset.image_size=12"), "image_size=8"),
        (("features=none",), "features=none"),
        (("backbone=small_resnet", "backbone.widths=[4,16]"), "of another shape"),
        (("backbone=mlp", "backbone.widths=[8]"), "missing"),
        (("backbone=mlp", "backbone.freeze=1"), "backbone.freeze says how a pretraining (pretrain, adapt) learns"),
        (("backbone=mlp", "backbone.normalization=weights"), "backbone.normalization: a run has its own weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_what_cannot_be_evaluated_is_refused(cli, run, words, message):
    done = cli("evaluate", run, *words)
    assert (done.status, message in done.err) == (2, True), done
    assert "Traceback" not in done.err
    assert not (run / "results.jsonl").exists()


def rename(tensors):
    for name in [n for n in tensors if n.startswith("backbone.")][:2]:
        tensors[f"{name}x"] = tensors.pop(name)


def lose(tensors):
    tensors.pop(next(iter(tensors)))


@pytest.mark.parametrize("verb", ["evaluate", "linear-eval", "knn-eval"])
@pytest.mark.parametrize("damage", [rename, lose], ids=["renamed", "lost"])
def test_weights_of_a_run_that_do_not_fit_are_refused(cli, run, verb, damage):
    edit(newest(run), weights=damage)
    done = cli(verb, run)
    assert done.status == 2
    assert "missing" in done.err
    assert not (run / "results.jsonl").exists()


@pytest.mark.parametrize("verb", ["evaluate", "linear-eval", "knn-eval"])
def test_half_a_file_of_weights_is_refused(cli, run, workdir, verb):
    for path in (*run.glob("checkpoints/step-*/weights.safetensors"), run / "backbone.safetensors"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert cli(verb, run).status == 2
    assert cli(verb, newest(run)).status == 2
    assert cli(verb, *FOREIGN, f"backbone.weights={run / 'backbone.safetensors'}", "out=o.jsonl").status == 2
    assert not (workdir / "o.jsonl").exists()
    assert not (run / "results.jsonl").exists()


@pytest.mark.parametrize("partial", [False, True])
def test_given_weights_of_which_a_part_is_missing_are_refused(cli, run, workdir, partial):
    stored = checkpoint.load_tensors(run / "backbone.safetensors")
    torch.save(dict(list(stored.items())[:-3]), workdir / "part.pt")
    words = (*FOREIGN, "backbone.weights=part.pt", f"backbone.partial={partial}", "out=o.jsonl")
    done = cli("evaluate", *words)
    assert done.status == 2
    assert ("only some were loaded" if partial else "missing") in done.err
    assert not (workdir / "o.jsonl").exists()


# --- A protocol of the user's own: one file, one YAML ---

MINE = '''
from dataclasses import dataclass

from sslctl.evaluation.results import make_result
from sslctl.evaluation.task import Protocol


@dataclass(frozen=True)
class Mine(Protocol):
    """The share of test images whose feature of this number is positive."""

    feature: int

    def __call__(self, subject, task):
        hits = task.read(subject, task.test).features[:, self.feature] > 0
        values = {"values": [hits.double().mean().item()], "each": hits, "params": {"feature": self.feature}}
        return [make_result(subject, task.test, protocol="mine", metric="accuracy", labels="none", **values)]
'''


@pytest.fixture
def mine(workdir):
    """The words that add a protocol from a module and a configuration in the current directory."""
    (workdir / "my_protocol.py").write_text(MINE)
    (workdir / "my_configs" / "protocols").mkdir(parents=True)
    yaml = "mine:\n  _target_: my_protocol.Mine\n  feature: 0\n"
    (workdir / "my_configs" / "protocols" / "mine.yaml").write_text(yaml)
    return "--config-dir", "my_configs", "allow=[my_protocol]", "protocols=[knn,mine]"


def test_a_protocol_of_the_users_own_is_found_by_its_name(cli, run, mine):
    actual, out = evaluated(cli, run, *mine, "protocols.mine.feature=1", "subjects=[trained,pixels]")
    assert [r["protocol"] for r in actual if r["subject"] == "trained"] == ["knn"] * 4 + ["mine"]
    own = {r["subject"]: r for r in actual if r["protocol"] == "mine"}
    positive = (digits("test", 8).images.flatten(1)[:, 1] > 0).double().mean().item()
    assert own["pixels"]["value"] == pytest.approx(positive)
    assert own["trained"]["params"] == {"feature": 1}
    assert own["trained"]["format"] == 1
    (line,) = [line for line in out.splitlines() if "mine" in line and "accuracy" in line]
    assert f"{100 * own['trained']['value']:.2f}" in line
    done = cli("report", run, "device=cpu", "map_images=10", "rows=20", "images=3", "out=page.html")
    assert done.status == 0, done.err
    page = (run.parent / "page.html").read_text()
    assert re.search(rf"mine.*accuracy.*{100 * own['trained']['value']:.2f}", page[page.index('id="results"') :], re.S)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("protocols=[mine]",), "add allow=[my_protocol] to the command if you trust it"),
        (("allow=[my_protocol]", "protocols=[mine,minee]"), "no such protocols (nearest: mine)"),
        (("allow=[my_protocol]", "protocols=[mine]", "protocols.mine.feature=x"), "Mine expects a whole number"),
        (("allow=[my_protocol]", "protocols=[mine]", "protocols.mine.featur=1"), "nearest: protocols.mine.feature"),
        (("protocols=[plain]",), "sslctl.evaluation.labelled_rows.draw_labels is no sslctl.evaluation.task.Protocol"),
    ],
    ids=["not allowed", "unknown", "wrong type", "unknown setting", "no protocol"],
)
def test_what_is_no_protocol_is_refused(cli, run, mine, workdir, words, message):
    plain = "plain: {_target_: sslctl.evaluation.labelled_rows.draw_labels, labels: [0], amount: 1, draw: 0}\n"
    (workdir / "my_configs" / "protocols" / "plain.yaml").write_text(plain)
    done = cli("evaluate", run, *mine[:2], *words)
    assert (done.status, message in done.err) == (2, True), done.err
    assert not (run / "results.jsonl").exists()
