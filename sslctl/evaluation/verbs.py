"""sslctl linear-eval and knn-eval: protocols over subjects, each result beside the same figure for random weights."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sslctl.build import Preprocess, build_source, preprocess_of
from sslctl.config import InputError, user_path
from sslctl.data.sources import Source
from sslctl.evaluation import subjects as who
from sslctl.evaluation.augmented import augmented_records
from sslctl.evaluation.linear import Grid
from sslctl.evaluation.protocols import Task, knn_records, linear_records, reader
from sslctl.evaluation.results import append, show
from sslctl.evaluation.subjects import Subject
from sslctl.plan import choose_device
from sslctl.run_directory import RESULTS, read_config

SUBJECTS = ("trained", "random", "pixels")


def linear_eval(config: Any) -> None:
    """sslctl linear-eval: a linear classifier on frozen features."""
    amount = label_amount(config.labels)
    if config.protocol == "augmented":
        if amount is not None:
            raise InputError("protocol=augmented trains on all labels; few labels go with protocol=cached")
        evaluate_all(config, augmented_records)
        return
    grid = Grid(**OmegaConf.to_container(config.probe, resolve=True))
    draws = config.draws if amount is not None else 1
    read = _reader(config)
    evaluate_all(config, lambda s, task: linear_records(s, task.train, task.test, grid, amount, draws, read))


def knn_eval(config: Any) -> None:
    """sslctl knn-eval: weighted nearest neighbours."""
    read = _reader(config)
    evaluate_all(config, lambda s, task: knn_records(s, task.train, task.test, **config.knn, read=read))


def _reader(config: Any):
    return reader(choose_device(config.device), config.workers, config.cache_gb if config.cache else 0)


def label_amount(labels: Any) -> float | None:
    """None for all labels, n ≥ 1 a class, or a share of each class below 1."""
    if labels == "all":
        return None
    number = isinstance(labels, int | float) and not isinstance(labels, bool) and math.isfinite(labels)
    if not number or labels <= 0 or (labels > 1 and labels != int(labels)):
        raise InputError(f"labels={labels}: expected all, a number a class (labels=5) or a share (labels=0.1)")
    return float(labels)


def evaluate_all(config: Any, protocol: Callable[[Subject, Task], list[dict]]) -> None:
    """Applies a protocol to every subject of every run that ckpt= names, or to a foreign backbone."""
    unknown = [s for s in config.subjects if s not in SUBJECTS]
    if unknown or not config.subjects:
        raise InputError(f"subjects={unknown}: expected some of {', '.join(SUBJECTS)}")
    out = user_path(config.out) if config.out else None
    if not config.ckpt:
        node = _wanted_dataset(config)
        train, test = labelled_sources(node)
        preprocess = preprocess_of(node, train)
        made = [_foreign(config, name, preprocess) for name in config.subjects]
        work = out.parent if out else Path("runs") / train.name / "foreign"
        _evaluate(made, Task(config, node, train, test, work), protocol, out)
        return
    for run, path in who.resolve_runs(config.ckpt):
        node = config.dataset or _dataset_of_run(run)
        train, test = labelled_sources(node)
        refuse_other_images(str(run), who.run_preprocess(run), train, "dataset")
        makers = {
            "trained": lambda run=run, path=path: who.trained(run, path, config.features, config.backbone),
            "random": lambda run=run: who.random(run, config.features),
            "pixels": lambda run=run: who.pixels(who.run_preprocess(run)),
        }
        print(f"{run} at {path.name}", flush=True)
        made = [makers[name]() for name in config.subjects]
        _evaluate(made, Task(config, node, train, test, run / "probes"), protocol, out or run / RESULTS)


def _evaluate(
    made: list[Subject], task: Task, protocol: Callable[[Subject, Task], list[dict]], out: Path | None
) -> None:
    train, test = task.train, task.test
    if task.config.plan_only:
        for subject in made:
            print(
                f"  {subject.name}: {len(train):,} training and {len(test):,} test images, {subject.preprocess.words()}"
            )
        return
    records = [r for subject in made for r in protocol(subject, task)]
    if out:
        append(out, records)
    show(records, f"{test.name}, {test.split} split, {made[0].preprocess.words()}, frozen {made[0].features} features")
    if out:
        print(f"appended to {out}")


def _wanted_dataset(config: Any) -> Any:
    if config.backbone is None:
        raise InputError(
            "nothing to evaluate: name a run (sslctl linear-eval runs/latest) or backbone=… backbone.weights=FILE"
        )
    if config.dataset is None:
        raise InputError("a foreign backbone needs labelled images: dataset=…")
    return config.dataset


def _foreign(config: Any, name: str, preprocess: Preprocess) -> Subject:
    if name == "pixels":
        return who.pixels(preprocess)
    weights = name == "trained"
    if weights and not config.backbone.get("weights"):
        raise InputError("backbone.weights=FILE is missing: without weights there is nothing but a random network")
    return who.foreign(config.backbone, preprocess, with_weights=weights)


def _dataset_of_run(run: Path) -> Any:
    saved = read_config(run)
    return OmegaConf.create(saved.get("eval_dataset") or saved["dataset"])


def labelled_sources(node: Any) -> tuple[Source, Source]:
    """(train, test) of a dataset with labels."""
    train, test = build_source(node, "train"), build_source(node, "test")
    for source in (train, test):
        if not source.labelled:
            raise InputError(f"{source.name} has no labels to evaluate on: name a labelled dataset with eval_dataset=…")
    return train, test


def refuse_other_images(what: str, preprocess: Preprocess, source: Source, key: str) -> None:
    """The backbone sees images as in pretraining: another channel count or size is refused, not converted silently."""
    if (source.channels, source.image_size) != (preprocess.channels, preprocess.image_size):
        found = f"{source.channels}×{source.image_size}×{source.image_size}"
        channels = "" if source.channels == preprocess.channels else f" and {key}.channels={preprocess.channels}"
        raise InputError(
            f"{what} takes {preprocess.words()}, {source.name} has {found} images:"
            f" set {key}.image_size={preprocess.image_size}{channels}"
        )
