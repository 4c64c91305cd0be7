"""Protocols: from a subject and a labelled dataset to results."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslctl.data.sources import Source
from sslctl.evaluation.features import Features, cached, extract
from sslctl.evaluation.subjects import Subject

Reader = Callable[[Subject, Source], Features]


@dataclass(frozen=True)
class Task:
    """Images to evaluate on. test: None where there are no labels. work: a directory for what a protocol must keep."""

    config: Any
    dataset: Any
    train: Source
    test: Source | None
    work: Path
    run: Path | None = None  # whose weights they are


def nothing() -> None:
    """What long calculations call between blocks when nobody can interrupt them."""


def amount_words(amount: float | None) -> str:
    """An amount of labels as results name it: all, 5/class or 0.1."""
    return "all" if amount is None else f"{amount:g}/class" if amount >= 1 else f"{amount:g}"


def draw_number(seed: int, draw: int) -> int:
    """What a draw of labels is drawn with: other labels for every draw of every seed, below a thousand draws."""
    return 1000 * seed + draw


def key_of(subject: Subject, source: Source) -> tuple[str, ...]:
    """What features are kept under."""
    return (subject.weights_sha256, subject.features, subject.preprocess.summary(), source.version, source.split)


def reader(device: torch.device, workers: int, cache_gb: float, poll: Callable[[], None] = nothing) -> Reader:
    """A function that gives all features of a subject on a source, through the cache."""

    def read(subject: Subject, source: Source) -> Features:
        def compute() -> Tensor:
            if subject.module is not None:
                subject.module.to(device)
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

        return Features(cached(key_of(subject, source), compute, cache_gb), source.labels, len(source.classes))

    return read
