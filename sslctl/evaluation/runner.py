"""sslctl linear-eval and knn-eval: protocols over subjects, each result beside the same figure for random weights."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sslctl.data.sources import Source
from sslctl.errors import InputError, user_path
from sslctl.evaluation import subjects as who
from sslctl.evaluation.console import show, tested_on
from sslctl.evaluation.provenance import Origin, config_choice, origin_of
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Reader, Task, reader
from sslctl.factory.from_config import build_source
from sslctl.factory.from_run import resolve_runs, run_preprocess, with_tokenizer
from sslctl.models.preprocess import Preprocess, preprocess_of
from sslctl.runs.directory import RESULTS, read_config
from sslctl.runs.results import Result, append_results
from sslctl.training.plan import choose_device

SUBJECTS = ("trained", "random", "pixels")
Protocol = Callable[[Subject, Task], list[Result]]


def reader_of(config: Any) -> Reader:
    """The features of this command: on its device, through the cache unless cache=false."""
    return reader(choose_device(config.device), config.workers, config.cache_gb if config.cache else 0)


def label_amount(labels: Any, key: str = "labels") -> float | None:
    """None for all labels, n ≥ 1 a class, or a share of each class below 1."""
    if labels == "all":
        return None
    number = isinstance(labels, int | float) and not isinstance(labels, bool) and math.isfinite(labels)
    if not number or labels <= 0 or (labels > 1 and labels != int(labels)):
        raise InputError(f"{key}={labels}: expected all, a number a class ({key}=5) or a share ({key}=0.1)")
    return float(labels)


def evaluate_all(
    config: Any,
    protocol: Protocol,
    *,
    offered: tuple[str, ...] = SUBJECTS,
    title: str = "frozen {features} features",
    planned: Callable[[Subject, Task], list[str]] | None = None,
) -> None:
    """Applies a protocol to every subject of every run that ckpt= names, or to a foreign backbone.

    offered: the subjects it may have. title: of the table. planned: the lines that plan_only=true prints of a subject.
    """
    for made, task, out in subjects_and_tasks(config, labelled_sources, offered):
        if config.plan_only:
            print_plan(made, task, planned)
            continue
        test, records = task.test, [r for subject in made for r in protocol(subject, task)]
        if out:
            append_results(out, records)
        what = title.format(features=made[0].features)
        show(records, f"{tested_on(test)}, {made[0].preprocess.summary()}, {what}")
        if out:
            print(f"appended to {out}")


Sources = Callable[[Any], tuple[Source, Source | None]]  # of a dataset's configuration: (train, test)


def subjects_and_tasks(
    config: Any, sources: Sources, offered: tuple[str, ...] = SUBJECTS
) -> Iterator[tuple[list[Subject], Task, Path | None]]:
    """(subjects, task, file for the results) of every run that ckpt= names, or of a foreign backbone."""
    unknown = [s for s in config.subjects if s not in offered]
    if unknown or not config.subjects:
        raise InputError(f"subjects={unknown}: expected some of {', '.join(offered)}")
    out, named = user_path(config.out) if config.out else None, _named_dataset(config)
    if not config.ckpt:
        node = _wanted_dataset(config, named)
        train, test = sources(node)
        preprocess = preprocess_of(node, train)
        made = [_foreign_subject(config, name, preprocess) for name in config.subjects]
        work = out.parent if out else Path("runs") / train.name / "foreign"
        yield made, Task(config, node, train, test, work), out
        return
    for run, path in resolve_runs(config.ckpt):
        node = with_tokenizer(named or _dataset_of_run(run), run)
        train, test = sources(node)
        run_preprocess(run).refuse_other(str(run), train, "dataset")
        makers = {
            "trained": lambda run=run, path=path: who.trained(run, path, config.get("features"), config.backbone),
            "random": lambda run=run: who.random(run, config.get("features"), config.backbone),
            "scratch": lambda run=run: replace(who.random(run, None, config.backbone), name="scratch"),
            "pixels": lambda run=run: who.pixels(run_preprocess(run)),
        }
        print(f"{run} at {path.name}", flush=True)
        made = [replace(makers[name](), origin=origin_of(run, config.ckpt, name)) for name in config.subjects]
        yield made, Task(config, node, train, test, run / "probes", run), out or run / RESULTS


def print_plan(made: list[Subject], task: Task, planned: Callable[[Subject, Task], list[str]] | None = None) -> None:
    """What plan_only=true says of each subject."""
    print("\n".join(line for subject in made for line in (planned or images_of)(subject, task)))


def images_of(subject: Subject, task: Task) -> list[str]:
    """The plan of a protocol that takes all images there are."""
    test = f"{len(task.test):,} test images" if task.test else "no labels"
    return [f"  {subject.name}: {len(task.train):,} training and {test}, {subject.preprocess.summary()}"]


def _named_dataset(config: Any) -> Any | None:
    """dataset=, or eval_dataset= where the verb takes it: the two mean the same here."""
    named = [node for node in (config.dataset, config.get("eval_dataset")) if node is not None]
    if len(named) > 1:
        raise InputError("dataset= and eval_dataset= both name what to evaluate on: leave one out")
    return named[0] if named else None


def _wanted_dataset(config: Any, named: Any | None) -> Any:
    if config.backbone is None:
        raise InputError("nothing to evaluate: name a run (ckpt=runs/latest) or backbone=… backbone.weights=FILE")
    if named is None:
        raise InputError("a foreign backbone needs labelled images: dataset=…")
    return named


def _foreign_subject(config: Any, name: str, preprocess: Preprocess) -> Subject:
    if name == "pixels":
        return who.pixels(preprocess)
    origin = Origin(backbone=config_choice("backbone"))
    weights = name == "trained"
    if weights and not config.backbone.get("weights"):
        raise InputError("backbone.weights=FILE is missing: without weights there is nothing but a random network")
    if weights and config.backbone.get("partial"):
        raise InputError(who.PARTLY)
    made = who.foreign(config.backbone, preprocess, with_weights=weights)
    return replace(made, name=made.name if weights else name, origin=origin)


def _dataset_of_run(run: Path) -> Any:
    saved = read_config(run)
    return OmegaConf.create(saved.get("eval_dataset") or saved["dataset"])


def labelled_sources(node: Any) -> tuple[Source, Source]:
    """(train, test) of a dataset with labels."""
    train, test = build_source(node, "train"), build_source(node, "test")
    for source in (train, test):
        if not source.labelled:
            raise InputError(
                f"{source.name} has no labels to evaluate on: name a labelled dataset, with eval_dataset=… in sslctl"
                " pretrain, dataset=… elsewhere"
            )
    return train, test
