"""Pretext, masked and colour methods learn: their own task far better than by chance, and features that beat random ones.

One of each kind, by the measure that suits it: turned images leave features for few labels; from masked images a fine-tuning
begins better. scripts/small_benchmark.py trains every method of every kind.
"""

import statistics

import pytest
import torch

from sslctl.data.sources import fashion_mnist
from sslctl.errors import InputError
from tests.runs import metrics
from tests.test_data import idx
from tests.test_learning import features_of, few_label, train

SEEDS = (0, 1)
SGD = ("optimizer=sgd", "optimizer.base_lr=0.1", "optimizer.lr_scaling=linear", "backbone=small_resnet")
VIT = ("backbone=small_vit", "backbone.kwargs.embed_dim=64", "backbone.kwargs.depth=2", "backbone.kwargs.num_heads=2")


def last(run, name):
    """The mean of a logged metric over the run's last steps."""
    return statistics.fmean([record[name] for record in metrics(run) if name in record][-10:])


# --- Pretext tasks ---


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """A part of Fashion-MNIST: digits, which are known by their shape alone, gain nothing from these tasks."""
    root = tmp_path_factory.mktemp("clothes")
    for split, stem, count in (("train", "train", 6000), ("test", "t10k", 2000)):
        try:
            source = fashion_mnist(split, 28, None, download=False)
        except InputError as error:
            pytest.skip(f"needs Fashion-MNIST (apt-get install dataset-fashion-mnist): {error}")
        (root / f"{stem}-images-idx3-ubyte").write_bytes(idx(source.images[:count, 0].numpy()))
        (root / f"{stem}-labels-idx1-ubyte").write_bytes(idx(source.labels[:count].to(torch.uint8).numpy()))
    return root


@pytest.mark.slow
def test_a_task_is_solved_and_leaves_features_that_need_fewer_labels_than_random_ones(clothes, tmp_path):
    words = (*SGD, "backbone.widths=[16,32]", "trainer.epochs=2", "trainer.log_every_steps=1")
    words += ("dataset=fashion_mnist", f"dataset.root={clothes}", "optimizer.base_lr=0.2")
    runs = [train(tmp_path, "rotation", *words, seed=seed) for seed in SEEDS]
    solved = min(last(run, "accuracy") for run in runs)
    worst, best_random = min(map(few_label, runs)), max(few_label(run, untrained=True) for run in runs)
    print(f"rotation: {solved:.3f} solved, worst trained {worst:.3f}, best random {best_random:.3f}")
    assert solved > 2 / 4  # a quarter by chance
    assert worst >= best_random + 0.01


# --- Masked methods: fine-tuning ---


def fine_tuned(folder, name, weights, seed):
    """Top-1 on the test split after a few epochs with all labels, from some weights or from scratch."""
    start = (f"backbone.weights={weights}",) if weights else ()
    words = (*VIT, *start, "trainer.epochs=4", "optimizer.base_lr=1e-3", "augmentation.global.flip=0")
    run = train(folder, f"supervised {name}", "method=supervised", *words, seed=seed)
    _, (images, labels) = features_of(run, classify=True)
    return (images.argmax(1) == labels).float().mean().item()


@pytest.mark.slow
def test_fine_tuning_begins_better_from_masked_images_than_from_scratch(tmp_path):
    words = (*VIT, "trainer.epochs=12", "optimizer.base_lr=2e-3", "trainer.log_every_steps=1")
    run = train(tmp_path, "mae", *words)
    losses = [record["loss"] for record in metrics(run) if "loss" in record]
    assert statistics.fmean(losses[-10:]) < 0.9 * losses[0]
    trained = min(fine_tuned(tmp_path, "mae", run, seed) for seed in SEEDS)
    scratch = max(fine_tuned(tmp_path, "scratch", None, seed) for seed in SEEDS)
    print(f"mae: worst trained {trained:.3f}, best from scratch {scratch:.3f}")
    assert trained >= scratch + 0.03


# --- Colours ---


@pytest.mark.slow
def test_colours_of_photographs_are_told_from_their_greys(tmp_path):
    words = ("dataset=photos", "backbone=small_resnet")
    words += ("backbone.widths=[16,32]", "trainer.epochs=4", "trainer.log_every_steps=1")
    run = train(tmp_path, "colorization", *words, "dataset.scale.colour_dim=32")
    losses = [record["loss"] for record in metrics(run) if "loss" in record]
    assert statistics.fmean(losses[-10:]) < 0.7 * losses[0]
    assert last(run, "accuracy") > 1.1 * last(run, "most_frequent")  # of always saying one colour
