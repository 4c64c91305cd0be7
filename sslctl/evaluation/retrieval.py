"""Retrieval: whether the images found nearest are of the query's class."""

from typing import Any

import torch
from torch import Tensor

from sslctl.data.sources import Source
from sslctl.evaluation.features import Features
from sslctl.evaluation.knn import neighbours, vote_records
from sslctl.evaluation.results import make_result
from sslctl.evaluation.subjects import Subject
from sslctl.runs.results import Result


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


def neighbour_records(subject: Subject, test: Source, bank: Features, queries: Features, config: Any) -> list[Result]:
    """kNN with every k, and retrieval, from one search."""
    recall, depth = list(config.retrieval.recall), config.retrieval.depth
    found = neighbours(queries.features, bank.features, max(*config.knn.k, *recall, depth))
    records = []
    for k in config.knn.k:
        records += vote_records(subject, test, found, bank, queries.labels, k, config.knn.temperature)
    relevant = bank.labels[found[1]] == queries.labels[:, None]  # (N, K)
    total = torch.bincount(bank.labels, minlength=bank.num_classes)[queries.labels]  # (N,)
    each = {f"recall@{k}": recall_hits(relevant, k) for k in recall}
    each[f"map@{depth}"] = average_precision(relevant[:, :depth], total)
    return records + [
        make_result(
            subject,
            test,
            protocol="retrieval",
            metric=metric,
            values=[values.double().mean().item()],
            each=values,
            labels="all",
            seed=None,
            epoch_rule="no training",
            params={"bank": len(bank.labels), "similarity": "cosine"},
        )
        for metric, values in each.items()
    ]
