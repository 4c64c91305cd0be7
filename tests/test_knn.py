"""Nearest neighbours against a slow loop."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score

import sslctl.evaluation.knn
from sslctl import signals
from sslctl.data.sources import digits, from_tensors
from sslctl.evaluation.features import Features
from sslctl.evaluation.knn import Knn, accuracy, classifier_results, knn_votes, neighbours
from sslctl.evaluation.subjects import Preprocess, pixels
from sslctl.evaluation.task import Reader, Task


def clusters(rows=120, classes=4, dim=6, spread=0.1, seed=0):
    """Points around one centre a class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % classes
    return Features(centres[labels] + spread * torch.randn(rows, dim, generator=generator), labels, classes)


def knn_by_hand(queries, bank, k, temperature):
    """The same votes, one query and one neighbour at a time."""
    votes = torch.zeros(len(queries), bank.num_classes, dtype=torch.float64)
    for n, query in enumerate(queries.double()):
        similar = [
            (float(query @ row / query.norm() / row.norm()), int(label))
            for row, label in zip(bank.features.double(), bank.labels, strict=True)
        ]
        for similarity, label in sorted(similar, reverse=True)[:k]:
            votes[n, label] += np.exp(similarity / temperature)
    return votes


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.07), (20, 0.5), (500, 0.1)])
def test_knn_equals_a_slow_loop(k, temperature):
    bank, queries = clusters(spread=1.5), clusters(rows=30, spread=1.5, seed=1).features
    expected = knn_by_hand(queries, bank, k, temperature)
    actual = knn_votes(queries, bank, k=k, temperature=temperature).double()
    shares = [votes / votes.sum(1, keepdim=True) for votes in (actual, expected)]
    assert torch.allclose(*shares, atol=1e-5)


def test_knn_of_the_bank_itself_with_one_neighbour_is_perfect():
    bank = clusters(spread=5)
    votes = knn_votes(bank.features, bank, k=1, temperature=0.1)
    assert accuracy(votes, bank.labels)["top1"] == 1.0


@pytest.mark.parametrize("temperature", [2e-4, 1e-5])
def test_knn_at_a_low_temperature_is_the_nearest_neighbour(temperature):
    bank, queries = clusters(spread=2), clusters(rows=40, spread=2, seed=1).features
    nearest = bank.labels[(F.normalize(queries, dim=1) @ F.normalize(bank.features, dim=1).T).argmax(1)]
    votes = knn_votes(queries, bank, k=20, temperature=temperature)
    assert torch.equal(votes.argmax(1), nearest)


def test_knn_at_a_high_temperature_is_a_majority_vote():
    bank, queries = clusters(spread=2), clusters(rows=40, spread=2, seed=1).features
    top = (F.normalize(queries, dim=1) @ F.normalize(bank.features, dim=1).T).topk(15, dim=1).indices
    counts = F.one_hot(bank.labels[top], 4).sum(1).float()
    votes = knn_votes(queries, bank, k=15, temperature=1e6)
    assert torch.allclose(votes / votes.sum(1, keepdim=True), counts / 15, atol=1e-4)
    assert not torch.equal(votes.argmax(1), knn_votes(queries, bank, k=15, temperature=0.01).argmax(1))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_knn_does_not_depend_on_the_scale_of_features(scale):
    bank, queries = clusters(spread=2), clusters(rows=40, spread=2, seed=1).features
    scaled = Features(bank.features * scale, bank.labels, 4)
    expected = knn_votes(queries, bank, k=9, temperature=0.1)
    assert torch.allclose(knn_votes(queries * 7, scaled, k=9, temperature=0.1), expected, rtol=1e-3)


@pytest.mark.parametrize("rows", [1, 7, 39])
def test_knn_does_not_depend_on_the_size_of_a_block(rows, monkeypatch):
    bank, queries = clusters(spread=2), clusters(rows=40, spread=2, seed=1).features
    expected, blocks = knn_votes(queries, bank, k=9, temperature=0.1), []
    monkeypatch.setattr(sslctl.evaluation.knn, "CHUNK_BYTES", 4 * len(bank.labels) * rows)
    monkeypatch.setattr(signals, "check", lambda: blocks.append(1))  # once a block
    actual = knn_votes(queries, bank, k=9, temperature=0.1)
    assert torch.allclose(actual, expected, rtol=1e-5)
    assert len(blocks) == -(-40 // rows)


def test_neighbours_are_all_of_a_bank_of_fewer():
    bank, queries = clusters(rows=12, spread=2).features, clusters(rows=3, spread=2, seed=1).features
    similarity, rows = neighbours(queries, bank, 500)
    assert torch.equal(rows.sort(1).values, torch.arange(12).expand(3, 12))
    torch.testing.assert_close(similarity, F.cosine_similarity(queries[:, None], bank[rows], dim=2))
    assert (similarity.diff(dim=1) <= 0).all()


def test_top1_and_top5_are_counted():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5]])
    assert accuracy(scores, torch.tensor([0, 0])) == {"top1": 0.5, "top5": 0.5}
    assert accuracy(scores, torch.tensor([4, 1])) == {"top1": 0.0, "top5": 1.0}
    assert accuracy(scores[:, :5], torch.tensor([0, 4])) == {"top1": 1.0}


# --- The protocol ---


class Given(Reader):
    """Features that are there, whatever the subject."""

    def __init__(self, **splits):
        super().__init__(torch.device("cpu"), workers=0, cache_gb=0)
        self.splits = splits

    def __call__(self, subject, source):
        return self.splits[source.split]


def described_by(features, split):
    """Images of nothing, with the labels of given features; None where there are none."""
    if features is None:
        return None
    images = torch.zeros(len(features.labels), 1, 8, 8, dtype=torch.uint8)
    return from_tensors("digits", split, images, features.labels, tuple(map(str, range(features.num_classes))), 8)


def measured(protocol, train, test, **task):
    """The results of a protocol on given features of a training and a test split, each a dict."""
    sources = {split: described_by(features, split) for split, features in (("train", train), ("test", test))}
    task = Task(**sources, read=Given(train=train, test=test), **task)
    return [vars(result) for result in protocol(pixels(Preprocess(1, 8, 8, [0.3], [0.3])), task)]


def test_the_protocol_votes_with_each_k_of_the_training_images():
    train, test = clusters(300, 8, spread=2), clusters(20, 8, spread=2, seed=1)
    actual = {(r["metric"], r["params"]["k"]): r for r in measured(Knn([1, 7, 250], 5.0), train, test)}
    for k in (1, 7, 250):  # 250: more than are searched in any case
        expected = accuracy(knn_by_hand(test.features, train, k, 5.0), test.labels)
        assert {metric: actual[metric, k]["value"] for metric in ("top1", "top5")} == pytest.approx(expected)
        low, high = actual["top1", k]["ci95"]
        assert low <= expected["top1"] <= high
        assert actual["top1", k]["params"]["bank"] == 300
    assert len({r["value"] for r in actual.values()}) > 3


# --- Uneven classes, few images ---


def uneven(rows, seed):
    """Images of 8×8 in three classes of which the first has nine tenths."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(rows) % 10).clamp(min=7) - 7
    images = torch.randint(0, 256, (rows, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images[labels == 1, :, :4] //= 4  # a class that is told apart, one that is not
    return from_tensors("uneven", f"of {seed}", images, labels, ("good", "scratch", "hole"), 8)


def results_of(train, test, **settings):
    subject = pixels(Preprocess(1, 8, 8, [0.5], [0.25]))
    return Knn(**{"k": [5], "temperature": 0.1} | settings)(subject, Task(train, test, Reader("cpu", 0, 0.0)))


def test_uneven_classes_are_judged_class_by_class_too():
    train, test = uneven(200, 0), uneven(100, 1)
    top1, balanced = results_of(train, test)
    assert (top1.metric, balanced.metric) == ("top1", "balanced_accuracy")
    assert top1.details["majority"] == pytest.approx(0.8)
    recalls = top1.details["of_each_class"]
    assert list(recalls) == ["good", "scratch", "hole"]
    assert balanced.value == pytest.approx(sum(recalls.values()) / 3)
    assert top1.value == pytest.approx(0.8 * recalls["good"] + 0.1 * recalls["scratch"] + 0.1 * recalls["hole"])
    assert recalls["hole"] < 0.2 < 0.8 < recalls["scratch"]
    assert balanced.ci95[0] < balanced.value < balanced.ci95[1]
    even = digits("test", 8)
    assert [r.metric for r in results_of(digits("train", 8), even)] == ["top1", "top5"]


def test_balanced_accuracy_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    source = uneven(100, 0)
    guesses = [torch.randint(0, 3, (100,), generator=generator) for _ in range(2)]
    hits = [{"top1": guess == source.labels} for guess in guesses]
    settings = {"protocol": "knn", "labels": "all", "params": {"k": 5, "temperature": 0.1, "bank": 100}}
    _, balanced = classifier_results(pixels(Preprocess(1, 8, 8, [0.5], [0.25])), source, hits, **settings)
    expected = [balanced_accuracy_score(source.labels, guess) for guess in guesses]
    assert balanced.value == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_the_neighbours_that_are_recorded_are_those_that_there_are():
    train, test = uneven(20, 0), uneven(40, 1)
    actual = results_of(train, test, k=[5, 20, 200])
    assert [r.params["k"] for r in actual if r.metric == "top1"] == [5, 20]
