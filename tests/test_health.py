"""The verdict on a run: every rule fires on what it is for and on nothing else, on made-up metrics and on real runs."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from sslctl import losses
from sslctl.board import mapped
from sslctl.cli import main
from sslctl.evaluation.knn import neighbours
from sslctl.health import Finding, Known, findings, judge, verdict
from sslctl.losses import barlow_twins, whitening_mse
from sslctl.methods.base import feature_std, two_views
from sslctl.methods.byol import BYOL
from sslctl.methods.simsiam import SimSiam
from tests.test_methods import BATCH, facts, moco, simclr, tiny_backbone
from tests.training import REPOSITORY, differences, finish, metrics, newest, slow, tensors

KNOWN = Known(steps_per_epoch=20, total_steps=400, num_classes=10, blind_loss=4.0, feature_dim=64, prototypes=64)


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
        values = {name: float(value(share) * wave) for name, value in series.items() if name not in ("knn", "rankme")}
        records.append({"step": step, "epoch": step / known.steps_per_epoch, **values})
    for step in range(0, steps + 1, 2 * known.steps_per_epoch):
        share = step / known.total_steps
        values = {name: value(share) for name, value in series.items() if name in ("knn", "rankme")}
        records.append({"step": step, "epoch": step / known.steps_per_epoch, **values})
    return sorted(records, key=lambda r: r["step"])


def rules(found, level=None):
    return [f.rule for f in found if level in (None, f.level)]


# --- Made-up metrics ---

SICK = {
    "collapsed": ({"feature_std": lambda t: 0.5 * math.exp(-20 * t)}, "bad", "collapse"),
    "close together": ({"feature_std": lambda t: 0.04}, "warn", "collapse"),
    "projections collapsed": ({"projector_std": lambda t: 0.01}, "bad", "collapse"),
    "one direction": ({"rankme": lambda t: 1.05}, "bad", "rank"),
    "hardly two directions": ({"rankme": lambda t: 1.4}, "warn", "rank"),
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
    "no gradient": ({"grad_norm": lambda t: math.exp(-40 * t)}, "bad", "gradient"),
}


@pytest.mark.parametrize("name", SICK)
def test_a_symptom_fires_its_rule_and_no_other(name):
    series, level, rule = SICK[name]
    found = judge(logged(**series), KNOWN)
    also = [("warn", "rising")] if name == "fallen back to blind" else []
    assert [(f.level, f.rule) for f in found] == [(level, rule), *also], found
    assert verdict(found) == found[0]


WELL = {
    "plain": {},
    "spread as MAE's": {"feature_std": lambda t: 0.105},
    "loss of MoCo, whose queue fills": {"loss": lambda t: 3.99 - 3 * math.exp(-60 * t) - 0.5 * t},
    "plateau": {"loss": lambda t: 2 + 1.9 * math.exp(-12 * t)},
    "overfitted": {"loss": lambda t: 3.9 * math.exp(-9 * t)},
    "negative loss": {"loss": lambda t: -t},
    "neighbours": {"knn": lambda t: 0.7 + 0.2 * t, "rankme": lambda t: 14.0},
    "neighbours that waver": {"knn": lambda t: 0.7 + 0.2 * t + 0.03 * math.sin(50 * t)},
    "teacher": {"teacher_entropy": lambda t: 3.9 - t},
    "fp16": {"skipped_steps": lambda t: 12.0},
}


@pytest.mark.parametrize("name", WELL)
def test_a_healthy_run_gets_one_sentence(name):
    for steps in (0, 40, 100, 200, 400):
        found = judge(logged(steps, **WELL[name]), KNOWN)
        assert [(f.level, f.rule) for f in found] == [("ok", "ok")], (steps, found)
        assert ("healthy" in found[0].sentence) == (steps >= 100)


@pytest.mark.parametrize("name", ["collapsed", "blind", "unmoved", "one direction", "uniform teacher"])
def test_nothing_is_judged_before_a_run_has_settled(name):
    assert rules(judge(logged(90, **SICK[name][0]), KNOWN)) == ["ok"]
    later = Known(**{**vars(KNOWN), "warmup_steps": 200})
    assert rules(judge(logged(240, **SICK[name][0]), later)) == ["ok"]


def test_a_slow_start_is_a_warning_at_first():
    long = Known(**{**vars(KNOWN), "total_steps": 4000})
    for steps, level in ((300, "warn"), (2000, "bad")):
        found = judge(logged(steps, known=long, loss=lambda t: 4.0), long)
        assert [(f.level, f.rule) for f in found] == [(level, "stuck")]


def test_sentences_have_figures():
    found = judge(logged(feature_std=lambda t: 0.016), KNOWN)
    assert found[0].sentence.startswith("features have collapsed: std 0.002, spread evenly is 0.12 (1/√64)")
    found = judge(logged(loss=lambda t: 4.0), KNOWN)
    assert "its blind value 4, " in found[0].sentence


def test_results_worse_than_those_of_random_weights_are_said():
    def result(subject, value, k=20):
        line = {"protocol": "knn", "metric": "top1", "labels": "all", "dataset": "d", "details": {"k": k}}
        return line | {"subject": subject, "value": value}

    assert rules(judge(logged(), KNOWN, [result("trained", 0.9), result("random", 0.8)])) == ["ok"]
    found = judge(logged(), KNOWN, [result("random", 0.8), result("trained", 0.7)])
    assert found == [Finding("warn", "random", "knn with k 20 on d: 70.0%, random weights have 80.0%")]
    of_two = [result("random", 0.8), result("trained", 0.9), result("random", 0.95, k=1), result("trained", 0.94, k=1)]
    assert rules(judge(logged(), KNOWN, of_two)) == ["ok"]  # not 0.9 against 0.95


# --- Blind losses: each method's own number against its loss of outputs at right angles, or all alike ---

N, DIM = BATCH, 4 * BATCH
AXES = torch.eye(DIM)


def blind_moco():
    method = moco()
    return method, losses.info_nce(AXES[:2], AXES[2:4], AXES[4 : 4 + len(method.queue)], 0.2)


def blind_simclr():
    return simclr(), losses.nt_xent(AXES[:N], AXES[N : 2 * N], 0.5)


def blind_byol():
    sizes = {"hidden_dim": 8, "out_dim": 8, "teacher_momentum": 0.9, "teacher_momentum_end": 1.0}
    return BYOL(tiny_backbone(), facts(), **sizes), 4 + 4 * losses.negative_cosine(AXES[:N], AXES[N : 2 * N])


def blind_barlow():
    from sslctl.methods.barlow_twins import BarlowTwins

    rows = 400
    sizes = {"hidden_dim": 8, "out_dim": 50, "lambda_": 0.0051, "scale": 0.1, "projector_layers": 3}
    method = BarlowTwins(tiny_backbone(), facts(batch_size=rows), **sizes)
    z1, z2 = torch.randn(2, rows, 50, generator=torch.Generator().manual_seed(0))
    return method, 0.1 * barlow_twins(z1, z2, 0.0051)


def blind_whitening():
    from sslctl.methods.wmse import WMSE

    rows = 4096
    method = WMSE(tiny_backbone(), facts(batch_size=rows), hidden_dim=8, out_dim=4, whitening_size=rows, draws=1)
    views = torch.randn(2, rows, 4, generator=torch.Generator().manual_seed(0))
    return method, whitening_mse(views, torch.arange(rows).view(1, 1, rows))


BLIND = {"moco": blind_moco, "simclr": blind_simclr, "byol": blind_byol}
BLIND |= {"barlow_twins": blind_barlow, "wmse": blind_whitening}


@pytest.mark.parametrize("name", BLIND)
def test_a_blind_loss_is_that_of_outputs_which_say_nothing(name):
    method, expected = BLIND[name]()
    tolerance = {"barlow_twins": 0.01, "wmse": 0.01}.get(name, 1e-5)  # of random outputs
    assert method.blind_loss() == pytest.approx(expected.item(), rel=tolerance)


def test_a_method_without_one_has_none():
    from sslctl.methods.vicreg import VICReg

    assert (
        VICReg(tiny_backbone(), facts(), hidden_dim=8, out_dim=8, invariance=1, variance=1, covariance=1).blind_loss()
        is None
    )


# --- Real runs, some of which are made to fail ---


class NoStop(SimSiam):
    """SimSiam whose gradient goes both ways."""

    def training_step(self, batch, s):
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

    def training_step(self, batch, s):
        out = super().training_step(batch, s)
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
    """A short real run; returns its exit status."""
    return main(["pretrain", *RUN, f"run_dir={run}", *words])


BROKEN = {
    "SimSiam without its stopped gradient": (("method=simsiam", *own("NoStop"), "optimizer.base_lr=2"), "collapse"),
    "BYOL without its predictor": (
        *(("method=byol", *own("NoPredictor"), "optimizer.base_lr=4", "method.teacher_momentum=0"), "collapse"),
    ),
    "a learning rate of nothing": (("method=simclr", "optimizer.base_lr=1e-9"), "stuck"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_is_found_out(name, tmp_path, capsys):
    words, rule = BROKEN[name]
    assert trained(tmp_path / "run", *words) == 0
    found, printed = findings(tmp_path / "run"), capsys.readouterr().out
    assert rule in rules(found, "bad"), found
    sentence = next(f.sentence for f in found if f.rule == rule)
    assert printed.count("  unhealthy: ") == len(set(rules(found, "bad")))  # once each
    assert f"  bad: {sentence}\n" in printed


@pytest.mark.parametrize("method", ["simclr", slow("byol"), slow("simsiam"), slow("moco")])
def test_a_healthy_run_is_called_so(method, tmp_path, capsys):
    assert trained(tmp_path / "run", f"method={method}", "backbone=small_resnet", "backbone.widths=[16,32]") == 0
    found = findings(tmp_path / "run")
    assert rules(found) == ["ok"], found
    assert f"  health: {found[0].sentence}\n" in capsys.readouterr().out


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


@pytest.mark.slow
def test_all_processes_stop_together(spawn, tmp_path):
    words = ("pretrain", *RUN, "method=simsiam", *own("Constant"), "run_dir=run", "trainer.processes=2")
    stopped = spawn(*words, "trainer.on_collapse=stop", PYTHONPATH=str(REPOSITORY))
    assert stopped.status == 1
    assert stopped.err.count("features have collapsed") == 1
    assert 100 < int(newest(tmp_path / "run").name.removeprefix("step-")) < 132


def test_what_was_not_finite_is_remembered_until_the_run_goes_on(tmp_path):
    run = tmp_path / "run"
    words = ("method=simclr", "trainer.epochs=1")
    assert trained(run, *words, "optimizer.base_lr=1e30") == 1
    found = findings(run)
    assert (found[0].level, found[0].rule) == ("bad", "not finite")
    assert "gradient is" in found[0].sentence or "loss is" in found[0].sentence


# --- The online figures, and what TensorBoard shows ---


def test_neighbours_are_the_most_similar():
    queries, bank = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).split([10, 20])
    for row, found in zip(queries, neighbours(queries, 3 * bank, 5)[1], strict=True):
        similar = [float(F.cosine_similarity(row, other, dim=0)) for other in bank]
        assert found.tolist() == sorted(range(20), key=lambda i: -similar[i])[:5]


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
