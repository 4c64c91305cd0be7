"""Spherical k-means."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl import signals

_ROWS = 1 << 14  # that are compared with the centroids at a time


@torch.no_grad()
def spherical_kmeans(z: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm with cosines. z: (N, D) unit rows; centroids: (K, D) to begin with.

    Returns the centroids (K, D), unit rows, and each row's nearest (N,) int64. A centroid that nobody chose stays. Ends
    early when no row changes its centroid: more iterations would change nothing. A signal interrupts it.
    """
    chosen = nearest(z, centroids)
    for _ in range(iterations):
        signals.check()
        sums = torch.zeros_like(centroids).index_add_(0, chosen, z)  # (K, D)
        used = torch.bincount(chosen, minlength=len(centroids))[:, None] > 0
        centroids = torch.where(used, F.normalize(sums, dim=1), centroids)
        before, chosen = chosen, nearest(z, centroids)
        if torch.equal(before, chosen):
            break
    return centroids, chosen


def nearest(z: Tensor, centroids: Tensor) -> Tensor:
    """(N, D), (K, D) -> (N,) int64, by dot product."""
    return torch.cat([(rows @ centroids.T).argmax(1) for rows in z.split(_ROWS)])
