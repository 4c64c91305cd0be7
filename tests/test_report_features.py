"""Features on the page: nearest images, groups of a class, and the map in two dimensions."""

import sys

import numpy as np
import pytest
import torch

from sslctl.report import features


def test_nearest_rows_are_those_of_a_slow_search_without_the_query():
    rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    rows[7] = rows[3]  # a copy must not push the query's own place out
    queries = torch.tensor([3, 7, 12])
    actual = features.nearest_rows(rows, queries, 6)
    unit = rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)
    for query, near in zip(queries.tolist(), actual.tolist(), strict=True):
        expected = [i for i in np.argsort(-(unit @ unit[query]), kind="stable") if i != query][:6]
        np.testing.assert_allclose(unit[near] @ unit[query], unit[expected] @ unit[query], atol=1e-6)
        assert query not in near


def test_same_class_is_sure_of_groups_and_at_chance_of_noise():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    groups = torch.eye(4)[labels] + 0.05 * torch.randn(200, 4, generator=generator)
    assert features.same_class(groups, labels, 8) == 1.0
    assert features.same_class(torch.randn(200, 16, generator=generator), labels, 8) == pytest.approx(0.25, abs=0.05)


def test_the_map_keeps_groups_apart_and_survives_collapse():
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(90) % 3
    places, words = features.in_two_dimensions(torch.eye(8)[labels] + 0.05 * torch.randn(90, 8, generator=generator), 0)
    assert "t-SNE" in words
    centres = np.stack([places[labels == c].mean(0) for c in range(3)])
    nearest = np.linalg.norm(places[:, None] - centres, axis=2).argmin(1)
    assert (nearest == labels).all()
    places, _ = features.in_two_dimensions(torch.ones(30, 8), 0)
    assert np.isfinite(places).all()
    assert features.in_two_dimensions(torch.ones(9, 8), 0) is None


def test_the_map_is_umaps_where_it_is_installed(workdir, monkeypatch):
    (workdir / "umap.py").write_text(
        "class UMAP:\n"
        "    def __init__(self, **settings): assert settings['metric'] == 'cosine'\n"
        "    def fit_transform(self, rows): return rows[:, :2] * 3\n"
    )
    monkeypatch.setattr(sys, "path", [str(workdir), *sys.path])
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    places, words = features.in_two_dimensions(rows, 0)
    assert "UMAP" in words
    np.testing.assert_allclose(places, 3 * torch.nn.functional.normalize(rows, dim=1)[:, :2].numpy(), rtol=1e-6)
