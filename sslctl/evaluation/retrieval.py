"""Retrieval: whether the images found nearest are of the query's class."""

import torch
from torch import Tensor


def recall_hits(relevant: Tensor, k: int) -> Tensor:
    """relevant: (N, K) bool, the nearest first. Returns (N,) bool: whether one of the first k is of the query's class."""
    return relevant[:, :k].any(1)


def average_precision(relevant: Tensor, total: Tensor) -> Tensor:
    """AP@K of each query: the mean, over the min(total, K) that could be found, of the precision at each one found.

    relevant: (N, K) bool, the nearest first. total: (N,) how many of the bank are of the query's class. Returns (N,)
    float64; a query of a class that the bank lacks has 0.
    """
    hits = relevant.double()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1, dtype=hits.dtype)
    return (precision * hits).sum(1) / total.clamp(1, hits.shape[1])
