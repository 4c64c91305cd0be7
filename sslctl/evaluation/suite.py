"""sslctl evaluate: every protocol on features that are extracted once, and the figures that need no labels."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from sslctl.build import build_source
from sslctl.clustering import nearest
from sslctl.config import InputError
from sslctl.data.sources import Source
from sslctl.evaluation.clustering import agreement, cluster, matched_hits
from sslctl.evaluation.features import Features
from sslctl.evaluation.figures import label_free_records, pretrained_on, sampled, show_figures, show_protocols
from sslctl.evaluation.knn import neighbours, share
from sslctl.evaluation.linear import Grid, draw_labels
from sslctl.evaluation.protocols import Reader, Task, draw_number, linear_records, vote_records
from sslctl.evaluation.results import append, record, tested_on
from sslctl.evaluation.retrieval import average_precision, recall_hits
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.verbs import cases, label_amount, print_plan, reader_of
from sslctl.health import as_line, findings, judge_features

LeftOut = Callable[[str], None]


def evaluate(config: Any) -> None:
    """Everything that can be said of some weights on a dataset; without labels, what can be said without."""
    for key in ("knn.k", "retrieval.recall"):
        if not OmegaConf.select(config, key):
            raise InputError(f"{key} is empty: name at least one number")
    amounts = [label_amount(amount, "few_labels") for amount in config.few_labels]
    read = reader_of(config)
    for made, task, out in cases(config, sources_of):
        if config.plan_only:
            print_plan(made, task)
            continue
        left_out: dict[str, None] = {}  # in order, each once
        told: list[str] = []
        seen = pretrained_on(task, told.append)
        records = [
            r for subject in made for r in subject_records(subject, task, seen, amounts, read, left_out.setdefault)
        ]
        if out:
            append(out, records)
        if task.test is not None:
            show_protocols(records, f"{tested_on(task.test)}, {made[0].preprocess.words()}, frozen")
        show_figures(records, f"without labels, of {seen.name}'s {seen.split} split")
        for line in told:
            print(line)
        for line in left_out:
            print(f"left out: {line}")
        if out:
            print(f"appended to {out}")
        for finding in judge_features(records, findings(task.run) if task.run else []):
            print(as_line(finding))


def sources_of(node: Any) -> tuple[Source, Source | None]:
    """(train, test) of a dataset; test is None where there are no labels."""
    train = build_source(node, "train")
    return train, build_source(node, "test") if train.labelled else None


def subject_records(
    subject: Subject, task: Task, seen: Source, amounts: list[float], read: Reader, leave_out: LeftOut
) -> list[dict]:
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
        grid = Grid(**OmegaConf.to_container(config.probe, resolve=True))
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


def neighbour_records(subject: Subject, test: Source, bank: Features, queries: Features, config: Any) -> list[dict]:
    """kNN with every k, and retrieval, from one search."""
    recall, depth = list(config.retrieval.recall), config.retrieval.depth
    found = neighbours(queries.features, bank.features, max(*config.knn.k, *recall, depth))
    records = []
    for k in config.knn.k:
        records += vote_records(subject, test, found, bank, queries.labels, k, config.knn.temperature)
    relevant = bank.labels[found[1]] == queries.labels[:, None]  # (N, K)
    total = torch.bincount(bank.labels, minlength=bank.num_classes)[queries.labels]  # (N,)
    each = {f"recall@{k}": recall_hits(relevant, k) for k in recall}
    each[f"map@{depth}"] = average_precision(relevant[:, :depth], total)
    return records + [
        record(
            subject,
            test,
            protocol="retrieval",
            metric=metric,
            values=[values.double().mean().item()],
            each=values,
            labels="all",
            seed=None,
            epoch_rule="no training",
            params={"bank": len(bank.labels), "similarity": "cosine"},
        )
        for metric, values in each.items()
    ]


def cluster_records(subject: Subject, test: Source, bank: Features, queries: Features, config: Any) -> list[dict]:
    """Clusters of the training split, as many as classes; the test images that fall into them against their classes."""
    settings = OmegaConf.to_container(config.clustering, resolve=True)
    centroids, cosine = cluster(bank.features, bank.num_classes, **settings, seed=config.seed)
    chosen = nearest(F.normalize(queries.features, dim=1), centroids)
    hits = matched_hits(chosen, queries.labels, bank.num_classes)
    found = {"accuracy": (share(hits), None), **agreement(chosen, queries.labels)}
    return [
        record(
            subject,
            test,
            protocol="cluster",
            metric=metric,
            values=[value],
            each=hits if metric == "accuracy" else None,
            ci95=ci95,
            labels="none",
            seed=config.seed,
            epoch_rule="no training",
            params=settings | {"clusters": bank.num_classes, "fitted_on": len(bank.labels)},
            details={"cosine": cosine},
        )
        for metric, (value, ci95) in found.items()
    ]
