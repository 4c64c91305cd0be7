"""Retrieval: how many of the images nearest to a query are of its class, or share a label with it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sslctl import signals
from sslctl.errors import InputError
from sslctl.evaluation.knn import CHUNK_BYTES, search
from sslctl.evaluation.results import make_result
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Protocol, Task
from sslctl.runs.results import Result


def recall_hits(relevant: Tensor, k: int) -> Tensor:
    """Tells whether one of the first k is relevant, (N,) bool. relevant: (N, K) bool, the nearest first."""
    return relevant[:, :k].any(1)


def average_precision(relevant: Tensor, total: Tensor) -> Tensor:
    """Returns AP@K of each query: the mean, over the min(total, K) that could be found, of the precision at each one found.

    relevant: (N, K) bool, the nearest first. total: (N,) how many of the bank are relevant. Returns (N,) float64; a query for
    which the bank has nothing has 0.
    """
    hits = relevant.double()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1, dtype=hits.dtype)
    return (precision * hits).sum(1) / total.clamp(1, hits.shape[1])


def sharing_a_label(queries: Tensor, bank: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which of the images at rows (N, K) have a label in common with their query, (N, K) bool, and how many of all (N,).

    queries: (N, C) bool; bank: (M, C) bool.
    """
    ours, relevant, total = bank.float(), [], []
    size = max(1, CHUNK_BYTES // (4 * len(bank)))
    for own, near in zip(queries.split(size), rows.split(size), strict=True):
        signals.check()
        shared = own.float() @ ours.T > 0  # (n, M)
        relevant.append(shared.gather(1, near))
        total.append(shared.sum(1))
    return torch.cat(relevant), torch.cat(total)


@dataclass(frozen=True)
class Retrieval(Protocol):
    """Test images as queries among all training images, ranked by cosine similarity.

    Relevant are images of the query's class. Of several labels an image, those that share one with it, whichever it is, as is
    usual in hashing and cross-modal retrieval (on NUS-WIDE, COCO): images without any label ask for nothing and are no queries.
    """

    takes_several = True
    recall: list[int]
    depth: int

    def __post_init__(self):
        if not self.recall:
            raise InputError("retrieval.recall=[]: expected at least one value")

    def __call__(self, subject: Subject, task: Task) -> list[Result]:
        bank, queries, _, rows = search(subject, task, max(*self.recall, self.depth))
        params = {"bank": len(bank.labels), "similarity": "cosine"}
        if bank.targets is None:
            relevant = bank.labels[rows] == queries.labels[:, None]  # (N, K)
            total = torch.bincount(bank.labels, minlength=bank.num_classes)[queries.labels]  # (N,)
        else:
            asking = queries.targets.any(1)
            if not asking.any():
                task.omitted.append(f"retrieval: no test image of {task.test.name} has a label")
                return []
            relevant, total = sharing_a_label(queries.targets[asking], bank.targets, rows[asking])
            params |= {"relevant": "a label in common", "queries": len(relevant)}
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
                params=params,
            )
            for metric, values in each.items()
        ]
