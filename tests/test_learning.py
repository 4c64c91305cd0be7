"""Methods learn: on digits, the worst of two seeds of one method a family beats the best of two random networks.

By logistic regression on five labels a class: with all labels, digits are too easy to tell networks apart. The settings were
chosen with the online kNN, among training images. scripts/small_benchmark.py trains every method and variant, on 60,000 images
each; its families are these. Pretext and masked methods: test_learning_tasks.py.
"""

import contextlib
import io
import statistics

import pytest
import torch
from omegaconf import OmegaConf
from sklearn.linear_model import LogisticRegression

from sslctl.cli import main
from sslctl.evaluation.features import extract
from sslctl.evaluation.labelled_rows import draw_labels
from sslctl.factory.from_config import build_source
from sslctl.factory.from_run import load_method, resolve_runs, run_preprocess
from sslctl.runs import checkpoint
from sslctl.runs.reading import read_config

SEEDS = (0, 1)
COMMON = (
    *("dataset=digits", "trainer.batch_size=64", "trainer.epochs=4", "trainer.threads=1", "trainer.device=cpu"),
    *("trainer.tensorboard=false", "trainer.log_every_steps=1000", "evaluation.closing=false"),
    *("evaluation.knn_every_epochs=null", "optimizer=adamw", "optimizer.lr_scaling=none", "optimizer.base_lr=3e-3"),
    *("scheduler.warmup_epochs=0.5", "dataset.scale.head_dim=128", "dataset.scale.prototypes=32"),
)
RESNET = ("backbone=small_resnet", "backbone.widths=[16,32]")
MOCO = (*RESNET, "method.temperature=0.1", "method.batchnorm_groups=1")
METHODS = {
    "moco": MOCO,  # contrastive
    "byol": (*RESNET, "augmentation=moco_v2", "method.teacher_momentum=0.95", "trainer.epochs=12"),  # self-distillation
    "swav": (  # clustering
        *(*RESNET, "augmentation=simclr", "method.epsilon=0.02", "method.prototypes=128"),  # sharper codes
        "trainer.epochs=8",
    ),
    "wmse": (*RESNET, "method.whitening_size=64"),  # decorrelation
    "seed": RESNET,  # distillation
}


def train(folder, name, *more, seed=0):
    """A small run to its end; returns its directory."""
    run = folder / f"{name}-{seed}"
    with contextlib.redirect_stdout(io.StringIO()):
        status = main(["pretrain", *COMMON, f"method={name}", *more, f"seed={seed}", f"run_dir={run}"])
    assert status == 0
    return run


def features_of(run, *, untrained=False, classify=False):
    """((features, labels) of the training split, the same of the test split); classify: scores of the labels instead."""
    dataset = read_config(run)["dataset"]
    method = load_method(run)
    if not untrained:
        _, path = resolve_runs(str(run))[0]
        checkpoint.load(path, method)
    method.eval()

    def function(images):
        return method.classifier(method.backbone(images)) if classify else next(iter(method.features(images).values()))

    resize = run_preprocess(run).resize
    splits = [build_source(OmegaConf.create(dataset), split) for split in ("train", "test")]
    return [(extract(function, split, torch.arange(len(split)), resize=resize), split.labels) for split in splits]


def few_label(run, *, untrained=False):
    """Top-1 on the test split of logistic regression on 5 labels a class of the training split, mean of five draws."""
    (bank, labels), (queries, truth) = features_of(run, untrained=untrained)
    hits = []
    for draw in range(5):
        rows = draw_labels(labels, 5, draw)
        mean, std = bank[rows].mean(0), bank[rows].std(0).clamp(min=1e-6)
        probe = LogisticRegression(max_iter=1000).fit((bank[rows] - mean) / std, labels[rows])
        hits.append(probe.score((queries - mean) / std, truth))
    return statistics.fmean(hits)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run that a distilled network learns from, wider than it is."""
    return train(tmp_path_factory.mktemp("teacher"), "moco", *MOCO, "backbone.widths=[32,64]")


@pytest.fixture
def learns(tmp_path_factory, request):
    """(worst trained, best untrained) of a method."""

    def measure(name, *more):
        taught = (f"method.teacher={request.getfixturevalue('teacher')}",) if name == "seed" else ()
        folder = tmp_path_factory.mktemp(name)
        runs = [train(folder, name, *METHODS[name], *more, *taught, seed=seed) for seed in SEEDS]
        return min(few_label(run) for run in runs), max(few_label(run, untrained=True) for run in runs)

    return measure


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_worst_seed_beats_the_best_random_network(name, learns):
    worst, best_random = learns(name)
    print(f"{name}: worst trained {worst:.3f}, best random {best_random:.3f}")
    assert worst >= best_random + 0.01


@pytest.mark.slow
def test_a_method_that_does_not_move_does_not_pass(learns):
    worst, best_random = learns("wmse", "trainer.epochs=2", "optimizer.base_lr=1e-9")
    assert worst < best_random + 0.01
