"""Figures of features: known values, slow references, and what must not change them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score, average_precision_score, normalized_mutual_info_score

import sslctl.evaluation.retrieval
from sslctl import signals
from sslctl.evaluation import label_free
from sslctl.evaluation.clustering import Clustering, agreement, cluster, matched_hits, table_scores
from sslctl.evaluation.console import percent
from sslctl.evaluation.features import Features
from sslctl.evaluation.knn import neighbours
from sslctl.evaluation.results import interval, interval_of_mean
from sslctl.evaluation.retrieval import Retrieval, average_precision, recall_hits
from sslctl.ops.kmeans import nearest, spherical_kmeans
from tests.test_knn import clusters, measured


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- RankMe ---


def test_rankme_of_gaussian_noise():
    assert label_free.rankme(noise(5000, 64)) == pytest.approx(63.9, abs=0.1)


def test_rankme_of_one_direction_is_one():
    assert label_free.rankme(noise(500, 1) * noise(1, 64, seed=1)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_rankme_of_a_collapse_is_one(value):
    assert label_free.rankme(torch.full((100, 16), value)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", [(300, 20), (20, 300)])
def test_rankme_equals_the_formula(shape):
    z = noise(*shape) * torch.linspace(0.1, 3, shape[1]) + 0.5
    sigma = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = sigma / np.abs(sigma).sum() + 1e-7
    assert label_free.rankme(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_rankme_does_not_depend_on_the_scale_and_is_not_centred():
    z = noise(300, 20)
    assert label_free.rankme(z * 1e-3) == pytest.approx(label_free.rankme(z), rel=1e-5)
    assert label_free.rankme(z + 100) < 2


# --- α-ReQ ---


def test_the_exponent_of_a_power_law_is_found():
    eigenvalues = torch.arange(1, 513, dtype=torch.float64) ** -1.3
    assert label_free.decay_exponent(eigenvalues) == pytest.approx(1.3, abs=1e-9)
    assert label_free.decay_exponent(eigenvalues[:40] * 7) == pytest.approx(1.3, abs=1e-9)
    rounding = torch.full((60,), 1e-15, dtype=torch.float64)
    assert label_free.decay_exponent(torch.cat([eigenvalues[:40], rounding])) == pytest.approx(1.3, abs=1e-9)


def test_the_exponent_equals_the_authors_solution():
    eigenvalues = torch.arange(1, 200, dtype=torch.float64) ** -0.8 * (1 + 0.3 * noise(199).double().abs())
    eigenvalues = eigenvalues.sort(descending=True).values
    ranks = np.arange(10, 100)
    y, j = np.log(eigenvalues.numpy())[ranks][:, None], ranks + 1
    x, w = np.stack([-np.log(j), np.ones(len(j))], 1), 1 / j[:, None]
    expected = np.linalg.solve(x.T @ (x * w), (w * x).T @ y).flatten()[0]
    assert label_free.decay_exponent(eigenvalues) == pytest.approx(expected, rel=1e-9)


def test_alpha_req_of_features_with_a_known_spectrum():
    scale = torch.arange(1, 129).double() ** -0.65  # eigenvalues j^-1.3
    rotation = torch.linalg.qr(noise(128, 128).double()).Q
    z = noise(20_000, 128, seed=1).double() * scale @ rotation + 5
    assert label_free.alpha_req(z.float()) == pytest.approx(1.3, abs=0.03)


@pytest.mark.parametrize("z", [noise(100, 12), torch.ones(100, 50), noise(8, 64)], ids=["12", "constant", "8 rows"])
def test_alpha_req_of_too_few_directions_is_none(z):
    assert label_free.alpha_req(z) is None


# --- LiDAR ---


def lidar_by_hand(z, delta=1e-4):
    z = z.double().numpy()
    n, q, dim = z.shape
    means = z.mean(1)
    within = sum(np.outer(view - m, view - m) for rows, m in zip(z, means, strict=True) for view in rows) / (n * q)
    between = sum(np.outer(m - means.mean(0), m - means.mean(0)) for m in means) / n
    values, vectors = np.linalg.eigh(within + delta * np.eye(dim))
    half = vectors @ np.diag(values**-0.5) @ vectors.T
    actual = np.linalg.eigvalsh(half @ between @ half).clip(0)
    p = actual / actual.sum() + 1e-7
    return np.exp(-(p * np.log(p)).sum())


def test_lidar_equals_a_slow_calculation():
    z = noise(30, 1, 8) * torch.linspace(0.2, 2, 8) + 0.3 * noise(30, 5, 8, seed=1)
    assert label_free.lidar(z) == pytest.approx(lidar_by_hand(z), rel=1e-9)


def test_lidar_is_at_most_the_number_of_images_less_one():
    z = noise(10, 1, 64) + 0.01 * noise(10, 4, 64, seed=1)
    assert 5 < label_free.lidar(z) <= 9.01


def test_lidar_counts_what_views_do_not_change():
    informative = noise(500, 1, 4).expand(-1, 6, -1)
    nuisance = 10 * noise(500, 6, 12, seed=1)
    z = torch.cat([informative + 0.1 * noise(500, 6, 4, seed=2), nuisance], 2)
    assert label_free.lidar(z) == pytest.approx(4, abs=0.3)
    assert label_free.rankme(z.flatten(0, 1)) > 10


# --- Spread, alignment, uniformity ---


@pytest.mark.parametrize("dim", [16, 256])
def test_feature_std_on_a_sphere(dim):
    assert label_free.feature_std(noise(5000, dim)) == pytest.approx(dim**-0.5, rel=0.01)
    assert label_free.feature_std(torch.ones(50, dim)) == 0


def test_feature_std_is_that_of_each_dimension_over_images():
    z = noise(30, 5) * torch.linspace(0.1, 2, 5) + torch.arange(5.0)
    rows = np.array([row / np.linalg.norm(row) for row in z.double().numpy()])
    assert label_free.feature_std(z) == pytest.approx(rows.std(0, ddof=1).mean())


def test_alignment():
    x, y = noise(40, 6), noise(40, 6, seed=1)
    assert label_free.alignment(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert label_free.alignment(x, -x) == pytest.approx(4)
    squared = [((a / a.norm() - b / b.norm()) ** 2).sum().item() for a, b in zip(x, y, strict=True)]
    assert label_free.alignment(x, y) == pytest.approx(np.mean(squared), rel=1e-5)


@pytest.mark.parametrize(("dim", "expected"), [(64, -3.87), (128, -3.94), (512, -3.98)])
def test_uniformity_on_a_sphere(dim, expected):
    assert label_free.uniformity(noise(2000, dim)) == pytest.approx(expected, abs=0.01)


def test_uniformity_of_known_points():
    assert label_free.uniformity(torch.ones(20, 5)) == pytest.approx(0, abs=1e-9)
    assert label_free.uniformity(torch.tensor([[1.0, 0], [-2, 0]])) == pytest.approx(-8)


@pytest.mark.parametrize("block", [3, 50, 1024])
def test_uniformity_equals_all_pairs(block, monkeypatch):
    monkeypatch.setattr(label_free, "_BLOCK", block)
    z = noise(50, 6)
    distances = F.pdist(F.normalize(z, dim=1)).double()
    assert label_free.uniformity(z) == pytest.approx((-2 * distances**2).exp().mean().log().item(), rel=1e-5)


def test_the_protocol_without_labels_takes_as_many_images_as_it_is_given():
    z = noise(1438, 12) * torch.linspace(0.2, 3, 1438)[:, None]
    rows = label_free.choose_rows(60, 1438)
    assert len(rows.unique()) == 60
    assert rows.max() > 1000  # not the first ones
    omitted = []
    actual = {
        r["metric"]: r
        for r in measured(label_free.LabelFree(60, 20, 5, 2), Features(z, torch.zeros(1438), 1), None, omitted=omitted)
    }
    assert actual.keys() == {"rankme", "feature_std", "uniformity"}
    for name, figure, count in (("rankme", label_free.rankme, 60), ("feature_std", label_free.feature_std, 60)):
        assert actual[name]["value"] == pytest.approx(figure(z[rows]))
        assert actual[name]["params"] == {"images": count}
    assert actual["uniformity"]["value"] == pytest.approx(label_free.uniformity(z[rows[:20]]))
    assert [reason.partition(" of ")[0] for reason in omitted] == ["α-ReQ", "LiDAR and alignment"]


# --- Retrieval ---


def test_average_precision_equals_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels, asked = (torch.randint(0, 3, (size,), generator=generator) for size in (60, 20))
    similarity, rows = neighbours(noise(20, 5), noise(60, 5, seed=1), 60)
    relevant = labels[rows] == asked[:, None]
    actual = average_precision(relevant, relevant.sum(1))
    expected = [average_precision_score(r.numpy(), s.numpy()) for r, s in zip(relevant, similarity, strict=True)]
    assert actual.tolist() == pytest.approx(expected, abs=1e-6)


def test_average_precision_of_a_cut_list():
    relevant = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    actual = average_precision(relevant, torch.tensor([2, 0, 9, 1]))
    assert actual.tolist() == pytest.approx([(1 + 2 / 3) / 2, 0, 1, 0.25])
    assert recall_hits(relevant, 1).tolist() == [True, False, True, False]
    assert recall_hits(relevant, 4).tolist() == [True, False, True, True]


@pytest.mark.parametrize("depth", [10, 250])
def test_the_retrieval_protocol_equals_a_slow_loop(depth):
    train, test = clusters(300, 6, spread=2), clusters(40, 4, spread=2, seed=1)
    fewer = (train.labels > 1) | (torch.arange(300) < 150)  # half as many of two classes
    train = Features(train.features[fewer], train.labels[fewer], 6)
    similarity = F.normalize(test.features, dim=1) @ F.normalize(train.features, dim=1).T
    precision, recall = [], {1: [], 3: []}
    for row, label in zip(similarity, test.labels, strict=True):
        ranked = (train.labels[row.argsort(descending=True)] == label).tolist()
        at = [sum(ranked[: i + 1]) / (i + 1) for i in range(depth) if ranked[i]]
        precision.append(sum(at) / min(sum(ranked), depth))
        for k, hits in recall.items():
            hits.append(any(ranked[:k]))
    actual = {r["metric"]: r["value"] for r in measured(Retrieval([1, 3], depth), train, test)}
    expected = {f"map@{depth}": np.mean(precision)} | {f"recall@{k}": np.mean(hits) for k, hits in recall.items()}
    assert actual == pytest.approx(expected)


def test_retrieval_of_several_labels_counts_images_that_share_one(monkeypatch):
    blocks = []
    monkeypatch.setattr(sslctl.evaluation.retrieval, "CHUNK_BYTES", 4 * 90 * 7)  # seven queries at once
    monkeypatch.setattr(signals, "check", lambda: blocks.append(1))
    train, test = (
        replace(features, targets=noise(len(features.labels), 4, seed=seed) > 0.7)
        for seed, features in enumerate((clusters(90, 4, spread=2), clusters(30, 4, spread=2, seed=1)))
    )
    similarity = F.normalize(test.features, dim=1) @ F.normalize(train.features, dim=1).T
    precision, first = [], []
    for row, own in zip(similarity, test.targets, strict=True):
        if own.any():
            ranked = (train.targets[row.argsort(descending=True)] & own).any(1).tolist()
            at = [sum(ranked[: i + 1]) / (i + 1) for i in range(20) if ranked[i]]
            precision.append(sum(at) / min(sum(ranked), 20))
            first.append(ranked[0])
    assert 10 < len(precision) < 30  # some ask for nothing
    actual = {r["metric"]: r for r in measured(Retrieval([1], 20), train, test)}
    assert actual["map@20"]["value"] == pytest.approx(np.mean(precision))
    assert actual["recall@1"]["value"] == pytest.approx(np.mean(first))
    assert {r["images"] for r in actual.values()} == {actual["map@20"]["params"]["queries"]} == {len(precision)}
    assert len(blocks) == 1 + -(-len(precision) // 7)  # a signal ends either search between blocks
    assert actual["map@20"]["params"]["relevant"] == "a label in common"


def test_retrieval_is_left_out_where_no_query_has_a_label():
    train, test, omitted = clusters(90), clusters(30), []
    train = replace(train, targets=noise(90, 4) > 0)
    test = replace(test, targets=torch.zeros(30, 4, dtype=torch.bool))
    assert measured(Retrieval([1], 20), train, test, omitted=omitted) == []
    assert omitted == ["retrieval: no test image of digits has a label"]


# --- Clustering ---


@pytest.mark.parametrize("kinds", [(4, 4), (3, 7), (1, 5), (1, 1)])
def test_agreement_equals_scikit_learn(kinds):
    generator = torch.Generator().manual_seed(0)
    clusters, labels = (torch.randint(0, kind, (200,), generator=generator) for kind in kinds)
    labels[:80] = clusters[:80].clamp(max=kinds[1] - 1)
    actual = agreement(clusters, labels)
    assert actual["nmi"][0] == pytest.approx(normalized_mutual_info_score(labels, clusters), abs=1e-9)
    assert actual["ari"][0] == pytest.approx(adjusted_rand_score(labels, clusters), abs=1e-9)


def test_scores_of_resampled_tables_equal_scikit_learn_on_resampled_images():
    clusters, labels = torch.arange(90) % 3, torch.arange(90) % 5
    labels[:50] = clusters[:50]
    rows = torch.randint(0, 90, (90,), generator=torch.Generator().manual_seed(0))
    cells, where = torch.stack([clusters, labels]).unique(dim=1, return_inverse=True)
    counts = torch.bincount(where[rows], minlength=cells.shape[1]).double()
    nmi, ari = table_scores(torch.stack([counts, counts * 1]), *cells)
    assert nmi[1].item() == pytest.approx(normalized_mutual_info_score(labels[rows], clusters[rows]), abs=1e-9)
    assert ari[1].item() == pytest.approx(adjusted_rand_score(labels[rows], clusters[rows]), abs=1e-9)


def test_random_clusters_agree_with_nothing():
    generator = torch.Generator().manual_seed(0)
    clusters, labels = (torch.randint(0, 10, (5000,), generator=generator) for _ in range(2))
    value, (low, high) = agreement(clusters, labels)["ari"]
    assert value == pytest.approx(0, abs=0.005)
    assert low < value < high < 0.01


def test_an_interval_of_agreement_is_that_of_resampled_images():
    generator = torch.Generator().manual_seed(0)
    clusters, labels = torch.arange(200) % 4, torch.arange(200) % 4
    labels[:60] = torch.randint(0, 4, (60,), generator=generator)
    value, (low, high) = agreement(clusters, labels)["ari"]
    scores = []
    for _ in range(300):
        rows = torch.randint(0, 200, (200,), generator=generator)
        scores.append(adjusted_rand_score(labels[rows], clusters[rows]))
    expected = np.quantile(scores, [0.025, 0.975]) - np.mean(scores) + value
    assert (low, high) == pytest.approx(expected, abs=0.2 * (high - low))


def test_clusters_are_matched_with_classes_in_the_best_way():
    generator = torch.Generator().manual_seed(0)
    clusters, labels = (torch.randint(0, 5, (100,), generator=generator) for _ in range(2))
    best = max((torch.tensor(p)[clusters] == labels).sum().item() for p in itertools.permutations(range(5)))
    assert matched_hits(clusters, labels, 5).sum() == best
    assert matched_hits((labels + 2) % 5, labels, 5).all()


def test_separate_clusters_are_found_and_the_test_images_do_not_matter():
    labels = torch.arange(400) % 8
    z = 5 * F.one_hot(labels, 8).float() + 0.3 * noise(400, 8)
    centroids, cosine = cluster(z, 8, restarts=5, iterations=50, images=100, seed=0)
    assert matched_hits(nearest(F.normalize(z, dim=1), centroids), labels, 8).all()
    assert cosine > 0.95
    again, _ = cluster(z, 8, restarts=5, iterations=50, images=100, seed=0)
    assert torch.equal(again, centroids)


@pytest.mark.parametrize("seed", range(8))
def test_a_start_of_kmeans_takes_rows_far_from_those_it_has(seed):
    labels = torch.arange(400) % 8
    z = 5 * F.one_hot(labels, 8).float() + 0.1 * noise(400, 8)
    centroids, _ = cluster(z, 8, restarts=1, iterations=1, images=400, seed=seed)
    assert matched_hits(nearest(F.normalize(z, dim=1), centroids), labels, 8).all()


def test_clusters_of_a_sample_are_refined_on_all_rows():
    z = noise(400, 5)
    centroids, cosine = cluster(z, 10, restarts=2, iterations=200, images=60, seed=0)
    unit = F.normalize(z, dim=1)
    again, chosen = spherical_kmeans(unit, centroids, 1)
    torch.testing.assert_close(again, centroids)  # where Lloyd's algorithm on all rows stays
    assert cosine == pytest.approx((unit * centroids[chosen]).sum(1).mean().item())


def test_more_restarts_are_not_worse():
    z = noise(300, 5)
    cosines = [cluster(z, 12, restarts=r, iterations=100, images=300, seed=0)[1] for r in (1, 20)]
    assert cosines[1] > cosines[0]


def test_clusters_of_collapsed_features_do_no_harm():
    centroids, cosine = cluster(torch.ones(50, 4), 3, restarts=2, iterations=10, images=50, seed=0)
    assert centroids.shape == (3, 4)
    assert cosine == pytest.approx(1)


def test_the_clustering_protocol_looks_at_training_images_and_judges_test_images():
    """Test images of two of three clusters, a fifth of them of another class than their cluster's."""
    axes = 5 * torch.eye(3, 6)
    train = Features((axes[torch.arange(300) % 3]) + 0.3 * noise(300, 6), torch.zeros(300, dtype=torch.long), 3)
    cluster_of, labels = torch.arange(50) % 2, torch.arange(50) % 2
    labels[:10] = 2
    test = Features(axes[cluster_of] + 0.3 * noise(50, 6, seed=1), labels, 3)
    actual = {r["metric"]: r for r in measured(Clustering(3, 20, 200), train, test, seed=1)}
    expected = {"nmi": normalized_mutual_info_score(labels, cluster_of), "ari": adjusted_rand_score(labels, cluster_of)}
    assert {name: r["value"] for name, r in actual.items()} == pytest.approx({"accuracy": 0.8} | expected)


def test_the_seed_decides_clusters_of_noise():
    data = Features(noise(300, 6), torch.arange(300) % 6, 6)
    cosines = [measured(Clustering(1, 5, 100), data, data, seed=s)[0]["details"]["cosine"] for s in (0, 1, 1)]
    assert cosines[0] != cosines[1] == cosines[2]
    assert cosines[1] == cluster(data.features, 6, restarts=1, iterations=5, images=100, seed=1)[1]


def test_kmeans_that_ends_early_ends_where_more_iterations_would():
    z = F.normalize(noise(200, 4), dim=1)
    for actual, expected in zip(spherical_kmeans(z, z[:5], 200), spherical_kmeans(z, z[:5], 500), strict=True):
        assert torch.equal(actual, expected)


# --- Intervals ---


def test_an_interval_of_hits_is_that_of_a_binomial():
    from scipy.stats import binom

    low, high = interval(torch.arange(1000) < 800)
    assert (low, high) == pytest.approx(binom.ppf([0.025, 0.975], 1000, 0.8) / 1000, abs=0.003)
    assert interval(torch.ones(50)) == [1, 1]


def test_an_interval_of_many_values_is_that_of_the_normal_approximation():
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    mean, error = values.mean().item(), values.std().item() / 2000**0.5
    assert interval(values) == pytest.approx([mean - 1.96 * error, mean + 1.96 * error], abs=0.1 * error + 1e-3)


def test_intervals_contain_the_truth_as_often_as_they_say():
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        low, high = interval(torch.rand(300, generator=generator) < 0.7)
        inside += low <= 0.7 <= high
    assert 180 <= inside <= 199


def test_an_interval_of_a_few_values_is_students():
    from scipy.stats import t

    values = [0.5, 0.7, 0.55, 0.8]
    expected = t.interval(0.95, 3, np.mean(values), np.std(values, ddof=1) / 2)
    assert interval_of_mean(values) == pytest.approx(expected)


def test_half_an_interval_is_shown():
    assert percent(0.5, ci95=[0.46, 0.55]) == "50.00 ± 4.50"
    assert percent(1.0, ci95=[1.0, 1.0]) == "100.00"
    assert percent(0.5) == "50.00"


def test_the_centred_cosine_of_features_by_hand():
    generator = torch.Generator().manual_seed(5)
    z, other = torch.randn(7, 3, generator=generator) + 4, torch.randn(7, 3, generator=generator) - 2
    expected = 0.0
    for row in range(7):
        a, b = (x[row].double() - x.double().sum(0) / 7 for x in (z, other))
        expected += (a @ b / (a.norm() * b.norm())).item() / 7
    assert label_free.centred_cosine(z, other) == pytest.approx(expected)
    assert abs(expected) < 0.9
    assert label_free.centred_cosine(z, 3 * z + torch.tensor([1.0, -5.0, 2.0])) == pytest.approx(1)
    assert label_free.centred_cosine(z, -z) == pytest.approx(-1)
