"""Linear probes: against scikit-learn and torch, the grid and its choice, draws of few labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sslctl.data.sampler import permuted
from sslctl.errors import InputError
from sslctl.evaluation import linear
from sslctl.evaluation.features import Features
from sslctl.evaluation.knn import accuracy
from sslctl.evaluation.labelled_rows import draw_labels, folds
from sslctl.evaluation.linear import (
    LinearProbe,
    LinearProbes,
    ProbeGrid,
    fit_probe,
    steps_of,
    train_classifiers,
)
from sslctl.evaluation.task import label_amount
from tests.test_evaluation import pixels
from tests.test_knn import clusters, measured

GRID = ProbeGrid(lr=[0.01, 0.1], weight_decay=[0.0, 0.01], epochs=5, batch_size=32, validation=0.2)


# --- Linear probes ---


def test_separable_classes_are_separated():
    data, test = clusters(), clusters(rows=200, seed=1)
    classifier, picked = fit_probe(data, GRID, seed=0)
    assert accuracy(classifier.scores(test.features)[0], test.labels)["top1"] == 1.0
    assert picked["validation_top1"] == 1.0


def test_a_probe_finds_nothing_in_noise():
    generator = torch.Generator().manual_seed(0)
    data = Features(torch.randn(400, 6, generator=generator), torch.arange(400) % 4, 4)
    test = Features(torch.randn(400, 6, generator=generator), torch.arange(400) % 4, 4)
    classifier, _ = fit_probe(data, GRID, seed=0)
    assert accuracy(classifier.scores(test.features)[0], test.labels)["top1"] == pytest.approx(0.25, abs=0.08)


def test_a_grid_equals_training_each_setting_alone():
    data = clusters(spread=1)
    together = train_classifiers(data, GRID.settings(), epochs=5, batch_size=32, seed=3)
    assert len(GRID.settings()) == 4
    for number, setting in enumerate(GRID.settings()):
        alone = train_classifiers(data, [setting], epochs=5, batch_size=32, seed=3)
        assert torch.allclose(together.weight[number], alone.weight[0], atol=1e-5)
        assert torch.allclose(together.bias[number], alone.bias[0], atol=1e-5)
    assert not torch.allclose(together.weight[0], together.weight[3], atol=1e-2)


def test_a_classifier_equals_torchs_sgd_on_cross_entropy():
    data, lr, decay, steps = clusters(spread=1), 0.1, 0.01, 300
    actual = train_classifiers(data, [(lr, decay)], epochs=1, batch_size=50, seed=3)
    x = (data.features - data.features.mean(0)) / data.features.std(0)
    weight, bias = torch.zeros(6, 4, requires_grad=True), torch.zeros(4, requires_grad=True)
    groups = [{"params": [weight], "weight_decay": decay}, {"params": [bias]}]
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + np.cos(np.pi * step / steps)))
    for step in range(steps):
        epoch, place = divmod(step, 120 // 50)
        rows = permuted(np.arange(120), 120, 3, epoch)[place * 50 : place * 50 + 50]
        optimizer.zero_grad()
        F.cross_entropy(x[rows] @ weight + bias, data.labels[rows]).backward()
        optimizer.step()
        cosine.step()
    assert torch.allclose(actual.weight[0], weight, atol=1e-4)
    assert torch.allclose(actual.bias[0, 0], bias, atol=1e-4)


def test_a_probe_does_not_depend_on_the_scale_of_features():
    data, test = clusters(spread=1), clusters(rows=100, spread=1, seed=1)
    scores = []
    for scale in (1, 1000):
        scaled = Features(data.features * scale + 5, data.labels, 4)
        scores.append(fit_probe(scaled, GRID, seed=0)[0].scores(test.features * scale + 5))
    assert torch.allclose(*scores, atol=1e-2)


def test_an_images_score_does_not_depend_on_the_images_beside_it():
    data, test = clusters(spread=1), clusters(rows=20, spread=1, seed=1)
    classifiers = train_classifiers(data, [(0.1, 0.0)], epochs=1, batch_size=32, seed=0)
    each = [classifiers.scores(row[None]) for row in test.features]
    assert torch.allclose(torch.cat(each, 1), classifiers.scores(test.features), atol=1e-4)


def test_a_constant_feature_does_no_harm():
    data = clusters()
    padded = Features(torch.cat([data.features, torch.full((120, 1), 3.0)], 1), data.labels, 4)
    classifier, _ = fit_probe(padded, GRID, seed=0)
    assert accuracy(classifier.scores(padded.features)[0], data.labels)["top1"] == 1.0


def test_the_probe_agrees_with_scikit_learn_on_digits():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = pixels("train"), pixels("test")
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    reference.fit(train.features.numpy(), train.labels.numpy())
    expected = reference.score(test.features.numpy(), test.labels.numpy())
    grid = ProbeGrid([0.01, 0.03, 0.1, 0.3], [0.0, 1e-4, 1e-3], epochs=100, batch_size=1024, validation=0.1)
    classifier, _ = fit_probe(train, grid, seed=0)
    actual = accuracy(classifier.scores(test.features)[0], test.labels)["top1"]
    assert actual == pytest.approx(expected, abs=0.01)
    assert actual > 0.93


@pytest.mark.slow
@pytest.mark.parametrize("amount", [None, 5])
def test_the_picked_setting_does_not_depend_on_the_test_split(amount):
    data, test = pixels("train"), pixels("test")
    order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))
    shuffled = Features(torch.zeros_like(test.features), test.labels[order], 10)
    probe = LinearProbe(GRID, amount, draws=2 if amount else 1)
    (honest, _), (other, _) = (measured(probe, data, t) for t in (test, shuffled))
    assert honest["details"]["picked"] == other["details"]["picked"]
    assert honest["value"] > 0.6
    assert other["value"] < 0.2


def test_each_draw_has_its_own_labels_and_all_draws_make_the_value(monkeypatch):
    seeds, fit = [], linear.fit_probe
    monkeypatch.setattr(linear, "fit_probe", lambda *data, seed: seeds.append(seed) or fit(*data, seed=seed))
    data, test = clusters(80, 8, spread=2), clusters(60, 8, spread=2, seed=1)
    grid = ProbeGrid(lr=[0.1], weight_decay=[0.0], epochs=5, batch_size=8, validation=0.2)
    top1, top5 = measured(LinearProbe(grid, 3, draws=3), data, test, seed=2)
    assert seeds == [2000, 2001, 2002]
    each = []
    for number in (2000, 2001, 2002):
        rows = draw_labels(data.labels, 3, number)
        few = Features(data.features[rows], data.labels[rows], 8)
        classifier = train_classifiers(few, [(0.1, 0.0)], 5, 8, seed=number)
        each.append(accuracy(classifier.scores(test.features)[0], test.labels))
    for result in (top1, top5):
        values = [hits[result["metric"]] for hits in each]
        assert len(set(values)) > 1
        assert result["value"] == pytest.approx(np.mean(values))
        assert result["std"] == pytest.approx(np.std(values, ddof=1))
    assert (top1["labels"], top1["draws"], top1["details"]["images_with_labels"]) == ("3/class", 3, 24)


def test_amounts_of_labels_that_a_class_lacks_are_left_out():
    probes, omitted = LinearProbes(vars(ProbeGrid([0.1], [0.0], 1, 32, 0.2)), [5, 30], draws=2), []
    actual = measured(probes, clusters(80), clusters(40, seed=1), omitted=omitted)
    assert [(r["labels"], r["draws"]) for r in actual] == [("all", None), ("5/class", 2)]
    assert omitted == ["few_labels=30: class 0 has only 20 images"]


@pytest.mark.parametrize(
    ("rows", "epochs", "most_steps", "expected"),
    [
        *((1000, 10, None, 300), (10_050, 50, None, 5000), (10_050, 50, 2000, 2000), (10_050, 50, 20, 1000)),
        *((10_050, 50, 9000, 5000), (30, 400, None, 400), (30, 20, None, 300)),
    ],
)
def test_steps_are_those_of_the_epochs_within_bounds(rows, epochs, most_steps, expected):
    assert steps_of(rows, epochs, 100, most_steps) == expected


def test_validation_is_of_rows_that_were_not_trained_on():
    """More dimensions than rows: what a classifier was trained on it knows by heart, of others it knows nothing."""
    generator = torch.Generator().manual_seed(0)
    data = Features(torch.randn(80, 300, generator=generator), torch.arange(80) % 4, 4)
    assert fit_probe(data, GRID, seed=0)[1]["validation_top1"] < 0.5


def test_of_equal_hits_the_surer_setting_is_picked():
    grid = ProbeGrid(lr=[0.1, 1e-4], weight_decay=[0.0], epochs=5, batch_size=32, validation=0.2)
    for lr in (grid.lr, grid.lr[::-1]):
        _, picked = fit_probe(clusters(spread=0.01), ProbeGrid(**vars(grid) | {"lr": lr}), seed=0)
        assert (picked["validation_top1"], picked["lr"]) == (1.0, 0.1)


def test_the_classifier_is_trained_on_all_rows_in_the_end():
    data = clusters(spread=1)
    classifier, picked = fit_probe(data, GRID, seed=0)
    setting = [(picked["lr"], picked["weight_decay"])]
    assert torch.equal(classifier.weight, train_classifiers(data, setting, 5, 32, seed=0).weight)


def test_the_best_setting_of_a_grid_is_picked():
    grid = ProbeGrid(lr=[1e-6, 0.1], weight_decay=[0.0, 100.0], epochs=5, batch_size=32, validation=0.2)
    _, picked = fit_probe(clusters(spread=1), grid, seed=0)
    assert (picked["lr"], picked["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("rows", [40, 80, 81, 400])
def test_folds_are_disjoint_and_cover(rows):
    data = clusters(rows=rows)
    actual = folds(data, share=0.2, seed=0)
    count = torch.stack(actual).sum(0)
    if rows <= 80:  # 20 a class: every row is judged once
        assert len(actual) == 5
        assert torch.equal(count, torch.ones_like(count))
        held = torch.stack([torch.bincount(data.labels[fold], minlength=4) for fold in actual])
        assert (held.max(0).values - held.min(0).values).max() <= 1
    else:
        assert len(actual) == 1
        assert count.sum() == round(0.2 * rows)


@pytest.mark.parametrize("rows", [12, 400])
def test_folds_do_not_change_between_calls_and_depend_on_the_seed(rows):
    first, again, other = (torch.stack(folds(clusters(rows=rows), 0.2, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_label_a_class_is_too_few_to_choose_settings_and_the_grids_middle_is_taken():
    grid = ProbeGrid(lr=[0.3, 0.01, 0.1, 0.03], weight_decay=[0.0, 1e-3, 1e-4], epochs=5, batch_size=32, validation=0.2)
    few, test = clusters(rows=4, spread=0.3), clusters(rows=200, spread=0.3)
    classifier, picked = fit_probe(few, grid, seed=0)
    assert picked == {"lr": 0.03, "weight_decay": 1e-4, "validation_top1": None, "steps": 300}
    assert accuracy(classifier.scores(test.features)[0], test.labels)["top1"] > 0.9
    _, chosen = fit_probe(clusters(rows=8), grid, seed=0)
    assert chosen["validation_top1"] is not None


def test_a_rare_class_among_many_labels_does_not_hinder_the_choice():
    data = clusters(rows=401)
    data.labels[data.labels == 3] = 2
    data.labels[0] = 3
    assert fit_probe(data, GRID, seed=0)[1]["validation_top1"] is not None


# --- Few labels ---


@pytest.mark.parametrize("amount", [1, 5, 20])
def test_a_draw_takes_as_many_of_each_class(amount):
    labels = clusters(rows=200).labels
    rows = draw_labels(labels, amount, draw=0)
    assert torch.bincount(labels[rows]).tolist() == [amount] * 4
    assert len(rows.unique()) == len(rows)


@pytest.mark.parametrize(("share", "expected"), [(0.1, [10, 5, 1]), (0.5, [50, 25, 4]), (0.001, [1, 1, 1])])
def test_a_draw_of_a_share_takes_that_share_of_each_class(share, expected):
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 8)
    assert torch.bincount(labels[draw_labels(labels, share, draw=0)]).tolist() == expected


def test_draws_come_back_and_differ_from_each_other():
    labels = clusters(rows=200).labels
    draws = [draw_labels(labels, 5, draw=d).tolist() for d in range(4)]
    assert [draw_labels(labels, 5, draw=d).tolist() for d in range(4)] == draws
    assert len({tuple(d) for d in draws}) == 4
    spread = torch.cat([draw_labels(labels, 5, draw=d) for d in range(200)])
    assert len(spread.unique()) == 200, "some images are never drawn"


def test_more_labels_than_there_are_is_refused():
    with pytest.raises(InputError, match="class 2 has only 8 images"):
        draw_labels(torch.tensor([0] * 100 + [2] * 8), 9, draw=0)


@pytest.mark.parametrize(
    ("labels", "amount"), [("all", None), (5, 5.0), (1, 1.0), (0.1, 0.1), (250, 250.0), (2.0, 2.0)]
)
def test_label_amounts_are_understood(labels, amount):
    assert label_amount(labels) == amount


@pytest.mark.parametrize("labels", [0, -1, -0.1, 1.5, 2.5, "few", "", True, None, [5], float("inf"), float("nan")])
def test_label_amounts_that_mean_nothing_are_refused(labels):
    with pytest.raises(InputError, match="labels="):
        label_amount(labels)
