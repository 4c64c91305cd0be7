"""Clustering of features: spherical k-means with as many clusters as classes, and how well the two agree."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from sslctl.data.sampler import permuted
from sslctl.data.sources import Source
from sslctl.evaluation.features import Features
from sslctl.evaluation.knn import share
from sslctl.evaluation.results import RESAMPLES, make_result
from sslctl.evaluation.subjects import Subject
from sslctl.ops.kmeans import nearest, spherical_kmeans
from sslctl.runs.results import Result


@torch.no_grad()
def cluster(z: Tensor, count: int, *, restarts: int, iterations: int, images: int, seed: int) -> tuple[Tensor, float]:
    """The best of several k-means++ starts on a sample of at most `images` rows, then refined on all of them.

    z: (N, D). Returns `count` centroids (count, D) of unit length, and the mean cosine of the rows with their own.
    """
    z = F.normalize(z, dim=1)
    few = z[torch.from_numpy(permuted(np.arange(min(images, len(z))), len(z), seed, epoch=-4))]
    generator = torch.Generator().manual_seed(seed)
    tried = []
    for _ in range(restarts):
        centroids, chosen = spherical_kmeans(few, _spread_out(few, count, generator), iterations)
        tried.append(((few * centroids[chosen]).sum(1).mean().item(), centroids))
    begin = max(tried, key=lambda pair: pair[0])[1]
    centroids, chosen = (begin, nearest(z, begin)) if len(few) == len(z) else spherical_kmeans(z, begin, iterations)
    return centroids, (z * centroids[chosen]).sum(1).mean().item()


def _spread_out(z: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centroid is a row drawn by its squared distance to the nearest one so far. (count, D)."""
    picked = [int(torch.randint(len(z), (1,), generator=generator))]
    distance = torch.full((len(z),), torch.inf)
    for _ in range(count - 1):
        distance = torch.minimum(distance, 1 - z @ z[picked[-1]])
        weight = distance.clamp(min=1e-12)  # where all rows are alike, any will do
        picked.append(int(torch.multinomial(weight, 1, generator=generator)))
    return z[picked].clone()


def matched_hits(clusters: Tensor, labels: Tensor, count: int) -> Tensor:
    """(N,) bool: whether an image's cluster stands for its class, under the best one-to-one match (Kuhn 1955)."""
    from scipy.optimize import linear_sum_assignment

    table = torch.bincount(clusters * count + labels, minlength=count * count).view(count, count)
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    stands_for = torch.empty(count, dtype=torch.long)
    stands_for[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return stands_for[clusters] == labels


def agreement(clusters: Tensor, labels: Tensor, seed: int = 0) -> dict[str, tuple[float, list[float]]]:
    """Normalised mutual information (arithmetic mean) and adjusted Rand index, each with a 95 % interval.

    clusters, labels: (N,) int64. The interval is of resampled images, shifted by what resampling adds to the value.
    """
    row, column = clusters.unique(return_inverse=True)[1], labels.unique(return_inverse=True)[1]
    cells, counts = torch.stack([row, column]).unique(dim=1, return_counts=True)
    shares = counts.double() / counts.sum()
    drawn = np.random.default_rng(seed).multinomial(len(labels), shares.numpy(), RESAMPLES)
    found = table_scores(counts[None].double(), *cells)
    resampled = table_scores(torch.from_numpy(drawn).double(), *cells)
    result = {}
    for name, value, values in zip(("nmi", "ari"), found, resampled, strict=True):
        spread = values - values.mean() + value
        result[name] = value.item(), spread.quantile(spread.new_tensor([0.025, 0.975])).tolist()
    return result


def table_scores(counts: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """(NMI, ARI), (R,) each, of R contingency tables given by the counts (R, M) of M cells at (row, column), (M,) each."""
    size = counts.sum(1)
    marginals = [
        counts.new_zeros(len(counts), int(where.max()) + 1).index_add_(1, where, counts) for where in (row, column)
    ]
    entropies = [torch.special.entr(m / size[:, None]).sum(1) for m in (*marginals, counts)]
    mean = (entropies[0] + entropies[1]) / 2
    mutual = entropies[0] + entropies[1] - entropies[2]
    nmi = torch.where(mean > 1e-12, mutual / mean.clamp(min=1e-12), 1.0)
    pairs = [(m * (m - 1) / 2).sum(1) for m in (*marginals, counts)]
    expected, most = pairs[0] * pairs[1] / (size * (size - 1) / 2), (pairs[0] + pairs[1]) / 2
    ari = torch.where(most - expected > 0, (pairs[2] - expected) / (most - expected).clamp(min=1e-12), 1.0)
    return nmi, ari


def cluster_records(subject: Subject, test: Source, bank: Features, queries: Features, config: Any) -> list[Result]:
    """Clusters of the training split, as many as classes; the test images that fall into them against their classes."""
    settings = OmegaConf.to_container(config.clustering, resolve=True)
    centroids, cosine = cluster(bank.features, bank.num_classes, **settings, seed=config.seed)
    chosen = nearest(F.normalize(queries.features, dim=1), centroids)
    hits = matched_hits(chosen, queries.labels, bank.num_classes)
    found = {"accuracy": (share(hits), None), **agreement(chosen, queries.labels)}
    return [
        make_result(
            subject,
            test,
            protocol="cluster",
            metric=metric,
            values=[value],
            each=hits if metric == "accuracy" else None,
            ci95=ci95,
            labels="none",
            seed=config.seed,
            epoch_rule="no training",
            params=settings | {"clusters": bank.num_classes, "fitted_on": len(bank.labels)},
            details={"cosine": cosine},
        )
        for metric, (value, ci95) in found.items()
    ]
