"""The verdict on a run: every rule fires on what it is for and on nothing else, on made-up metrics and on real runs."""

import contextlib
import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from sslctl.cli import main
from sslctl.evaluation.knn import neighbours
from sslctl.methods.base import feature_std, two_views
from sslctl.methods.byol import BYOL
from sslctl.methods.simsiam import SimSiam
from sslctl.runs.health import (
    LEVELS,
    Finding,
    RunFacts,
    Watch,
    as_line,
    findings,
    judge,
    judge_features,
    read_run_facts,
    verdict,
)
from sslctl.visuals.tensorboard import mapped
from tests.conftest import write_images
from tests.processes import in_processes
from tests.runs import PROBE, blank_result, differences, finish, metrics, newest, slow, tensors, unsigned

GREY = ("channels=1", "mean=[0.5]", "std=[0.5]")
ONLINE = ("knn", "rankme", "backbone_std", "given_cosine")  # at step 0 and after every second epoch
KNOWN = RunFacts(
    steps_per_epoch=20, total_steps=400, num_classes=10, uninformative_loss=4.0, feature_dim=64, prototypes=64
)


def logged(steps=400, every=10, known=KNOWN, **series):
    """Records of a run: a loss that falls from 3.9 to 2, unless a function of the share of the run says otherwise."""
    series = {
        "loss": lambda t: 2 + 1.9 * math.exp(-3 * t),
        "feature_std": lambda t: 0.5,
        "grad_norm": lambda t: 1.0,
        **series,
    }
    records = []
    for step in range(every, steps + 1, every):
        share = step / known.total_steps
        wave = 1 + 0.002 * math.sin(step)  # what batches differ by
        values = {name: float(value(share)) for name, value in series.items() if name not in ONLINE}
        values |= {name: value * wave for name, value in values.items() if name != "teacher_momentum"}
        records.append({"step": step, "epoch": step / known.steps_per_epoch, **values})
    for step in range(0, steps + 1, 2 * known.steps_per_epoch):
        share = step / known.total_steps
        values = {name: value(share) for name, value in series.items() if name in ONLINE}
        records.append({"step": step, "epoch": step / known.steps_per_epoch, **values})
    return sorted(records, key=lambda r: r["step"])


def rules(actual, level=None):
    return [f.rule for f in actual if level in (None, f.level)]


# --- Made-up metrics ---

SICK = {
    "collapsed": ({"feature_std": lambda t: 0.5 * math.exp(-20 * t)}, "bad", "collapse"),
    "collapsed to a few directions": ({"feature_std": lambda t: 0.034}, "bad", "collapse"),
    "collapsed where they are evaluated": ({"backbone_std": lambda t: 0.5 if t == 0 else 0.03}, "bad", "collapse"),
    "collapsed, untrained ones not": (
        {"backbone_std": lambda t: 0.045 if t == 0 else 0.5, "feature_std": lambda t: 0.3 if t < 0.1 else 0.034},
        *("bad", "collapse"),
    ),
    "closer together than untrained": ({"backbone_std": lambda t: 0.03 if t == 0 else 0.01}, "bad", "collapse"),
    "close together": ({"feature_std": lambda t: 0.045}, "warn", "collapse"),
    "projections collapsed": ({"projector_std": lambda t: 0.01}, "bad", "collapse"),
    "projections half collapsed": ({"projector_std": lambda t: 0.8 - 0.6 * t}, "warn", "collapse"),
    "embeddings that shrink": ({"embedding_std": lambda t: 0.33 * math.exp(-6 * t)}, "bad", "collapse"),
    "embeddings that have shrunk": ({"embedding_std": lambda t: 0.08}, "warn", "collapse"),
    "predictions as without stopped gradient": ({"predictor_std": lambda t: 0.8 * math.exp(-3 * t)}, "bad", "collapse"),
    "few directions, many before": ({"rankme": lambda t: 40.0 if t == 0 else 1.9}, "bad", "rank"),
    "few directions, some before": ({"rankme": lambda t: 7.0 if t == 0 else 2.3}, "warn", "rank"),
    "teacher that never moves": ({"teacher_momentum": lambda t: 1.0}, "bad", "teacher"),
    "teacher that stops half-way": ({"teacher_momentum": lambda t: min(1.0, 0.99 + 0.02 * t)}, "bad", "teacher"),
    "one direction": ({"rankme": lambda t: 1.05}, "bad", "rank"),
    "hardly two directions": ({"rankme": lambda t: 3.0 if t == 0 else 1.4}, "warn", "rank"),
    "blind": ({"loss": lambda t: 4.005}, "bad", "stuck"),
    "fallen back to blind": ({"loss": lambda t: 4.0 if t > 0.4 else 3.0}, "bad", "stuck"),
    "unmoved": ({"loss": lambda t: 5.2}, "bad", "stuck"),
    "rising": ({"loss": lambda t: 2 + abs(t - 0.4)}, "warn", "rising"),
    "diverging": ({"loss": lambda t: 2 * math.exp(4 * t)}, "bad", "diverging"),
    "neighbours lost": ({"knn": lambda t: 0.7 * math.exp(-2 * t)}, "bad", "knn"),
    "neighbours worse": ({"knn": lambda t: 0.7 if t == 0 else 0.67}, "warn", "knn"),
    "neighbours fallen": ({"knn": lambda t: 0.6 + 0.3 * math.sin(3 * t)}, "warn", "knn"),
    "uniform teacher": ({"teacher_entropy": lambda t: math.log(64)}, "bad", "teacher entropy"),
    "sure teacher": ({"teacher_entropy": lambda t: 0.001}, "warn", "teacher entropy"),
    "skipped": ({"skipped_steps": lambda t: 100 * t}, "warn", "skipped steps"),
    "drifted off, to fewer directions": (
        {"given_cosine": lambda t: 1 - 0.9 * min(1, 4 * t), "rankme": lambda t: 90.0 if t == 0 else 30.0},
        *("warn", "drift"),
    ),
    "no gradient": ({"grad_norm": lambda t: math.exp(-40 * t)}, "bad", "gradient"),
}


@pytest.mark.parametrize("name", SICK)
def test_a_symptom_fires_its_rule_and_no_other(name):
    series, level, rule = SICK[name]
    actual = judge(logged(**series), KNOWN)
    also = [("warn", "rising")] if name == "fallen back to blind" else []
    assert [(f.level, f.rule) for f in actual] == [(level, rule), *also], actual
    assert verdict(actual) == actual[0]


WELL = {
    "plain": {},
    "spread as MAE's": {"feature_std": lambda t: 0.105},
    "spread and directions of MAE, as evaluated": {
        "backbone_std": lambda t: 0.119 if t == 0 else 0.039 if t < 0.2 else 0.15,
        "rankme": lambda t: 4.4 if t == 0 else 2.05 if t < 0.2 else 5.0,
    },
    "spread as little as untrained": {"feature_std": lambda t: 0.035, "backbone_std": lambda t: 0.03},
    "few directions from the start": {"rankme": lambda t: 2.3 if t == 0 else 1.9},
    "hardly two directions from the start": {"rankme": lambda t: 1.4},
    "loss of MoCo, whose queue fills": {"loss": lambda t: 3.99 - 3 * math.exp(-60 * t) - 0.5 * t},
    "plateau": {"loss": lambda t: 2 + 1.9 * math.exp(-12 * t)},
    "overfitted": {"loss": lambda t: 3.9 * math.exp(-9 * t)},
    "negative loss": {"loss": lambda t: -t},
    "neighbours": {"knn": lambda t: 0.7 + 0.2 * t, "rankme": lambda t: 14.0},
    "neighbours that waver": {"knn": lambda t: 0.7 + 0.2 * t + 0.03 * math.sin(50 * t)},
    "teacher": {"teacher_entropy": lambda t: 3.9 - t},
    "teacher whose momentum ends at 1": {"teacher_momentum": lambda t: 1 - 0.005 * (1 + math.cos(math.pi * t))},
    "teacher of a straight line to 1": {"teacher_momentum": lambda t: min(1.0, 0.99 + 0.0105 * t)},
    "predictions and projections": {"predictor_std": lambda t: 0.75, "projector_std": lambda t: 0.78},
    "embeddings of VICReg on few images": {"embedding_std": lambda t: 0.25 + 0.08 * math.exp(-5 * t)},
    "fp16": {"skipped_steps": lambda t: 12.0},
}


@pytest.mark.parametrize("name", WELL)
def test_a_healthy_run_gets_one_sentence(name):
    for steps in (0, 40, 100, 200, 400):
        actual = judge(logged(steps, **WELL[name]), KNOWN)
        level = "ok" if steps >= 100 else "early"
        assert [(f.level, f.rule) for f in actual] == [(level, level)], (steps, actual)
        assert actual[0].sentence.startswith("healthy: " if steps >= 100 else "too early to tell: ")
        assert as_line(actual[0]) == f"health: {actual[0].sentence}"


@pytest.mark.parametrize("name", ["collapsed", "blind", "unmoved", "one direction", "uniform teacher"])
def test_nothing_is_judged_before_a_run_has_settled(name):
    assert rules(judge(logged(90, **SICK[name][0]), KNOWN)) == ["early"]


@pytest.mark.parametrize("name", ["blind", "unmoved", "uniform teacher", "collapsed", "one direction"])
def test_a_collapse_is_found_during_the_warm_up_and_all_else_after_it(name):
    later = RunFacts(**{**vars(KNOWN), "warmup_steps": 200})
    actual = judge(logged(240, **SICK[name][0]), later)
    assert rules(actual) == [SICK[name][2] if SICK[name][2] in ("collapse", "rank") else "early"]
    if rules(actual) == ["early"]:
        assert actual[0].sentence == "too early to tell: 240 steps, 260 are needed; no collapse so far"
    long_epoch = RunFacts(**{**vars(KNOWN), "steps_per_epoch": 300})
    assert rules(judge(logged(240, **SICK[name][0]), long_epoch)) == ["early"]


def test_levels_are_in_order():
    actual = [Finding(level, "rule", "") for level in ("early", "bad", "ok", "warn")]
    assert LEVELS == ("ok", "early", "warn", "bad")
    assert [verdict(actual[i:]).level for i in range(4)] == ["bad", "bad", "warn", "warn"]
    assert verdict(actual[:1] + actual[2:3]).level == "early"


def test_the_worst_of_all_spreads_is_said():
    actual = judge(
        logged(feature_std=lambda t: 0.045, projector_std=lambda t: 0.01, predictor_std=lambda t: 0.2), KNOWN
    )
    assert [f.sentence for f in actual] == ["projections have collapsed: √D·std 0.01, healthy is about 1"]
    actual = judge(logged(feature_std=lambda t: 0.001, projector_std=lambda t: 0.1), KNOWN)
    assert actual[0].sentence.startswith("features have collapsed")
    actual = judge(logged(projector_std=lambda t: 0.1, embedding_std=lambda t: 0.01), KNOWN)
    assert actual[0].sentence == "embeddings have collapsed: std 0.01, healthy is 0.2 to 1"


def test_a_teacher_is_found_standing_still_at_once():
    actual = judge(logged(10, teacher_momentum=lambda t: 1.0), KNOWN)
    words = "the teacher does not move: its momentum is 1 from step 10 of 400 on: lower method.teacher_momentum"
    assert actual == [Finding("bad", "teacher", words)]


@pytest.mark.parametrize("name", ["blind", "unmoved", "diverging", "uniform teacher"])
def test_no_loss_is_bad_beyond_doubt_while_neighbours_clearly_improve(name):
    series, _, rule = SICK[name]
    for trained, level in ((0.72, "bad"), (0.85, "warn")):  # 0.07 more come of BatchNorm that settles
        actual = judge(logged(**series, knn=lambda t, trained=trained: 0.65 if t == 0 else trained), KNOWN)
        assert [(f.level, f.rule) for f in actual] == [(level, rule)], actual


def test_a_run_says_once_while_it_trains_that_features_drift_off(tmp_path, capsys):
    series, _, _ = SICK["drifted off, to fewer directions"]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in logged(**series)))
    watch = Watch(tmp_path, "stop")
    watch.facts = KNOWN
    watch.check()
    watch.check()
    assert capsys.readouterr().out.count("warning: features drift off from those of the weights it was given") == 1
    assert watch.stopping == 0


@pytest.mark.parametrize("kept", ["cosine", "directions"])
def test_features_that_move_and_lose_nothing_do_not_drift_off(kept):
    far = {"given_cosine": lambda t: 0.6 if kept == "cosine" else 1 - 0.9 * min(1, 4 * t)}
    rank = {"rankme": lambda t: 90.0 if t == 0 else 60.0 if kept == "directions" else 30.0}
    assert rules(judge(logged(**far, **rank), KNOWN)) == ["ok"]


def test_chance_is_that_of_the_largest_class():
    uneven = RunFacts(**{**vars(KNOWN), "num_classes": 2, "majority": 0.9})
    knn = {"knn": lambda t: 0.96 if t == 0 else 0.92}
    assert rules(judge(logged(**knn), uneven), "bad") == ["knn"]
    even = RunFacts(**{**vars(KNOWN), "num_classes": 2, "majority": 0.5})
    assert rules(judge(logged(**knn), even), "bad") == []
    unlabelled = RunFacts(**{**vars(KNOWN), "num_classes": 0})
    assert rules(judge(logged(knn=lambda t: 0.7 * math.exp(-2 * t)), unlabelled)) == ["ok"]


def test_a_slow_start_is_a_warning_at_first():
    long = RunFacts(**{**vars(KNOWN), "total_steps": 4000})
    for steps, level in ((300, "warn"), (2000, "bad")):
        actual = judge(logged(steps, known=long, loss=lambda t: 4.0), long)
        assert [(f.level, f.rule) for f in actual] == [(level, "stuck")]


def test_sentences_have_figures():
    wide = RunFacts(**{**vars(KNOWN), "feature_dim": 128})
    actual = judge(logged(feature_std=lambda t: 0.034), wide)
    assert actual[0].sentence == "features have collapsed: std 0.003, healthy is about 0.088"
    wide = RunFacts(**{**vars(KNOWN), "feature_dim": 2048})
    actual = judge(logged(rankme=lambda t: 30.0 if t == 0 else 1.44), wide)
    assert actual[0].sentence == "features use 1.4 of 2,048 directions, untrained ones 30.0 (RankMe)"
    actual = judge(logged(loss=lambda t: 4.0), KNOWN)
    assert "its blind value 4, " in actual[0].sentence


def result(subject, value, k=20, **other):
    """A result of kNN with all labels."""
    line = {"protocol": "knn", "metric": "top1", "labels": "all", "dataset": "d", "split": "test", "features": "cls"}
    return blank_result(
        **line | {"params": {"k": k, "bank": 90}, "images": 1000, "subject": subject, "value": value} | other
    )


def test_results_worse_than_those_of_random_weights_are_said():
    assert rules(judge(logged(), KNOWN, [result("trained", 0.9), result("random", 0.8)])) == ["ok"]
    actual = judge(logged(), KNOWN, [result("random", 0.8), result("trained", 0.7)])
    assert actual == [Finding("warn", "random", "knn with k 20 on d: 70.0%, random weights have 80.0%")]
    begun = judge(logged(), KNOWN, [result("random", 0.3), result("given", 0.8), result("trained", 0.7)])
    assert begun == [Finding("warn", "random", "knn with k 20 on d: 70.0%, the weights it was given have 80.0%")]
    of_two = [result("random", 0.8), result("trained", 0.9), result("random", 0.95, k=1), result("trained", 0.94, k=1)]
    assert rules(judge(logged(), KNOWN, of_two)) == ["ok"]  # not 0.9 against 0.95


def test_results_worse_than_those_of_random_weights_are_no_warning_while_it_is_too_early():
    worse, words = [result("random", 0.8), result("trained", 0.7)], "too early to tell: 40 steps, 100 are needed"
    against = "knn with k 20 on d 70.0% against 80.0%"
    output = f"{words}; so far worse than random weights: {against}"
    assert judge(logged(40), KNOWN, worse) == [Finding("early", "early", output)]
    assert judge(logged(40), KNOWN, [result("random", 0.8), result("trained", 0.79)])[0].sentence == words
    online = judge(logged(40, knn=lambda t: 0.8 if t == 0 else 0.7), KNOWN)
    assert [(f.level, f.sentence) for f in online] == [("early", output.replace(against, "kNN 70.0% against 80.0%"))]
    long_epoch = RunFacts(**{**vars(KNOWN), "steps_per_epoch": 50})
    sick = judge(logged(110, known=long_epoch, **SICK["collapsed"][0]), long_epoch, worse)
    assert [f.level for f in sick] == ["bad", "early"]
    assert sick[1].sentence.endswith(against)


@pytest.mark.parametrize(
    "other",
    [
        {"params": {"k": 20, "bank": 45}},
        {"dataset": "e"},
        {"split": "train"},
        {"features": "mean"},
        {"labels": "5/class"},
        {"protocol": "linear-cached"},
    ],
    ids=lambda other: "-".join(other),
)
def test_only_results_of_one_protocol_are_compared(other):
    assert rules(judge(logged(), KNOWN, [result("random", 0.8, **other), result("trained", 0.7)])) == ["ok"]


def measured(subject, spread, rank, dim=128):
    """Label-free results of an evaluation."""
    line = {"protocol": "label-free", "subject": subject, "params": {"images": 100}}
    return [
        blank_result(**line, metric="feature_std", value=spread / dim**0.5, details={"dim": dim}),
        blank_result(**line, metric="rankme", value=rank),
    ]


def test_measured_features_are_judged():
    constant = judge_features(measured("given", 0.0, 1.0))
    assert [(f.level, f.rule) for f in constant] == [("bad", "collapse"), ("bad", "rank")]
    assert constant[0].sentence == "features have collapsed: std 0, healthy is about 0.088"
    (well,) = judge_features(measured("given", 0.5, 40.0))
    assert (well.level, well.sentence) == (
        "ok",
        "feature std 0.044, even would be 0.088, RankMe 40.0: no sign of a collapse",
    )
    few = judge_features(measured("given", 0.5, 1.8) + measured("random", 0.4, 30.0))
    assert [(f.level, f.rule) for f in few] == [("bad", "rank")]
    assert rules(judge_features(measured("given", 0.03, 2.0) + measured("random", 0.03, 2.0))) == ["ok"]
    assert rules(judge_features(measured("given", 0.0, 1.0) + measured("random", 0.03, 2.0))) == ["collapse", "rank"]
    assert judge_features(measured("random", 0.0, 1.0) + measured("pixels", 0.0, 1.0)) == []
    begun = measured("given", 0.4, 30.0) + measured("random", 0.03, 2.0)
    assert rules(judge_features(measured("trained", 0.5, 1.8) + begun)) == ["rank"]


def test_measured_features_of_a_run_add_to_what_it_logged():
    healthy, collapse = Finding("ok", "ok", "healthy: …"), Finding("bad", "collapse", "features have collapsed: …")
    early, warned = Finding("early", "early", "too early"), Finding("warn", "knn", "kNN has fallen")
    well, ill = measured("trained", 0.5, 40.0), measured("trained", 0.01, 3.0)
    for message in (healthy, early, warned, collapse):
        assert judge_features(well, [message]) == [message]
    assert rules(judge_features(ill, [healthy])) == ["collapse"]  # no word of health beside it
    assert rules(judge_features(ill, [early])) == ["collapse", "early"]
    assert rules(judge_features(ill, [warned])) == ["collapse", "knn"]
    assert judge_features(ill, [collapse]) == [collapse]  # said once


# --- Real runs, some of which are made to fail ---


class NoStop(SimSiam):
    """SimSiam whose gradient goes both ways."""

    def training_step(self, batch, schedules):
        x1, x2 = two_views(batch)
        h1 = self.backbone(x1)
        z1, z2 = self.projector(h1), self.projector(self.backbone(x2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        loss = -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2
        return {"loss": loss, "feature_std": feature_std(h1), "predictor_std": feature_std(p1)}


class NoPredictor(BYOL):
    """BYOL whose student imitates its teacher directly."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.predictor = nn.Identity()


class Constant(SimSiam):
    """Features that forget their image more and more."""

    def training_step(self, batch, schedules):
        out = super().training_step(batch, schedules)
        return out | {"feature_std": out["feature_std"] * 1e-3}


RUN = (
    *("dataset.image_size=8", "trainer.batch_size=64", "trainer.epochs=6", "trainer.device=cpu", "trainer.threads=1"),
    *("trainer.tensorboard=false", "trainer.log_every_steps=4", "scheduler.warmup_epochs=0"),
    *(
        "backbone=mlp",
        "backbone.widths=[32]",
        "evaluation.closing=false",
        "evaluation.knn_every_epochs=2",
        "evaluation.cache_gb=0",
    ),
)


def own(name):
    return "allow=[tests]", f"method._target_=tests.test_health.{name}"


def trained(run, *words):
    """A short real run, of RUN's backbone unless another is named; returns its exit status."""
    other = any(word.startswith("backbone=") for word in words)
    common = [word for word in RUN if not (other and word.startswith("backbone"))]
    return main(["pretrain", *common, f"run_dir={run}", *words])


RESNET = ("backbone=small_resnet", "backbone.widths=[16,32]")
VIT = ("backbone=small_vit", "backbone.kwargs.embed_dim=64", "backbone.kwargs.num_heads=2")
STILL = ("method.teacher_momentum=1", "trainer.epochs=1")
# A quarter of the default's images a step, and of its steps: base_lr is a few times the default's
NO_STOP = ("method=simsiam", *own("NoStop"), *RESNET, "trainer.epochs=15", "optimizer.base_lr=0.2")
NO_PREDICTOR = ("method=byol", *own("NoPredictor"), *RESNET, "trainer.epochs=15", "optimizer.base_lr=1")
BROKEN = {
    "SimSiam without its stopped gradient, small": (
        *(("method=simsiam", *own("NoStop"), "optimizer.base_lr=2"), "collapse"),
    ),
    "SimSiam without its stopped gradient": (NO_STOP, "collapse"),
    "BYOL without its predictor, small": (
        *(("method=byol", *own("NoPredictor"), "optimizer.base_lr=4", "method.teacher_momentum=0"), "collapse"),
    ),
    "BYOL without its predictor": (NO_PREDICTOR, "collapse"),
    "BYOL's teacher with momentum 1": (("method=byol", *STILL, "method.teacher_momentum_end=1"), "teacher"),
    "VICReg without its variance term": (
        *(("method=vicreg", "method.variance=0", "optimizer.base_lr=1"), "collapse"),  # its features look well
    ),
    "MoCo's teacher with momentum 1": (("method=moco", *STILL), "teacher"),
    "a learning rate of nothing": (("method=simclr", "optimizer.base_lr=1e-9"), "stuck"),
}
LONG = ("SimSiam without its stopped gradient", "BYOL without its predictor")


@pytest.mark.slow
@pytest.mark.parametrize("name", [slow(name) if name in LONG else name for name in BROKEN])
def test_a_broken_run_is_found_out(name, tmp_path, capsys):
    words, rule = BROKEN[name]
    assert trained(tmp_path / "run", *words) == 0
    actual, printed = findings(tmp_path / "run"), capsys.readouterr().out
    assert rule in rules(actual, "bad"), actual
    sentence = next(f.sentence for f in actual if f.rule == rule)
    assert printed.count("  unhealthy: ") == len(set(rules(actual, "bad")))  # once each
    assert f"  bad: {sentence}\n" in printed


HEALTHY = dict.fromkeys(("simclr", "moco", "byol", "simsiam", "barlow_twins", "vicreg", "rotation", "vae"), RESNET)
HEALTHY |= dict.fromkeys(("mae", "simmim", "ijepa"), (*VIT, "dataset.image_size=16"))


@pytest.mark.slow
@pytest.mark.parametrize("method", [method if method == "simclr" else slow(method) for method in HEALTHY])
def test_a_healthy_run_is_called_so(method, tmp_path, capsys):
    assert trained(tmp_path / "run", f"method={method}", *HEALTHY[method]) == 0
    actual = findings(tmp_path / "run")
    assert rules(actual) == ["ok"], actual
    assert f"  health: {actual[0].sentence}\n" in capsys.readouterr().out


def test_a_run_stops_when_it_is_told_to(cli, tmp_path):
    words = ("pretrain", *RUN, "method=simsiam", *own("Constant"), "run_dir=run", "trainer.save_every_epochs=100")
    stopped = cli(*words, "trainer.on_collapse=stop")
    assert stopped.status == 1
    assert "sslctl: features have collapsed: std " in stopped.err
    saved = int(newest(tmp_path / "run").name.removeprefix("step-"))
    assert 100 < saved < 132
    assert verdict(findings(tmp_path / "run")).rule == "collapse"
    assert " collapse " in cli("runs", "run").out
    continued = cli(*words)
    assert continued.status == 0, continued.err
    assert continued.out.count("  unhealthy: features have collapsed") == 1
    assert newest(tmp_path / "run").name == "step-132"


def collapse(run_dir):
    """A run that stops, in one of several processes: its exit status and its errors."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        words = ("method=simsiam", *own("Constant"), "trainer.on_collapse=stop", f"run_dir={run_dir}")
        status = main(["pretrain", *RUN, *words])
    return status, errors.getvalue()


@pytest.mark.slow
def test_all_processes_stop_together(tmp_path):
    (first, errors), (second, silence) = in_processes(collapse, tmp_path / "run")
    assert (first, second) == (1, 1)
    assert errors.count("features have collapsed") == 1
    assert "collapsed" not in silence
    assert 100 < int(newest(tmp_path / "run").name.removeprefix("step-")) < 132


def test_what_was_not_finite_is_remembered_until_the_run_goes_on(tmp_path):
    run = tmp_path / "run"
    words = ("method=simclr", "trainer.epochs=1")
    assert trained(run, *words, "optimizer.base_lr=1e30") == 1
    actual = findings(run)
    assert (actual[0].level, actual[0].rule) == ("bad", "not finite")
    assert "gradient is" in actual[0].sentence or "loss is" in actual[0].sentence


def test_what_kNN_is_asked_about_is_known_of_a_run_on_images_without_labels(tmp_path):
    folders = {"images": 20, "labelled/train/a": 12, "labelled/train/b": 4, "labelled/test/a": 4, "labelled/test/b": 4}
    for folder, count in folders.items():
        write_images(tmp_path / folder, count=count)
    run, grey = tmp_path / "run", [f"{of}.{key}" for of in ("dataset", "eval_dataset") for key in GREY]
    words = ("dataset=folder", f"dataset.root={tmp_path}/images", "dataset@eval_dataset=imagefolder")
    data = (*words, f"eval_dataset.root={tmp_path}/labelled", "dataset.image_size=16", "eval_dataset.image_size=16")
    assert trained(run, *data, *grey, "method=simclr", "trainer.batch_size=10", "trainer.epochs=1") == 0
    known = read_run_facts(run)
    assert (known.num_classes, known.majority, known.chance) == (2, 0.75, 0.75)
    environment = unsigned(run / "environment.json")
    assert environment["facts"]["num_classes"] == 0
    del environment["known"]  # as before they were kept
    (run / "environment.json").write_text(json.dumps(environment))
    assert (read_run_facts(run).num_classes, read_run_facts(run).majority) == (0, 0.0)
    assert findings(run)[0].level == "early"


def test_constant_features_of_given_weights_are_said_to_be_so(cli, tmp_path):
    run = finish(tmp_path / "run", "method=simclr", "scheduler.warmup_epochs=0", "trainer.epochs=1")
    weights = load_file(run / "backbone.safetensors")
    for name in weights:
        if name.endswith("weight") and weights[name].ndim == 4:
            weights[name] = torch.zeros_like(weights[name])
    save_file(weights, tmp_path / "dead.safetensors")
    foreign = ("backbone=small_resnet", "backbone.widths=[4,8]", "dataset=digits", "dataset.image_size=8")
    words = (*foreign, *PROBE, "few_labels=[]", "clustering.restarts=1", "knn.k=[1]", "device=cpu")
    done = cli("evaluate", *words, f"backbone.weights={tmp_path}/dead.safetensors", f"out={tmp_path}/out.jsonl")
    assert done.status == 0, done.err
    assert "bad: features have collapsed: std 0, healthy is about 0.35\n" in done.out
    assert "bad: features use 1.0 of 8 directions" in done.out
    alive = cli("evaluate", *words, f"backbone.weights={run}/backbone.safetensors", f"out={tmp_path}/out.jsonl")
    assert alive.status == 0, alive.err
    assert "health: feature std " in alive.out
    assert "bad: " not in alive.out


# --- The online figures, and what TensorBoard shows ---


def test_neighbours_are_the_most_similar():
    queries, bank = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).split([10, 20])
    for row, actual in zip(queries, neighbours(queries, 3 * bank, 5)[1], strict=True):
        similar = [float(F.cosine_similarity(row, other, dim=0)) for other in bank]
        assert actual.tolist() == sorted(range(20), key=lambda i: -similar[i])[:5]


def test_tensorboard_shows_views_neighbours_and_a_map(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    words = ("trainer.tensorboard=true", "trainer.epochs=2", "evaluation.knn_every_epochs=1", "method=autoencoder")
    assert trained(run, *words, "backbone=small_resnet", "backbone.widths=[8,16]") == 0
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    steps = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert steps == {"views": [0], "neighbours": [0, 22, 44], "pictures": [0, 22, 44]}
    assert {"loss", "knn", "rankme", "backbone_std"} <= set(events.Tags()["scalars"])
    picture = events.Images("neighbours")[0]
    assert (picture.height, picture.width) == (8 * 104, 6 * 104 + 26)  # an image, a gap, five others
    folder = run / "00044" / "features"
    rows = (folder / "metadata.tsv").read_text().splitlines()
    assert (rows[0], len(rows)) == ("label\timage", 1 + 1438)
    assert len((folder / "tensors.tsv").read_text().splitlines()) == 1438
    assert 'tensor_path: "00044/features/tensors.tsv"' in (run / "projector_config.pbtxt").read_text()
    assert Image.open(folder / "sprite.png").size == (38 * 32, 38 * 32)


def test_the_map_keeps_the_distances_of_unit_rows():
    features = torch.randn(30, 100, generator=torch.Generator().manual_seed(0)) @ torch.randn(100, 100)[:, :50].repeat(
        1, 2
    )
    unit = F.normalize(features, dim=1).double()
    assert mapped(features).shape == (30, 64)
    assert torch.allclose(torch.cdist(mapped(features), mapped(features)), torch.cdist(unit, unit), atol=1e-2)


@pytest.mark.slow
def test_figures_and_pictures_leave_no_trace(tmp_path):
    words = ("method=simclr", "scheduler.warmup_epochs=1")
    watched = ("evaluation.knn_every_epochs=1", "trainer.tensorboard=true", "trainer.on_collapse=stop")
    plain = finish(tmp_path / "plain", *words)
    seen = finish(tmp_path / "seen", *words, *watched)
    resumed = finish(tmp_path / "resumed", *words, *watched, stops=(5, 7))
    assert differences(tensors(plain), tensors(seen)) == []
    assert differences(tensors(seen), tensors(resumed)) == []
    assert metrics(seen) == metrics(resumed)
    assert metrics(plain) == [m for m in metrics(seen) if "rankme" not in m]


def test_the_logged_figures_are_those_of_the_features(tmp_path):
    from sslctl.data.sources import digits
    from sslctl.evaluation import label_free, subjects
    from sslctl.evaluation.features import extract
    from sslctl.evaluation.online import online_rows

    run = finish(tmp_path / "run", "method=simclr", "scheduler.warmup_epochs=1", "evaluation.knn_every_epochs=1")
    logged = [m for m in metrics(run) if "rankme" in m]
    assert [m["step"] for m in logged] == [0, 5, 10]
    source = digits("train", 8)
    features = extract(
        subjects.trained(run, newest(run), None).function, source, torch.cat(online_rows(len(source))), resize=8
    )
    assert logged[-1]["rankme"] == pytest.approx(label_free.rankme(features), rel=1e-4)
    assert logged[-1]["backbone_std"] == pytest.approx(label_free.feature_std(features) * 8**0.5, rel=1e-4)


def test_images_without_labels_have_figures_too(cli, tmp_path, labelled_images):
    words = (
        "pretrain",
        *RUN,
        "dataset=folder",
        f"dataset.root={labelled_images}",
        "dataset.image_size=16",
        "method=simclr",
    )
    result = cli(
        *words,
        "trainer.batch_size=16",
        "trainer.epochs=2",
        "trainer.workers=0",
        "run_dir=run",
        "trainer.tensorboard=true",
    )
    assert result.status == 0, result.err
    seen = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in seen if "rankme" in m] == [0, 8]
    assert not any("knn" in m for m in seen)
    assert "RankMe" in result.out
