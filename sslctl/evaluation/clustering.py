"""Clustering of features: spherical k-means with as many clusters as classes, and how well the two agree."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.data.sampler import permuted
from sslctl.evaluation.knn import share
from sslctl.evaluation.results import RESAMPLES, make_result
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Protocol, Task
from sslctl.ops.kmeans import nearest, spherical_kmeans
from sslctl.runs.results import Result


@torch.no_grad()
def cluster(z: Tensor, count: int, *, restarts: int, iterations: int, images: int, seed: int) -> tuple[Tensor, float]:
    """Finds the best of several k-means++ starts on a sample of at most `images` rows, then refined on all of them.

    z: (N, D). Returns `count` centroids (count, D) of unit length, and the mean cosine of the rows with their own.
    """
    z = F.normalize(z, dim=1)
    few = z[torch.from_numpy(permuted(np.arange(min(images, len(z))), len(z), seed, epoch=-4))]
    generator = torch.Generator().manual_seed(seed)
    starts = []
    for _ in range(restarts):
        centroids, chosen = spherical_kmeans(few, _spread_out(few, count, generator), iterations)
        starts.append(((few * centroids[chosen]).sum(1).mean().item(), centroids))
    begin = max(starts, key=lambda pair: pair[0])[1]
    centroids, chosen = (begin, nearest(z, begin)) if len(few) == len(z) else spherical_kmeans(z, begin, iterations)
    return centroids, (z * centroids[chosen]).sum(1).mean().item()


def _spread_out(z: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws centroids (count, D) by k-means++: each is a row, drawn by its squared distance to the nearest one so far."""
    rows = [int(torch.randint(len(z), (1,), generator=generator))]
    distance = torch.full((len(z),), torch.inf)
    for _ in range(count - 1):
        distance = torch.minimum(distance, 1 - z @ z[rows[-1]])
        weight = distance.clamp(min=1e-12)  # where all rows are alike, any will do
        rows.append(int(torch.multinomial(weight, 1, generator=generator)))
    return z[rows].clone()


def matched_hits(clusters: Tensor, labels: Tensor, count: int) -> Tensor:
    """Tells whether an image's cluster stands for its class, under the best one-to-one match (Kuhn 1955); (N,) bool."""
    from scipy.optimize import linear_sum_assignment

    table = torch.bincount(clusters * count + labels, minlength=count * count).view(count, count)
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    stands_for = torch.empty(count, dtype=torch.long)
    stands_for[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return stands_for[clusters] == labels


def agreement(clusters: Tensor, labels: Tensor, seed: int = 0) -> dict[str, tuple[float, list[float]]]:
    """Returns normalised mutual information (arithmetic mean) and adjusted Rand index, each with a 95 % interval.

    clusters, labels: (N,) int64. The interval is of resampled images, shifted by what resampling adds to the value.
    """
    row, column = clusters.unique(return_inverse=True)[1], labels.unique(return_inverse=True)[1]
    cells, counts = torch.stack([row, column]).unique(dim=1, return_counts=True)
    shares = counts.double() / counts.sum()
    counts_drawn = np.random.default_rng(seed).multinomial(len(labels), shares.numpy(), RESAMPLES)
    scores = table_scores(counts[None].double(), *cells)
    resampled = table_scores(torch.from_numpy(counts_drawn).double(), *cells)
    result = {}
    for name, value, values in zip(("nmi", "ari"), scores, resampled, strict=True):
        spread = values - values.mean() + value
        result[name] = value.item(), spread.quantile(spread.new_tensor([0.025, 0.975])).tolist()
    return result


def table_scores(counts: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (NMI, ARI), (R,) each, of R contingency tables: counts (R, M) of M cells at (row, column), (M,) each."""
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


# --- The protocol ---


@dataclass(frozen=True)
class Clustering(Protocol):
    """Clusters of the training split, as many as classes; the test images that fall into them against their classes."""

    restarts: int
    iterations: int
    images: int

    def __call__(self, subject: Subject, task: Task) -> list[Result]:
        train, test = task.read(subject, task.train), task.read(subject, task.test)
        classes = train.num_classes
        # Centroids see training images alone, and no labels.
        centroids, cosine = cluster(train.features, classes, **vars(self), seed=task.seed)
        clusters = nearest(F.normalize(test.features, dim=1), centroids)
        # Labels come in here: by the best match of clusters and classes, and by agreement that needs none.
        hits = matched_hits(clusters, test.labels, classes)
        scores = {"accuracy": (share(hits), None), **agreement(clusters, test.labels)}
        return [
            make_result(
                subject,
                task.test,
                protocol="cluster",
                metric=metric,
                values=[value],
                each=hits if metric == "accuracy" else None,
                ci95=ci95,
                labels="none",
                seed=task.seed,
                params={**vars(self), "clusters": classes, "fitted_on": len(train.labels)},
                details={"cosine": cosine},
            )
            for metric, (value, ci95) in scores.items()
        ]
