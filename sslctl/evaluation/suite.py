"""sslctl evaluate: every protocol on features that are extracted once, and the figures that need no labels."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from sslctl.data.sources import Source
from sslctl.errors import InputError
from sslctl.evaluation.clustering import cluster_records
from sslctl.evaluation.features import Features
from sslctl.evaluation.label_free import label_free_records, sampled
from sslctl.evaluation.linear import ProbeGrid, draw_labels, linear_records
from sslctl.evaluation.retrieval import neighbour_records
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Reader, Task, draw_number
from sslctl.factory.from_config import build_source
from sslctl.runs.results import Result

LeftOut = Callable[[str], None]


def sources_of(node: Any) -> tuple[Source, Source | None]:
    """(train, test) of a dataset; test is None where there are no labels."""
    train = build_source(node, "train")
    return train, build_source(node, "test") if train.labelled else None


def subject_records(
    subject: Subject, task: Task, seen: Source, amounts: list[float], read: Reader, leave_out: LeftOut
) -> list[Result]:
    """All results of one subject, its features held meanwhile. seen: the training images that label-free figures are of."""
    config, train, test = task.config, task.train, task.test
    held = {source.split: read(subject, source) for source in (train, test) if source is not None}
    sizes = " and ".join(f"{len(part.labels):,} × {part.features.shape[1]}" for part in held.values())
    print(f"  {subject.name}: features {sizes}", flush=True)
    records = []
    if test is None:
        leave_out(
            f"linear probes, kNN, clustering, retrieval: {train.name} has no labels; name labelled images with eval_dataset=…"
        )
    else:
        grid = ProbeGrid(**OmegaConf.to_container(config.probe, resolve=True))
        bank, queries = held[train.split], held[test.split]

        def kept(_: Subject, source: Source) -> Features:
            return held[source.split]

        records += linear_records(subject, train, test, grid, None, 1, kept, seed=config.seed)
        for amount in amounts:
            missing = lacking(bank, amount, draw_number(config.seed, 0))
            if missing:
                leave_out(missing)
            else:
                records += linear_records(subject, train, test, grid, amount, config.draws, kept, seed=config.seed)
        records += neighbour_records(subject, test, bank, queries, config)
        records += cluster_records(subject, test, bank, queries, config)
    return records + label_free_records(
        subject, replace(task, train=seen), sampled(subject, task, seen, held, read), leave_out
    )


def lacking(bank: Features, amount: float, number: int) -> str | None:
    """Why so few labels cannot be drawn, where they cannot."""
    try:
        draw_labels(bank.labels, amount, number)
    except InputError as error:
        return f"few_labels={amount:g}: {str(error).removeprefix(f'labels={amount:g}: ')}"
    return None
