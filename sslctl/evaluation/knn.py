"""Weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv:1805.01978, section 3.4)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.evaluation.features import Features

_CHUNK_BYTES = 256 * 2**20  # of one block of similarities


@torch.no_grad()
def knn_votes(
    queries: Tensor,
    bank: Features,
    *,
    k: int,
    temperature: float,
    poll: Callable[[], None] = lambda: None,
) -> Tensor:
    """Votes of the k nearest by cosine similarity, each weighing exp(similarity / temperature) relative to the nearest.

    queries: (N, D). Returns (N, num_classes). poll: called between blocks; may raise to abandon the work.
    """
    bank_rows = F.normalize(bank.features, dim=1)
    k = min(k, len(bank_rows))
    chunk = max(1, _CHUNK_BYTES // (4 * len(bank_rows)))
    votes = torch.zeros(len(queries), bank.num_classes)
    for start in range(0, len(queries), chunk):
        poll()
        block = F.normalize(queries[start : start + chunk], dim=1)
        similarity, nearest = (block @ bank_rows.T).topk(k, dim=1, sorted=False)  # (n, k)
        weight = ((similarity - similarity.amax(1, keepdim=True)) / temperature).exp()  # at most 1: no overflow
        votes[start : start + chunk].scatter_add_(1, bank.labels[nearest], weight)
    return votes


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """scores: (N, C); labels: (N,). Returns top1 and, where there are more than five classes, top5, as fractions."""
    result = {"top1": (scores.argmax(1) == labels).float().mean().item()}
    if scores.shape[1] > 5:
        result["top5"] = (scores.topk(5, dim=1).indices == labels[:, None]).any(1).float().mean().item()
    return result
