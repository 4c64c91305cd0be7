"""sslctl adapt: what it chooses, that it goes on as it began, and what it says of before and after."""

import contextlib
import functools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from omegaconf import OmegaConf
from PIL import Image

import sslctl.commands._adaptation_choices
import sslctl.commands.adapt
from sslctl.cli import main
from sslctl.commands._adaptation_choices import time_lines
from sslctl.config.recipes import recipe_words
from sslctl.config.schema import CONFIGS
from sslctl.data.sources import from_tensors
from sslctl.evaluation.before_after import Measures, common_neighbours, judge
from sslctl.evaluation.features import Features
from sslctl.evaluation.knn import Knn
from sslctl.evaluation.linear import ProbeGrid
from sslctl.evaluation.online import Online
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Reader
from sslctl.models.backbones import SmallResNet
from sslctl.models.preprocess import Preprocess
from sslctl.runs.adaptation import Adaptation, read_adaptation
from sslctl.runs.reading import read_config, read_environment
from sslctl.runs.results import read_results
from sslctl.training.sizing import LOOKS, choose_batch, choose_epochs, epochs_between_looks, fit_memory
from tests.runs import PROBE, contents, differences, finish, metrics, newest, signal_at, tensors

TINY = (
    *("trainer.threads=1", "trainer.device=cpu", "trainer.tensorboard=false", "trainer.batch_size=16"),
    *("evaluation.cache_gb=0", "draws=2", "few_labels=[1]", "knn.k=3", *PROBE, "sizes=[24]"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two classes whose label is in their names, and weights of a small network."""
    root = tmp_path_factory.mktemp("adapt")
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(80):
        pixels = generator.integers(0, 256, (24, 24, 3), np.uint8)
        pixels[:: 3 + number % 2] //= 4
        Image.fromarray(pixels).save(root / "images" / f"{'ab'[number % 2]}_{number:03}.png")
    torch.manual_seed(7)
    torch.save({"state_dict": SmallResNet([4, 8], 1, 0, "batch", 3, 32).state_dict()}, root / "weights.pt")
    return root


def command(folder, run_dir, *words):
    own = ("backbone=small_resnet", "backbone.widths=[4,8]", f"backbone.weights={folder}/weights.pt")
    return ["adapt", *own, f"dataset.root={folder}/images", *TINY, f"run_dir={run_dir}", *words]


LABELLED = r"dataset.label=(a|b)_\d+"


def say_seconds(patch, seconds):
    """Says how long a step takes, of four an epoch, and that a look takes nothing: the time of a machine is another each time."""
    patch.setattr(sslctl.commands._adaptation_choices, "time_step", lambda *_: (seconds, 4))
    patch.setattr(Online, "seconds", lambda *_: 0.0)


@pytest.fixture
def clock(monkeypatch):
    return functools.partial(say_seconds, monkeypatch)


@pytest.fixture(scope="module")
def straight(folder):
    """A run that nothing stopped: 3 epochs of 4 steps."""
    with pytest.MonkeyPatch.context() as patch:
        say_seconds(patch, 1.0)
        assert main(command(folder, folder / "straight", LABELLED, "minutes=0.2")) == 0
    return folder / "straight"


# --- It goes on as it began ---


def test_a_killed_adaptation_goes_on_bit_for_bit_though_the_machine_is_slower_now(folder, straight, clock, tmp_path):
    clock(1.0)
    words = command(folder, tmp_path / "run", LABELLED, "minutes=0.2")
    with signal_at(6):
        assert main(words) == 143
    assert newest(tmp_path / "run").name == "step-6"
    clock(4.0)
    assert main(words) == 0
    assert differences(tensors(tmp_path / "run"), tensors(straight)) == []
    assert metrics(tmp_path / "run") == metrics(straight)
    assert read_adaptation(tmp_path / "run").verdict == read_adaptation(straight).verdict
    assert [r.value for r in read_results(tmp_path / "run/results.jsonl")] == [
        r.value for r in read_results(straight / "results.jsonl")
    ]


def test_a_finished_adaptation_says_so_and_changes_nothing(folder, straight, capsys):
    before = contents(straight, without=("lock",))
    assert main(command(folder, straight, LABELLED, "minutes=0.2")) == 0
    assert contents(straight, without=("lock",)) == before
    said = capsys.readouterr().out
    assert f"already finished: {straight}" in said
    assert list(read_adaptation(straight).seconds) == ["choosing", "training", "judging"]
    assert read_adaptation(straight).verdict["sentence"] in said


def test_another_adaptation_is_refused_with_the_keys_that_differ(folder, straight, capsys):
    before = contents(straight)
    assert main(command(folder, straight, LABELLED, "minutes=0.4", "seed=3")) == 2
    said = capsys.readouterr().err
    assert "minutes: 0.2 → 0.4" in said
    assert "seed: 0 → 3" in said
    assert contents(straight) == before


def test_a_kill_before_the_verdict_leaves_it_to_the_same_command(folder, straight, tmp_path, clock, capsys):
    clock(1.0)
    shutil.copytree(straight, tmp_path / "run")
    there = read_adaptation(straight)
    expected, there.verdict = there.verdict, None
    there.write(tmp_path / "run")
    lines = (tmp_path / "run/results.jsonl").read_text()
    assert main(["runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "no verdict" in said
    assert "&& sslctl adapt " in said
    assert main(command(folder, tmp_path / "run", LABELLED, "minutes=0.2")) == 0
    assert read_adaptation(tmp_path / "run").verdict == expected
    assert (tmp_path / "run/results.jsonl").read_text() == lines  # measured again, written once


# --- What it leaves ---


def test_the_run_is_a_pretraining_that_can_be_given_alone(folder, straight):
    said, config = read_environment(straight)["command"], read_config(straight)
    assert said.startswith("sslctl pretrain ")
    for word in ("method=simclr", "optimizer.base_lr=0.0003", "trainer.epochs=3", "dataset.image_size=24"):
        assert word in said.split()
    assert "minutes" not in said
    assert config["trainer"]["epochs"] == 3
    assert read_adaptation(straight).command.startswith("sslctl adapt ")


def test_results_hold_both_subjects_and_their_paired_difference(straight):
    results = read_results(straight / "results.jsonl")
    measured = {(r.subject, r.protocol, r.labels, r.metric): r for r in results}
    pairs = [r for r in results if r.protocol == "before-after"]
    assert [(r.params["of"], r.labels) for r in pairs] == [
        ("knn", "all"),
        ("linear-cached", "all"),
        ("linear-cached", "1/class"),
    ]
    for r in pairs:
        given, trained = (measured[s, r.params["of"], r.labels, "top1"] for s in ("given", "trained"))
        assert r.value == pytest.approx(trained.value - given.value)
        assert (r.details["before"], r.details["after"]) == pytest.approx((given.value, trained.value))
        low, high = r.details["interval"]
        assert low < r.ci95[0] < r.value < r.ci95[1] < high  # of three that hold together
        assert r.weights_sha256 == trained.weights_sha256
        assert r.details["given"] == given.weights_sha256
    assert {r.subject for r in results if r.metric == "rankme"} == {"given", "trained"}
    assert read_adaptation(straight).verdict["kind"] == "not distinguishable"


def test_it_logs_how_far_features_have_moved_from_the_given_ones(straight):
    cosines = [m["given_cosine"] for m in metrics(straight) if "given_cosine" in m]
    assert cosines[0] == pytest.approx(1, abs=1e-6)
    assert all(0 < later < 1 - 1e-6 for later in cosines[1:])
    assert len(cosines) == 4  # every epoch of three, and before the first


def test_the_report_shows_before_and_after_with_the_interval(straight, tmp_path):
    assert main(["report", str(straight), f"out={tmp_path}/r.html", "device=cpu", "cache=false", "map_images=20"]) == 0
    page = (tmp_path / "r.html").read_text()
    section = page.partition('<section id="adaptation">')[2].partition("</section>")[0]
    assert "Not distinguishable." in section
    for r in [r for r in read_results(straight / "results.jsonl") if r.protocol == "before-after"]:
        low, high = (100 * end for end in r.details["interval"])
        assert f"{100 * r.value:+.1f} ({low:+.1f} to {high:+.1f})" in section
    assert section.count("<circle") == 3
    assert "<td>difference</td>" not in page  # in no table beside accuracies


# --- Without labels, several recipes ---


@pytest.mark.slow
def test_without_labels_it_says_what_is_missing(folder, tmp_path, clock, capsys):
    clock(1.0)
    assert main(command(folder, tmp_path / "run", "minutes=0.02")) == 0
    said = capsys.readouterr().out
    assert "no verdict without labels: RankMe" in said
    assert "eval_dataset=" in said
    assert said.count("    before ") == said.count("    after ") == 4
    assert read_adaptation(tmp_path / "run").verdict["kind"] == "no labels"

    # Some are labelled later: the same command with them ends with a verdict, without any training.
    weights = tensors(tmp_path / "run")
    labelled = (f"eval_dataset.root={folder}/images", r"eval_dataset.label=(a|b)_\d+")
    assert main(command(folder, tmp_path / "run", "minutes=0.02", "eval_dataset=folder", *labelled)) == 0
    there = read_adaptation(tmp_path / "run")
    assert there.verdict["kind"] in ("better", "worse", "mixed", "not distinguishable")
    assert differences(tensors(tmp_path / "run"), weights) == []


def test_labels_of_one_class_tell_nothing():
    data = Features(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 2, 2)
    assert 0 <= MEASURES.held_out_score(data, 0)[0] <= 1
    assert MEASURES.held_out_score(replace(data, labels=torch.ones(50, dtype=torch.long)), 0) is None


def test_the_plan_says_how_the_minutes_are_divided():
    config = SimpleNamespace(minutes=1, trial_share=0.4)
    steps = {recipe: [5.0, 4, 0.1] for recipe in ("simclr", "weak_crops", "diet")}
    divided, note = time_lines(config, Adaptation("", {}, {}, steps))
    assert divided == "minutes    trials 0.4, training 0.6; judging comes after"
    assert (
        "6 trainings of an epoch each take 2:00, longer than minutes=1" in note
    )  # 3 + 2 trials and the run, of 20 s each
    assert time_lines(config, Adaptation("", {}, {}, {"diet": [5.0, 4]})) == [
        "minutes    training 1; judging comes after"
    ]


@pytest.mark.slow
def test_of_several_recipes_the_best_on_held_out_labels_is_taken(folder, tmp_path, clock):
    clock(1.0)
    words = command(folder, tmp_path / "run", LABELLED, "minutes=0.4", "recipes=[simclr,weak_crops]")
    with signal_at(6):
        assert main(words) == 143  # in the trial of the second
    assert main(words) == 0
    there = read_adaptation(tmp_path / "run")
    assert sorted(there.scores) == ["simclr-2", "weak_crops-2"]
    assert there.measures["simclr-2"] == ["kNN, k 3", "linear", "linear, 1/class, 2 draws"]
    assert there.recipe == max(("simclr", "weak_crops"), key=lambda name: there.scores[f"{name}-2"])
    assert there.epochs == 3  # of 0.6 of the minutes
    config = read_config(tmp_path / "run/trials/weak_crops-2")
    assert config["augmentation"]["global"]["scale"] == [0.6, 1.0]
    assert config["trainer"]["epochs"] == 1


def test_trials_that_were_scored_by_different_measures_are_scored_again(tmp_path, monkeypatch):
    """A run that was stopped between two trials goes on with other few_labels, or with another version."""
    scored, command = [], sslctl.commands.adapt

    def score(trial, judges, **how):
        scored.append(trial.name)
        return {"a-2": 0.5, "b-2": 0.6}[trial.name], how["measures"]

    monkeypatch.setattr(command, "pretraining", lambda words: contextlib.nullcontext())
    monkeypatch.setattr(command, "pretrain", lambda job: None)
    monkeypatch.setattr(command, "words_of_run", lambda *words: [])
    monkeypatch.setattr(command, "judges_of", lambda config, run_dir: None)
    monkeypatch.setattr(command, "score_of_trial", score)
    config = OmegaConf.create({"recipes": ["a", "b"], "trial_share": 0.4, "minutes": 1})
    for there, again, best in ((["kNN"], ["b-2", "a-2", "b-2"], "b"), (["kNN", "linear"], ["b-2"], "a")):
        scored.clear()
        adaptation = Adaptation("", {}, {}, {}, scores={"a-2": 0.9}, measures={"a-2": there})
        assert command.try_recipes(config, adaptation, [], tmp_path, {"measures": ["kNN", "linear"]}) == best
        assert scored == again
        assert read_adaptation(tmp_path).measures == {"a-2": ["kNN", "linear"], "b-2": ["kNN", "linear"]}


# --- What harms, and what changes nothing ---


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A small network that knows the digits from their labels: what there is to lose."""
    folder = tmp_path_factory.mktemp("digits")
    words = (
        "method=supervised",
        "backbone.widths=[8,16]",
        "trainer.epochs=8",
        "trainer.batch_size=128",
        "optimizer.base_lr=0.3",
    )
    finish(folder / "known", *words)
    return folder


def adapted(digits, name, *words):
    own = ("dataset=digits", "dataset.image_size=8", "backbone=small_resnet", "backbone.widths=[8,16]")
    tiny = [word for word in TINY if not word.startswith(("trainer.batch_size", "sizes"))]
    given = (f"backbone.weights={digits}/known", f"run_dir={digits}/{name}", "trainer.batch_size=128", "sizes=[8]")
    assert main(["adapt", *own, *given, *tiny, "few_labels=[5]", "trainer.epochs=2", *words]) == 0
    return read_adaptation(digits / name).verdict


@pytest.mark.slow
def test_a_far_too_high_learning_rate_is_called_worse(digits):
    verdict = adapted(digits, "harmed", "optimizer.base_lr=3", "optimizer.weight_decay=0")
    assert verdict["kind"] == "worse", verdict
    assert "keep the frozen ones" in verdict["sentence"]


@pytest.mark.slow
def test_a_vanishing_learning_rate_is_not_distinguishable(digits):
    verdict = adapted(digits, "same", "optimizer.base_lr=1e-12")
    assert verdict["kind"] == "not distinguishable", verdict


# --- Choices ---


def test_a_time_becomes_whole_epochs():
    assert choose_epochs(10, 0.5, 11) == 109
    assert choose_epochs(0.01, 5, 11) == 1


@pytest.mark.parametrize("epoch", [1.0, 7.0, 31.0, 100.0])
@pytest.mark.parametrize("look", [0.0, 0.4, 20.0])
def test_the_epochs_of_a_time_leave_room_for_what_watches_them(epoch, look):
    """Against counting: the most epochs that fit with LOOKS evaluations, or one an epoch, and one before the first step."""
    for minutes in (1, 4, 10):
        fitting = [n for n in range(1, 700) if n * epoch + (1 + min(n, LOOKS)) * look <= 60 * minutes]
        chosen = choose_epochs(minutes, epoch / 4, 4, look)
        assert chosen == max(fitting, default=1)
        every = epochs_between_looks(chosen)
        assert len({*range(every, chosen, every), chosen}) <= min(chosen, LOOKS)


def test_a_batch_is_halved_until_half_of_the_memory_holds_what_a_step_keeps(monkeypatch):
    monkeypatch.setattr("sslctl.training.sizing.total_memory", lambda device: 8 * 2**30)
    cpu = torch.device("cpu")
    assert fit_memory(128, 4 * 2**30, cpu) == (128, None)
    batch, reason = fit_memory(128, 9 * 2**30, cpu)
    assert batch == 32
    assert "128 images keep 9.0 GiB" in reason
    assert fit_memory(64, 2**50, cpu)[0] == 16


def test_few_images_make_smaller_batches():
    assert choose_batch(5000, 128)[0] == 128
    assert choose_batch(100, 128)[0] == 16


@pytest.mark.parametrize("file", sorted((CONFIGS / "adaptation").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_composes(file, folder, capsys):
    assert file.read_text().startswith("# ")
    words = recipe_words(file.stem)
    assert [word.partition("=")[0] for word in words] == list(yaml.safe_load(file.read_text()))
    assert main(["pretrain", "--cfg", "job", *words]) == 0
    said = capsys.readouterr().out
    assert f"_target_: sslctl.methods.{yaml.safe_load(file.read_text())['method']}." in said


def test_what_cannot_be_adapted_is_refused(folder, tmp_path, capsys):
    assert main(["adapt", f"dataset.root={folder}/images", f"run_dir={tmp_path}/r"]) == 2
    assert "nothing to adapt" in capsys.readouterr().err
    assert main(command(folder, tmp_path / "r", "recipes=[simcrl]")) == 2
    assert "no such recipe (nearest: simclr)" in capsys.readouterr().err
    assert main(command(folder, tmp_path / "r", "trainer.epohcs=2")) == 2
    assert "trainer.epochs" in capsys.readouterr().err
    assert main(command(folder, tmp_path / "r", "recipes=[masked]")) == 2
    assert "recipes=[masked]: method: this method needs a vision transformer" in capsys.readouterr().err
    assert main(command(folder, tmp_path / "r", "eval_dataset=imagefolder", "eval_dataset.root=nowhere")) == 2
    assert "eval_dataset.root=nowhere: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_damaged_record_is_named(folder, straight, tmp_path, capsys):
    (tmp_path / "adaptation.json").write_text(json.dumps({"format": 9}))
    (tmp_path / "sslctl-run.json").write_text((straight / "sslctl-run.json").read_text())
    assert main(command(folder, tmp_path, LABELLED)) == 2
    assert "adaptation.json" in capsys.readouterr().err


# --- Before and after, on features that are made ---


def subject(name, function, size=8):
    """A subject whose features are a function of images."""
    preprocess = Preprocess(1, size, size, [0.5], [0.5])
    return Subject(name, function, preprocess, "backbone", name, 1)


def images_of(split, seed, count=120):
    """Three classes of images by where they are bright, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 160, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for label in range(3):
        images[labels == label, :, 2 * label : 2 * label + 2] += 60
    return from_tensors("made", split, images, labels, ("a", "b", "c"), 8)


def good(images):
    return images.mean(3).flatten(1)


def poor(images):
    return (images - images.mean((1, 2, 3), keepdim=True)).square().mean(3).flatten(1)[:, :1] + 0 * images.mean(3)[:, 0]


MEASURES = Measures(Knn([5], 0.1), ProbeGrid([0.1], [0.0], 1, 128, 0.2), (1,), 2)


def judged(before, after, sizes=(8,), several=False):
    read = Reader(torch.device("cpu"), 0, 0)
    train, test = images_of("train", 0), images_of("test", 1)
    if several:
        train, test = (replace(s, targets=F.one_hot(s.labels, 3) > 0, labels=s.labels * 0 - 1) for s in (train, test))
    return judge(subject("given", before), subject("trained", after), train, test, sizes, MEASURES, read, 0)


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [(poor, good, "better"), (good, poor, "worse"), (good, good, "not distinguishable")],
    ids=["better", "worse", "same"],
)
def test_the_verdict_on_features_of_which_the_better_ones_are_known(before, after, kind):
    judgement = judged(before, after)
    assert judgement.verdict.kind == kind
    assert [c.measure for c in judgement.comparisons] == [
        "kNN, k 5, all labels",
        "linear, all labels",
        "linear, 1 labels a class",
    ]
    assert [c.draws for c in judgement.comparisons] == [1, 1, 2]


def test_several_labels_an_image_are_judged_by_all_measures_too():
    judgement = judged(poor, good, sizes=(8, 16), several=True)
    assert judgement.verdict.kind == "better"
    assert [(c.measure, c.draws) for c in judgement.comparisons] == [
        ("kNN, k 5, all labels", 1),
        ("linear, all labels", 1),
        ("linear, 1 labels a class", 2),
    ]
    assert {r.metric for r in judgement.results} == {"mAP", "rankme", "difference"}


def test_each_is_judged_at_the_size_at_which_held_out_training_images_score_best():
    def at_16(images):
        return good(images) if images.shape[-1] == 16 else poor(images)

    def at_8(images):
        return good(images) if images.shape[-1] == 8 else poor(images)

    judgement = judged(at_16, at_8, sizes=(8, 16))
    assert judgement.sizes == {"given": 16, "trained": 8}
    assert judgement.verdict.kind == "not distinguishable"  # at one size of both it would not be
    assert judged(at_16, at_8, sizes=(8,)).verdict.kind == "better"


def test_neighbours_in_common_are_counted_without_the_image_itself():
    generator = torch.Generator().manual_seed(0)
    z, other = torch.randn(60, 5, generator=generator), torch.randn(60, 5, generator=generator)
    assert common_neighbours(z, 2 * z, k=5) == 1.0
    sets = []
    for x in (z, other):
        similarity = F.cosine_similarity(x[:, None], x[None], dim=2).fill_diagonal_(-2)
        sets.append([set(row.tolist()) for row in similarity.topk(5).indices])
    expected = sum(len(a & b) / 5 for a, b in zip(*sets, strict=True)) / 60
    assert common_neighbours(z, other, k=5) == pytest.approx(expected)
    assert expected < 0.5
