"""Retrieval: how many of the images nearest to a query are of its class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sslctl.errors import InputError
from sslctl.evaluation.knn import search
from sslctl.evaluation.results import make_result
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Protocol, Task
from sslctl.runs.results import Result


def recall_hits(relevant: Tensor, k: int) -> Tensor:
    """Tells whether one of the first k is of the query's class, (N,) bool. relevant: (N, K) bool, the nearest first."""
    return relevant[:, :k].any(1)


def average_precision(relevant: Tensor, total: Tensor) -> Tensor:
    """Returns AP@K of each query: the mean, over the min(total, K) that could be found, of the precision at each one found.

    relevant: (N, K) bool, the nearest first. total: (N,) how many of the bank are of the query's class. Returns (N,)
    float64; a query of a class that the bank lacks has 0.
    """
    hits = relevant.double()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1, dtype=hits.dtype)
    return (precision * hits).sum(1) / total.clamp(1, hits.shape[1])


@dataclass(frozen=True)
class Retrieval(Protocol):
    """Test images as queries among all training images, ranked by cosine similarity."""

    recall: list[int]
    depth: int

    def __post_init__(self):
        if not self.recall:
            raise InputError("retrieval.recall=[]: expected at least one value")

    def __call__(self, subject: Subject, task: Task) -> list[Result]:
        bank, queries, _, rows = search(subject, task, max(*self.recall, self.depth))
        relevant = bank.labels[rows] == queries.labels[:, None]  # (N, K)
        total = torch.bincount(bank.labels, minlength=bank.num_classes)[queries.labels]  # (N,)
        each = {f"recall@{k}": recall_hits(relevant, k) for k in self.recall}
        each[f"map@{self.depth}"] = average_precision(relevant[:, : self.depth], total)
        return [
            make_result(
                subject,
                task.test,
                protocol="retrieval",
                metric=metric,
                values=[values.double().mean().item()],
                each=values,
                labels="all",
                params={"bank": len(bank.labels), "similarity": "cosine"},
            )
            for metric, values in each.items()
        ]
