"""Weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv:1805.01978, section 3.4)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl import signals
from sslctl.data.sources import Source
from sslctl.errors import InputError
from sslctl.evaluation.features import Features
from sslctl.evaluation.keeping import keep, names_of
from sslctl.evaluation.multi_label import ranking_results
from sslctl.evaluation.results import make_result
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Protocol, Task
from sslctl.runs.results import Result

_UNEVEN = 2  # times as many images of one class as of another
CHUNK_BYTES = 256 * 2**20  # of one block of similarities


@torch.no_grad()
def neighbours(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Finds the k rows of the bank nearest to each query by cosine similarity, the nearest first.

    queries: (N, D); bank: (M, D). Returns similarities (N, k) and rows (N, k) int64; all M where they are fewer than k.
    A signal interrupts it between blocks.
    """
    bank = F.normalize(bank, dim=1)
    k = min(k, len(bank))
    chunk = max(1, CHUNK_BYTES // (4 * len(bank)))
    similarity, rows = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.long)
    for start in range(0, len(queries), chunk):
        signals.check()
        part = slice(start, start + chunk)
        nearest = (F.normalize(queries[part], dim=1) @ bank.T).topk(k, dim=1)
        similarity[part], rows[part] = nearest.values, nearest.indices
    return similarity, rows


def votes_of(similarity: Tensor, labels: Tensor, num_classes: int, *, temperature: float) -> Tensor:
    """Returns (N, num_classes): neighbours' votes, each weighing exp(similarity / temperature) relative to the nearest.

    similarity, labels: (N, k), the nearest first.
    """
    weight = _weights(similarity, temperature)
    return torch.zeros(len(labels), num_classes).scatter_add_(1, labels, weight)


def _weights(similarity: Tensor, temperature: float) -> Tensor:
    return ((similarity - similarity[:, :1]) / temperature).exp()  # at most 1: no overflow


def shares_of(similarity: Tensor, targets: Tensor, rows: Tensor, *, temperature: float) -> Tensor:
    """Returns (N, C): the share of the votes of each image's neighbours that has each label.

    similarity, rows: (N, k), the nearest first. targets: (M, C) bool, of the bank.
    """
    weight = _weights(similarity, temperature)
    weight = weight / weight.sum(1, keepdim=True)
    chunk = max(1, CHUNK_BYTES // (4 * rows.shape[1] * targets.shape[1]))
    parts = zip(weight.split(chunk), rows.split(chunk), strict=True)
    return torch.cat([(own[:, None] @ targets[near].float())[:, 0] for own, near in parts])


def knn_votes(
    queries: Tensor,
    bank: Features,
    *,
    k: int,
    temperature: float,
) -> Tensor:
    """Returns the votes (N, num_classes) of the k nearest to each query (N, D)."""
    similarity, rows = neighbours(queries, bank.features, k)
    return votes_of(similarity, bank.labels[rows], bank.num_classes, temperature=temperature)


def hits_of(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Tells which images are right by top1 and, where there are more than five classes, by top5: (N,) bool each.

    scores: (N, C); labels: (N,).
    """
    result = {"top1": scores.argmax(1) == labels}
    if scores.shape[1] > 5:
        result["top5"] = (scores.topk(5, dim=1).indices == labels[:, None]).any(1)
    return result


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Returns the shares of `hits_of`."""
    return {metric: share(hits) for metric, hits in hits_of(scores, labels).items()}


def share(hits: Tensor) -> float:
    """Returns how many of (N,) are right, between 0 and 1: bool, or weights whose mean is 1 where they are."""
    return hits.float().mean().item()


def classifier_results(
    subject: Subject, source: Source, hits: list[dict[str, Tensor]], *, details: dict | None = None, **settings: Any
) -> list[Result]:
    """Returns one result a metric; where classes are uneven, the balanced accuracy besides.

    hits: of each draw of labels, as `hits_of` returns them. settings: of `make_result`. details say then what a constant
    answer scores and how many of each class are right.
    """
    counts, details = source.labels.bincount(minlength=len(source.classes)), details or {}
    if counts.max() > _UNEVEN * counts[counts > 0].min():
        # Every class weighs the same: the mean of these is the mean over classes of the share that is right.
        weight = len(source) / ((counts > 0).sum() * counts[source.labels])  # (N,)
        hits = [of_draw | {"balanced_accuracy": of_draw["top1"] * weight} for of_draw in hits]
        right = sum(source.labels[of_draw["top1"]].bincount(minlength=len(counts)) for of_draw in hits) / len(hits)
        shares = (right / counts.clamp(min=1)).tolist()
        details = details | {
            "majority": (counts.max() / len(source)).item(),
            "of_each_class": dict(zip(source.classes, shares, strict=True)),
        }
    return [
        make_result(
            subject,
            source,
            metric=metric,
            values=[share(of_draw[metric]) for of_draw in hits],
            each=hits[0][metric],
            details=details,
            **settings,
        )
        for metric in hits[0]
    ]


def score_results(subject: Subject, source: Source, scores: list[Tensor], **settings: Any) -> list[Result]:
    """Returns the results of each draw's scores (N, C): accuracies, or mAP where an image may have several labels. settings: of
    `make_result`."""
    if source.has_several:
        return ranking_results(subject, source, scores, **settings)
    return classifier_results(subject, source, [hits_of(of_draw, source.labels) for of_draw in scores], **settings)


# --- The protocol ---

_LEAST_DEPTH = 200  # neighbours that are searched at the least, so that kNN and retrieval share one search


def search(subject: Subject, task: Task, depth: int) -> tuple[Features, Features, Tensor, Tensor]:
    """Searches the training images nearest to each test image, `depth` of them or more, once for all protocols.

    Returns the features of the training images, those of the test images, similarities and rows, (N, ≥ depth) each.
    """
    bank, queries = task.read(subject, task.train), task.read(subject, task.test)
    depth = max(depth, _LEAST_DEPTH)
    nearest = task.read.once(subject, ("neighbours", depth), lambda: neighbours(queries.features, bank.features, depth))
    return bank, queries, *nearest


@dataclass(frozen=True)
class Knn(Protocol):
    """Weighted kNN of the test split against the whole training split, with every k."""

    takes_several = True
    k: list[int]
    temperature: float

    def __post_init__(self):
        if not self.k:
            raise InputError("knn.k=[]: expected at least one value")

    def __call__(self, subject: Subject, task: Task) -> list[Result]:
        bank, _, similarity, rows = search(subject, task, max(self.k))
        measured = []
        for k in dict.fromkeys(min(k, len(bank.labels)) for k in self.k):  # there are no more neighbours than images
            scores, settings = self.scores(bank, similarity[:, :k], rows[:, :k])
            measured.append(score_results(subject, task.test, [scores], **settings))
        # Of several k the largest is kept, whose neighbours are all the others'; the best would be one chosen by the test split.
        largest = max(measured, key=lambda results: results[0].params["k"])
        settings = {"k": largest[0].params["k"], "temperature": self.temperature, "depth": similarity.shape[1]}
        kept = keep("knn", subject, task, largest, lambda: _bank_tensors(bank, task.train), settings)
        return [result for results in measured for result in (kept if results is largest else results)]

    def scores(self, bank: Features, similarity: Tensor, rows: Tensor) -> tuple[Tensor, dict]:
        """Returns the scores (N, C) of images by their k neighbours, (N, k) each, the nearest first, and the settings that their
        results say."""
        params = {"k": rows.shape[1], "temperature": self.temperature, "bank": len(bank.labels)}
        settings = {"protocol": "knn", "labels": "all", "params": params}
        if bank.targets is not None:
            return shares_of(similarity, bank.targets, rows, temperature=self.temperature), settings
        votes = votes_of(similarity, bank.labels[rows], bank.num_classes, temperature=self.temperature)
        return votes, settings


def _bank_tensors(bank: Features, source: Source) -> dict[str, Tensor]:
    """Returns labelled images as `keep` writes them: features (M, D), labels (M,), names, and targets (M, C) where there are."""
    tensors = {"features": bank.features, "labels": bank.labels, "names": names_of(source)}
    return tensors | ({} if bank.targets is None else {"targets": bank.targets})
