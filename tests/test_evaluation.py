"""Evaluation: nearest neighbours and linear probes against slow references, the cache, and the verbs end to end."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sslctl.commands.pretrain
import sslctl.evaluation.knn
import sslctl.evaluation.linear_augmented
from sslctl.cli import main
from sslctl.data.sampler import permuted
from sslctl.data.sources import digits
from sslctl.data.sources import folder as folder_source
from sslctl.errors import InputError
from sslctl.evaluation import subjects
from sslctl.evaluation.console import percent
from sslctl.evaluation.features import Features, cached, extract
from sslctl.evaluation.knn import accuracy, knn_votes
from sslctl.evaluation.linear import ProbeGrid, draw_labels, fit_probe, folds, linear_records, train_classifiers
from sslctl.evaluation.online import online_rows
from sslctl.evaluation.runner import label_amount
from sslctl.factory.from_run import resolve_runs
from sslctl.models.weights import weights_sha256
from sslctl.runs import checkpoint
from tests.conftest import write_images
from tests.training import PROBE, SIMCLR, STEPS, differences, finish, metrics, newest, results, signal_at, slow

KEYS = {
    *("protocol", "metric", "value", "subject", "labels", "dataset", "split", "seed", "step", "epoch_rule", "params"),
    *("weights_sha256", "versions"),
}
GRID = ProbeGrid(lr=[0.01, 0.1], weight_decay=[0.0, 0.01], epochs=5, batch_size=32, validation=0.2)


def clusters(rows=120, classes=4, dim=6, spread=0.1, seed=0):
    """Points around one centre a class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % classes
    return Features(centres[labels] + spread * torch.randn(rows, dim, generator=generator), labels, classes)


def pixels(split):
    source = digits(split, image_size=8)
    return Features(source.images.flatten(1).float() / 255, source.labels, 10)


# --- Nearest neighbours ---


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
    found = knn_votes(queries, bank, k=k, temperature=temperature).double()
    shares = [votes / votes.sum(1, keepdim=True) for votes in (found, expected)]
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
    monkeypatch.setattr(sslctl.evaluation.knn, "_CHUNK_BYTES", 4 * len(bank.labels) * rows)
    found = knn_votes(queries, bank, k=9, temperature=0.1, poll=lambda: blocks.append(1))
    assert torch.allclose(found, expected, rtol=1e-5)
    assert len(blocks) == -(-40 // rows)


def test_top1_and_top5_are_counted():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5]])
    assert accuracy(scores, torch.tensor([0, 0])) == {"top1": 0.5, "top5": 0.5}
    assert accuracy(scores, torch.tensor([4, 1])) == {"top1": 0.0, "top5": 1.0}
    assert accuracy(scores[:, :5], torch.tensor([0, 4])) == {"top1": 1.0}


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
    found = train_classifiers(data, [(lr, decay)], epochs=1, batch_size=50, seed=3)
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
    assert torch.allclose(found.weight[0], weight, atol=1e-4)
    assert torch.allclose(found.bias[0, 0], bias, atol=1e-4)


def test_a_probe_does_not_depend_on_the_scale_of_features():
    data, test = clusters(spread=1), clusters(rows=100, spread=1, seed=1)
    scores = []
    for scale in (1, 1000):
        scaled = Features(data.features * scale + 5, data.labels, 4)
        scores.append(fit_probe(scaled, GRID, seed=0)[0].scores(test.features * scale + 5))
    assert torch.allclose(*scores, atol=1e-2)


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
    found = accuracy(classifier.scores(test.features)[0], test.labels)["top1"]
    assert found == pytest.approx(expected, abs=0.01)
    assert found > 0.93


def _records(data, test, amount=None, draws=1):
    source = {"train": digits("train", 8), "test": digits("test", 8)}
    subject = subjects.pixels(sslctl.commands.pretrain.Preprocess(1, 8, 8, [0.3], [0.3]))

    def read(_, source):
        return data if source.split == "train" else test

    train, judged = source["train"], source["test"]
    if amount is None:
        shown = data.features[: len(train)]
        assert len(shown) == len(train)
    return linear_records(subject, train, judged, GRID, amount, draws, read)


@pytest.mark.parametrize("amount", [None, 5])
def test_the_picked_setting_does_not_depend_on_the_test_split(amount):
    data, test = pixels("train"), pixels("test")
    order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))
    shuffled = Features(torch.zeros_like(test.features), test.labels[order], 10)
    (honest, _), (other, _) = (_records(data, t, amount, draws=2 if amount else 1) for t in (test, shuffled))
    assert honest["details"]["picked"] == other["details"]["picked"]
    assert honest["value"] > 0.6
    assert other["value"] < 0.2


def test_the_best_setting_of_a_grid_is_picked():
    grid = ProbeGrid(lr=[1e-6, 0.1], weight_decay=[0.0, 100.0], epochs=5, batch_size=32, validation=0.2)
    _, picked = fit_probe(clusters(spread=1), grid, seed=0)
    assert (picked["lr"], picked["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("rows", [40, 80, 81, 400])
def test_folds_are_disjoint_and_cover(rows):
    data = clusters(rows=rows)
    found = folds(data, share=0.2, seed=0)
    count = torch.stack(found).sum(0)
    if rows <= 80:  # 20 a class: every row is judged once
        assert len(found) == 5
        assert torch.equal(count, torch.ones_like(count))
        held = torch.stack([torch.bincount(data.labels[fold], minlength=4) for fold in found])
        assert (held.max(0).values - held.min(0).values).max() <= 1
    else:
        assert len(found) == 1
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


@pytest.mark.parametrize("labels", [0, -1, -0.1, 2.5, "few", "", True, None, [5], float("inf"), float("nan")])
def test_label_amounts_that_mean_nothing_are_refused(labels):
    with pytest.raises(InputError, match="labels="):
        label_amount(labels)


# --- The online evaluation's images ---


@pytest.mark.parametrize(
    ("size", "queries", "bank"), [(5, 1, 4), (100, 10, 90), (1438, 143, 1295), (60_000, 5000, 20_000)]
)
def test_online_images_are_fixed_and_disjoint(size, queries, bank):
    first, second = online_rows(size)
    assert (len(first), len(second)) == (queries, bank)
    both = torch.cat([first, second])
    assert len(both.unique()) == len(both)
    assert both.min() >= 0
    assert both.max() < size
    torch.manual_seed(1)
    assert torch.equal(online_rows(size)[0], first)
    assert torch.equal(online_rows(size)[1], second)


# --- The cache of features ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sslctl" / "features"


def counted(value=1.0, rows=10):
    calls = []

    def compute():
        calls.append(1)
        return torch.full((rows, 4), value)

    return compute, calls


def test_features_are_computed_once(folder):
    compute, calls = counted()
    first, second = (cached(("weights", "train"), compute, 1.0) for _ in range(2))
    assert len(calls) == 1
    assert torch.equal(first, second)
    assert [f.name for f in folder.iterdir() if f.name.startswith(".")] == []


@pytest.mark.parametrize("key", [("weights", "test"), ("weights2", "train"), ("weightstrain",)])
def test_features_of_another_key_are_computed(key, folder):
    cached(("weights", "train"), counted(1.0)[0], 1.0)
    compute, calls = counted(2.0)
    assert cached(key, compute, 1.0)[0, 0] == 2.0
    assert len(calls) == 1


def test_no_cache_keeps_nothing(folder):
    compute, calls = counted()
    for _ in range(2):
        cached(("weights", "train"), compute, 0)
    assert len(calls) == 2
    assert not folder.exists()


def cut(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "damage", [lambda content: b"", cut, lambda content: b"\x00" * len(content)], ids=["empty", "half", "zeros"]
)
def test_a_damaged_cache_file_is_made_anew(damage, folder):
    compute, calls = counted()
    expected = cached(("weights", "train"), compute, 1.0).clone()
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert torch.equal(cached(("weights", "train"), compute, 1.0), expected)
    assert torch.equal(cached(("weights", "train"), compute, 1.0), expected)
    assert len(calls) == 2


def test_the_oldest_files_make_room(folder):
    for name in ("a", "b", "c"):
        cached((name,), counted(rows=1000)[0], 1.0)
        time.sleep(0.02)
    cached(("a",), counted()[0], 1.0)  # used again: now the newest
    time.sleep(0.02)
    cached(("d",), counted(rows=1000)[0], 2.5 * 16_200 / 2**30)
    assert len(list(folder.iterdir())) == 2
    for name, kept in (("d", True), ("a", True), ("c", False), ("b", False)):
        compute, calls = counted(rows=1000)
        cached((name,), compute, 1.0)
        assert (not calls) == kept, name


def test_features_larger_than_the_limit_are_returned_all_the_same(folder):
    compute, _ = counted(rows=1000)
    assert cached(("a",), compute, 1e-9).shape == (1000, 4)


def test_an_abandoned_extraction_keeps_nothing(folder):
    def compute():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(("a",), compute, 1.0)
    assert not folder.exists() or list(folder.iterdir()) == []


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_extraction_keeps_the_order_of_the_rows(batch_size):
    source = digits("test", image_size=8)
    rows = torch.tensor([5, 3, 3, 200])
    found = extract(lambda images: images.flatten(1), source, rows, resize=8, batch_size=batch_size)
    assert torch.equal(found, source.images[rows].flatten(1).float() / 255)


def test_files_that_were_written_again_are_read_again(tmp_path):
    """The names and sizes of bitmaps stay when their pixels change."""
    root = write_images(tmp_path / "images", count=4, suffix=".bmp")
    before = folder_source("train", str(root), 16, 3, 1.0)
    for path in root.glob("*.bmp"):
        Image.new("RGB", (16, 16)).save(path)
    after = folder_source("train", str(root), 16, 3, 1.0)
    assert before.content_hash == after.content_hash
    assert before.version != after.version
    assert folder_source("train", str(root), 16, 3, 1.0).version == after.version


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
    found = results(run / "results.jsonl")
    keys = {(r["subject"], r["protocol"], r["metric"]) for r in found}
    protocols, metrics_ = ("knn", "linear-cached"), ("top1", "top5")
    assert keys == {(s, p, m) for s in ("trained", "random") for p in protocols for m in metrics_}
    for record in found:
        assert record.keys() >= KEYS
        assert 0 <= record["value"] <= 1
        assert (record["dataset"], record["split"], record["labels"]) == ("digits", "test", "all")
        assert record["details"]["closing"] is True
        assert record["step"] == (STEPS if record["subject"] == "trained" else 0)
        assert {"torch", "sslctl"} <= record["versions"].keys()
    assert len({r["weights_sha256"] for r in found}) == 2


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
    found = added(run, verb, *EVALUATION, *(PROBE if verb == "linear-eval" else ()))
    compared = ("subject", "protocol", "metric", "value", "step", "weights_sha256", "params", "labels", "epoch_rule")
    assert [{k: r[k] for k in compared} for r in found] == [{k: r[k] for k in compared} for r in closing]


def test_training_beats_random_weights_by_neighbours_of_augmentations(run):
    found = by_subject(results(run / "results.jsonl"))
    assert found["trained"]["weights_sha256"] != found["random"]["weights_sha256"]
    assert found["trained"]["value"] != found["random"]["value"]


@pytest.mark.parametrize(
    ("labels", "words", "images"), [slow("5", "5/class", 50), slow("0.1", "0.1", 144), ("all", "all", 1438)]
)
def test_a_linear_probe_of_any_subject_and_label_budget(labels, words, images, run):
    found = by_subject(
        added(
            run, "linear-eval", f"labels={labels}", "draws=2", "subjects=[trained,random,pixels]", *EVALUATION, *PROBE
        )
    )
    assert set(found) == {"trained", "random", "pixels"}
    for record in found.values():
        assert record.keys() >= KEYS
        assert record["labels"] == words
        assert record["details"]["images_with_labels"] == pytest.approx(images, abs=5)
        assert len(record["details"]["picked"]) == (1 if labels == "all" else 2)
        assert ("std" in record) == (labels != "all")
    assert found["pixels"]["backbone_parameters"] == 0
    assert found["pixels"]["value"] > 0.6
    assert found["trained"]["value"] > 0.2


def test_knn_of_pixels_is_that_of_the_images(run):
    found = by_subject(added(run, "knn-eval", "subjects=[pixels]", "knn.k=1", *EVALUATION))
    train, test = pixels("train"), pixels("test")
    expected = accuracy(knn_by_hand(test.features[:60], train, 1, 0.1), test.labels[:60])["top1"]
    votes = knn_votes(test.features, train, k=1, temperature=0.1)
    assert accuracy(votes[:60], test.labels[:60])["top1"] == expected
    assert found["pixels"]["value"] == accuracy(votes, test.labels)["top1"]
    assert found["pixels"]["value"] > 0.95


def test_a_checkpoint_of_a_run_can_be_evaluated(run):
    (path,) = (run / "checkpoints").glob("step-5")
    before = len(results(run / "results.jsonl"))
    assert main(["knn-eval", str(path), "subjects=[trained]", *EVALUATION]) == 0
    (record, _) = results(run / "results.jsonl")[before:]
    assert record["step"] == 5


def test_the_cache_changes_no_result(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = [added(run, "knn-eval", "device=cpu", f"cache={cache}") for cache in ("false", "true", "true")]
    assert len(list((tmp_path / "cache" / "sslctl" / "features").iterdir())) == 4  # two subjects, two splits
    values = [[r["value"] for r in records] for records in found]
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
        found = extract(subject.function, source, torch.cat([queries, bank]), resize=8)
        held = Features(found[len(queries) :], source.labels[bank], 10)
        votes = knn_votes(found[: len(queries)], held, k=200, temperature=0.1)
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


# --- Foreign weights ---

FOREIGN = ("backbone=small_resnet", "backbone.widths=[4,8]", "dataset=digits", "dataset.image_size=8")


@pytest.mark.parametrize("kind", ["safetensors", "pt", "run", "wrapped"])
def test_foreign_weights_are_evaluated_as_the_run_they_came_from(kind, run, tmp_path):
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
    found, own = by_subject(results(out)), by_subject(results(run / "results.jsonl"))
    closing = next(r for r in results(run / "results.jsonl") if (r["subject"], r["protocol"]) == ("trained", "knn"))
    assert set(found) == {"foreign", "random"}
    assert found["foreign"].keys() >= KEYS
    assert found["foreign"]["value"] == closing["value"]
    assert found["foreign"]["step"] is None
    assert found["foreign"]["backbone_parameters"] == own["trained"]["backbone_parameters"]


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
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert (run / "results.jsonl").read_text() == before


def test_a_directory_without_runs_is_refused(tmp_path, capsys):
    assert main(["knn-eval", str(tmp_path), *EVALUATION]) == 2
    assert main(["knn-eval", str(tmp_path / "none"), *EVALUATION]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}: no run directory" in said
    assert f"{tmp_path / 'none'}: no such run" in said


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
    assert percent({"value": 0.91239}) == "91.24"
    assert percent({"value": 0.5, "std": 0.0123}) == "50.00 ± 1.23"


def test_results_are_lines_of_json(run):
    for line in (run / "results.jsonl").read_text().splitlines():
        assert json.loads(line)["details"]
