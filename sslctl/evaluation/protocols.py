"""Protocols: from a subject and a labelled dataset to results."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sslctl.data.sources import Source
from sslctl.evaluation.features import Features, cached, extract
from sslctl.evaluation.knn import accuracy, knn_votes
from sslctl.evaluation.linear import Grid, draw_labels, fit_probe
from sslctl.evaluation.results import record
from sslctl.evaluation.subjects import Subject

Reader = Callable[[Subject, Source], Features]


@dataclass(frozen=True)
class Task:
    """Labelled images to evaluate on. work: a directory for what a protocol must keep."""

    config: Any
    dataset: Any
    train: Source
    test: Source
    work: Path


def nothing() -> None:
    """What long calculations call between blocks when nobody can interrupt them."""


def reader(device: torch.device, workers: int, cache_gb: float, poll: Callable[[], None] = nothing) -> Reader:
    """A function that gives all features of a subject on a source, through the cache."""

    def read(subject: Subject, source: Source) -> Features:
        key = (subject.weights_sha256, subject.features, subject.preprocess.words(), source.content_hash, source.split)

        def compute() -> torch.Tensor:
            if subject.backbone is not None:
                subject.backbone.to(device)
            rows = torch.arange(len(source))
            return extract(
                subject.function,
                source,
                rows,
                resize=subject.preprocess.resize,
                workers=workers,
                device=device,
                poll=poll,
            )

        return Features(cached(key, compute, cache_gb), source.labels, len(source.classes))

    return read


def linear_records(
    subject: Subject,
    train: Source,
    test: Source,
    grid: Grid,
    amount: float | None,
    draws: int,
    read: Reader,
    poll: Callable[[], None] = nothing,
) -> list[dict]:
    """The cached linear probe, on all labels or on several draws of few."""
    data, judged = read(subject, train), read(subject, test)
    hits, picks = [], []
    for draw in range(draws):
        rows = torch.arange(len(train)) if amount is None else draw_labels(data.labels, amount, draw)
        part = Features(data.features[rows], data.labels[rows], data.num_classes)
        classifier, picked = fit_probe(part, grid, seed=draw, poll=poll)
        hits.append(accuracy(classifier.scores(judged.features)[0], judged.labels))
        picks.append(picked)
    words = "all" if amount is None else f"{amount:g}/class" if amount >= 1 else f"{amount:g}"
    return [
        record(
            subject,
            test,
            protocol="linear-cached",
            metric=metric,
            values=[h[metric] for h in hits],
            labels=words,
            seed=0,
            epoch_rule=f"last of {grid.epochs}, lr and weight decay picked on held-out training images",
            details={"picked": picks, "grid": len(grid.settings()), "images_with_labels": len(rows)},
        )
        for metric in hits[0]
    ]


def knn_records(
    subject: Subject,
    train: Source,
    test: Source,
    k: int,
    temperature: float,
    read: Reader,
    poll: Callable[[], None] = nothing,
) -> list[dict]:
    """Weighted kNN of the test split against the whole training split."""
    bank, queries = read(subject, train), read(subject, test)
    hits = accuracy(knn_votes(queries.features, bank, k=k, temperature=temperature, poll=poll), queries.labels)
    return [
        record(
            subject,
            test,
            protocol="knn",
            metric=metric,
            values=[value],
            labels="all",
            seed=0,
            epoch_rule="no training",
            details={"k": k, "temperature": temperature, "bank": len(train)},
        )
        for metric, value in hits.items()
    ]
