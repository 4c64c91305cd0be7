"""Evaluation as a part of pretraining: kNN while it runs, the table at its end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from sslctl.build import Preprocess
from sslctl.data.sampler import permuted
from sslctl.data.sources import Source
from sslctl.evaluation import subjects as who
from sslctl.evaluation.features import Features, extract
from sslctl.evaluation.knn import accuracy, knn_votes
from sslctl.evaluation.linear import Grid
from sslctl.evaluation.protocols import knn_records, linear_records, reader
from sslctl.methods.base import Method
from sslctl.plan import Plan

MOST_QUERIES, MOST_BANK = 5_000, 20_000


def online_rows(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(queries, bank): a fixed tenth of the training images, at most 5,000, and at most 20,000 others; of no seed."""
    order = torch.from_numpy(permuted(np.arange(size), size, seed=0, epoch=-3))
    queries = min(MOST_QUERIES, max(1, size // 10))
    return order[:queries], order[queries : queries + MOST_BANK]


def online_knn(
    settings: Any, source: Source, preprocess: Preprocess, plan: Plan, workers: int
) -> Callable[[Method, Callable[[], None]], float]:
    """A function of (method, poll): top-1 of kNN among the training images. They are pretrained on."""
    queries, bank = online_rows(len(source))

    def measure(method: Method, poll: Callable[[], None]) -> float:
        def features(images):
            return next(iter(method.features(images).values()))

        both = extract(
            features,
            source,
            torch.cat([queries, bank]),
            resize=preprocess.resize,
            workers=workers,
            device=plan.device,
            poll=poll,
        )
        held = Features(both[len(queries) :], source.labels[bank], len(source.classes))
        votes = knn_votes(both[: len(queries)], held, k=settings.k, temperature=settings.temperature, poll=poll)
        return accuracy(votes, source.labels[queries])["top1"]

    return measure


def closing_records(
    config: Any,
    run_dir: Path,
    method: Method,
    preprocess: Preprocess,
    plan: Plan,
    train: Source,
    test: Source,
    poll: Callable[[], None],
) -> list[dict]:
    """kNN and linear results of the trained and of the random weights on the test split."""
    grid = Grid(**OmegaConf.to_container(config.probe, resolve=True))
    trained = who.method_subject("trained", method, preprocess, None, plan.total_steps)
    untrained = who.random(run_dir, None)
    read = reader(plan.device, config.trainer.workers, config.evaluation.cache_gb, poll)
    records = []
    for subject in (trained, untrained):
        records += knn_records(subject, train, test, **config.evaluation.knn, read=read, poll=poll)
        records += linear_records(subject, train, test, grid, None, 1, read, poll)
    for entry in records:
        entry["details"]["closing"] = True
    return records
