"""Protocols: from a subject and a labelled dataset to results."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslctl.data.sources import Source
from sslctl.evaluation.features import Features, cached, extract
from sslctl.evaluation.knn import hits_of, neighbours, share, votes_of
from sslctl.evaluation.linear import Grid, draw_labels, fit_probe
from sslctl.evaluation.results import record
from sslctl.evaluation.subjects import Subject

Reader = Callable[[Subject, Source], Features]
FIXED = "lr {lr:g} and weight decay {weight_decay:g} fixed beforehand, too few labels to choose by"


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


def plain(grid: Grid) -> dict:
    """A probe's settings as results name them, in numbers that JSON gives back as they are."""
    return vars(grid) | {"lr": [float(lr) for lr in grid.lr], "weight_decay": [float(d) for d in grid.weight_decay]}


def key_of(subject: Subject, source: Source) -> tuple[str, ...]:
    """What features are kept under."""
    return (subject.weights_sha256, subject.features, subject.preprocess.words(), source.as_of, source.split)


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


def linear_records(
    subject: Subject,
    train: Source,
    test: Source,
    grid: Grid,
    amount: float | None,
    draws: int,
    read: Reader,
    poll: Callable[[], None] = nothing,
    *,
    seed: int = 0,
) -> list[dict]:
    """The cached linear probe, on all labels or on several draws of few. seed: of those draws, of the held-out parts and
    of the batches' order; the classifier begins with zeros. Labels too few to choose lr and weight decay by: `FIXED`."""
    data, judged = read(subject, train), read(subject, test)
    hits, picks, choices = [], [], len(grid.settings())
    for draw in range(draws):
        number = draw_number(seed, draw)
        rows = torch.arange(len(train)) if amount is None else draw_labels(data.labels, amount, number)
        part = Features(data.features[rows], data.labels[rows], data.num_classes)
        classifier, picked = fit_probe(part, grid, seed=number, poll=poll)
        hits.append(hits_of(classifier.scores(judged.features)[0], judged.labels))
        picks.append(picked)
    params, chosen = plain(grid) | {"draws": draws, "training_images": len(train)}, ""
    if choices > 1 and picks[0]["validation_top1"] is None:  # draws are stratified: all of them, or none
        params["regularisation"] = fixed = FIXED.format(**picks[0])
        chosen = f", {fixed}"
    elif choices > 1:
        chosen = ", lr and weight decay picked on held-out training images"
    return [
        record(
            subject,
            test,
            protocol="linear-cached",
            metric=metric,
            values=[share(h[metric]) for h in hits],
            each=hits[0][metric],
            labels=amount_words(amount),
            seed=seed,
            epoch_rule=f"last of {picks[0]['steps']} steps{chosen}",
            params=params,
            details={"picked": picks, "grid": choices, "images_with_labels": len(rows)},
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
) -> list[dict]:
    """The votes of the first k of the neighbours (similarities, rows) found, (N, at least k) each."""
    similarity, rows = (part[:, :k] for part in found)
    votes = votes_of(similarity, bank.labels[rows], bank.num_classes, temperature=temperature)
    return [
        record(
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
