"""Weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv:1805.01978, section 3.4)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.data.sources import Source
from sslctl.evaluation.features import Features
from sslctl.evaluation.results import make_result
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Reader, nothing
from sslctl.runs.results import Result

_CHUNK_BYTES = 256 * 2**20  # of one block of similarities


@torch.no_grad()
def neighbours(queries: Tensor, bank: Tensor, k: int, poll: Callable[[], None] = lambda: None) -> tuple[Tensor, Tensor]:
    """The k rows of the bank nearest to each query by cosine similarity, the nearest first.

    queries: (N, D); bank: (M, D). Returns similarities (N, k) and rows (N, k) int64; all M where they are fewer than k.
    poll: called between blocks; may raise to abandon the work.
    """
    bank = F.normalize(bank, dim=1)
    k = min(k, len(bank))
    chunk = max(1, _CHUNK_BYTES // (4 * len(bank)))
    similarity, rows = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.long)
    for start in range(0, len(queries), chunk):
        poll()
        part = slice(start, start + chunk)
        found = (F.normalize(queries[part], dim=1) @ bank.T).topk(k, dim=1)
        similarity[part], rows[part] = found.values, found.indices
    return similarity, rows


def votes_of(similarity: Tensor, labels: Tensor, num_classes: int, *, temperature: float) -> Tensor:
    """(N, num_classes): neighbours' votes, each weighing exp(similarity / temperature) relative to the nearest.

    similarity, labels: (N, k), the nearest first.
    """
    weight = ((similarity - similarity[:, :1]) / temperature).exp()  # at most 1: no overflow
    return torch.zeros(len(labels), num_classes).scatter_add_(1, labels, weight)


def knn_votes(
    queries: Tensor,
    bank: Features,
    *,
    k: int,
    temperature: float,
    poll: Callable[[], None] = lambda: None,
) -> Tensor:
    """Votes (N, num_classes) of the k nearest to each query (N, D)."""
    similarity, rows = neighbours(queries, bank.features, k, poll)
    return votes_of(similarity, bank.labels[rows], bank.num_classes, temperature=temperature)


def hits_of(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """scores: (N, C); labels: (N,). Which are right, (N,) bool: top1 and, where there are more than five classes, top5."""
    result = {"top1": scores.argmax(1) == labels}
    if scores.shape[1] > 5:
        result["top5"] = (scores.topk(5, dim=1).indices == labels[:, None]).any(1)
    return result


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """The shares of `hits_of`."""
    return {metric: share(hits) for metric, hits in hits_of(scores, labels).items()}


def share(hits: Tensor) -> float:
    """Of (N,) bool, how many are true."""
    return hits.float().mean().item()


def knn_records(
    subject: Subject,
    train: Source,
    test: Source,
    k: int,
    temperature: float,
    read: Reader,
    poll: Callable[[], None] = nothing,
) -> list[Result]:
    """Weighted kNN of the test split against the whole training split."""
    bank, queries = read(subject, train), read(subject, test)
    found = neighbours(queries.features, bank.features, k, poll)
    return vote_records(subject, test, found, bank, queries.labels, k, temperature)


def vote_records(
    subject: Subject,
    test: Source,
    found: tuple[Tensor, Tensor],
    bank: Features,
    labels: Tensor,
    k: int,
    temperature: float,
) -> list[Result]:
    """The votes of the first k of the neighbours (similarities, rows) found, (N, at least k) each."""
    similarity, rows = (part[:, :k] for part in found)
    votes = votes_of(similarity, bank.labels[rows], bank.num_classes, temperature=temperature)
    return [
        make_result(
            subject,
            test,
            protocol="knn",
            metric=metric,
            values=[share(hits)],
            each=hits,
            labels="all",
            seed=None,
            epoch_rule="no training",
            params={"k": k, "temperature": temperature, "bank": len(bank.labels)},
        )
        for metric, hits in hits_of(votes, labels).items()
    ]
