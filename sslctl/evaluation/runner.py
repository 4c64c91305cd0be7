"""sslctl linear-eval and knn-eval: protocols over subjects, each result beside the same figure for random weights."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sslctl.data.layout import NoTestSplit
from sslctl.data.overlap import doubts
from sslctl.data.sources import Source
from sslctl.errors import InputError, say, user_path
from sslctl.evaluation import subjects as who
from sslctl.evaluation.console import show, tested_on
from sslctl.evaluation.provenance import Origin, config_choice, origin_of
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Protocol, Reader, Task
from sslctl.factory.expectation import as_expected, has_weights
from sslctl.factory.from_config import build_source
from sslctl.factory.from_run import as_in_run, as_in_weights, dataset_of, resolve_runs, run_preprocess
from sslctl.models.preprocess import Preprocess, preprocess_of
from sslctl.runs.atomic import why_unwritable, why_unwritable_file
from sslctl.runs.directory import GIVEN, PROBES, RESULTS
from sslctl.runs.reading import read_config
from sslctl.runs.results import Result, append_results, refuse_unfit
from sslctl.training.plan import choose_device


def evaluate_all(config: Any, protocol: Protocol) -> None:
    """Applies one protocol to every subject of every run that ckpt= names, or to given weights, and prints a table."""
    for subjects, task, out in subjects_and_tasks(config, labelled_sources, protocol.subjects):
        if config.plan_only:
            print_plan([protocol], subjects, task)
            continue
        results = [result for subject in subjects for result in protocol(subject, task)]
        title = protocol.title.format(features=subjects[0].features)
        with recorded(out, results):
            show(results, f"{tested_on(task.test)}, {subjects[0].preprocess.summary()}, {title}")


@contextlib.contextmanager
def recorded(out: Path | None, results: list[Result]) -> Iterator[None]:
    """Writes results before the block prints them, and says where. Raises OSError after it where they could not be written."""
    failure = None
    try:
        if out:
            append_results(out, results)
    except OSError as error:
        failure = error
    yield
    if failure:
        words = f"what is printed above could not be written: {failure.strerror}"
        raise OSError(failure.errno, words, str(out)) from failure
    if out:
        say(f"appended to {out}")


def print_plan(protocols: Iterable[Protocol], subjects: list[Subject], task: Task) -> None:
    """Prints what plan_only=true says of the data and each subject; what several protocols say alike, once."""
    for source in filter(None, (task.train, task.test)):
        say(f"data       {source.name} ({source.split}): {source.summary()}")
        say(*(f"           {line}" for line in source.data_lines()))
    lines = dict.fromkeys(line for s in subjects for protocol in protocols for line in protocol.plan(s, task))
    say(*lines)


def reader_of(config: Any) -> Reader:
    """Returns what reads the features of this command: on its device, through the cache unless cache=false."""
    return Reader(choose_device(config.device), config.workers, config.cache_gb if config.cache else 0)


Sources = Callable[[Any], tuple[Source, Source | None]]  # of a dataset's configuration: (train, test)


def subjects_and_tasks(
    config: Any, sources: Sources, offered: tuple[str, ...] = Protocol.subjects
) -> Iterator[tuple[list[Subject], Task, Path | None]]:
    """Yields (subjects, task, file for the results) of every run that ckpt= names, or of given weights."""
    unknown = [s for s in config.subjects if s not in offered]
    if unknown or not config.subjects:
        raise InputError(f"subjects={unknown}: expected some of {', '.join(offered)}")
    # Fine-tuning and augmented views train on images: their configuration has no cache of features.
    read, seed = reader_of(config) if "cache" in config else None, config.get("seed", 0)
    out, named = user_path(config.out) if config.out else None, _named_dataset(config)
    if out:
        refuse_unfit(out)
    # Given weights: the dataset that is named decides what they see.
    if not config.ckpt:
        node = _dataset_of_given(config, named)
        train, test = _warned_of(sources(node))
        preprocess, normalization = as_expected(preprocess_of(node, train), config.backbone)
        if normalization:
            say(f"input      {normalization}")
        names = dict.fromkeys("given" if name == "trained" else name for name in config.subjects)
        subjects = [_given_subject(config, name, preprocess) for name in names]
        work = out.parent if out else Path("runs") / train.name / "given"
        yield subjects, Task(train, test, read, seed, config, node, work), out
        return
    # Runs: each on its own dataset unless another is named, whose images it must take as they are.
    if config.backbone is not None:  # another one than the runs', which takes their tensors
        who.refuse_keys_without_effect(config.backbone, of_run=True)
    for run, path in resolve_runs(config.ckpt):
        node = _dataset_of_run(run, config, named)
        train, test = _warned_of(sources(node))
        run_preprocess(run).refuse_other(str(run), train, _key_of_named(config), judges=True)
        makers = {
            "trained": lambda run=run, path=path: who.trained(run, path, config.get("features"), config.backbone),
            "given": lambda run=run: who.given_to(run, config.get("features"), config.backbone),
            "random": lambda run=run: who.random(run, config.get("features"), config.backbone),
            "scratch": lambda run=run: replace(who.random(run, None, config.backbone), name="scratch"),
            "pixels": lambda run=run: who.pixels(run_preprocess(run)),
        }
        # Built one after the other, only those that are asked for: each is a network in memory.
        say(f"{run} at {path.name}")
        names = [name for name in config.subjects if name != "given" or (run / GIVEN).exists()]
        if not names:
            raise InputError(
                f"subjects=[given]: {run} began with random weights, or keeps none of those that it was given"
            )
        subjects = [
            replace(who.judged_at(makers[name](), train), origin=origin_of(run, config.ckpt, name)) for name in names
        ]
        place = out or place_of_results(run)
        work = run / PROBES
        if why_unwritable(work):
            work = place.parent / PROBES if place else Path(PROBES)
        yield subjects, Task(train, test, read, seed, config, node, work, run, config.get("keep_mb", 0)), place


def place_of_results(run: Path) -> Path | None:
    """Returns the file for a run's results: its own; where that cannot be written, one in the current directory, which is
    said; None where neither can."""
    reason, other = why_unwritable_file(run / RESULTS), Path(f"results-{run.name}.jsonl")
    if not reason:
        return run / RESULTS
    if why_unwritable_file(other):
        say(f"{reason}, nor is the current directory: results are printed only; out=FILE keeps them")
        return None
    refuse_unfit(other)
    say(f"{reason}: results go to {other}; out=FILE names another file")
    return other


def _warned_of(sources: tuple[Source, Source | None]) -> tuple[Source, Source | None]:
    """Says what of the data may not be meant, and returns them."""
    for warning in doubts(*sources):
        say(f"warning    {warning}", file=sys.stderr)
    return sources


def _named_dataset(config: Any) -> Any | None:
    """Returns dataset=, or eval_dataset= where the verb takes it: the two mean the same here."""
    named = [node for node in (config.dataset, config.get("eval_dataset")) if node is not None]
    if len(named) > 1:
        raise InputError("dataset= and eval_dataset= both name what to evaluate on: leave one out")
    return named[0] if named else None


def _dataset_of_given(config: Any, named: Any | None) -> Any:
    """Returns the dataset that given weights are measured on. Raises InputError where nothing, or no dataset, is named."""
    if config.backbone is None:
        raise InputError("nothing to evaluate: name a run (ckpt=runs/latest) or backbone=… backbone.weights=FILE")
    if named is None:
        raise InputError("given weights need labelled images: dataset=…")
    return as_in_weights(named, config.backbone.get("weights"))


def _given_subject(config: Any, name: str, preprocess: Preprocess) -> Subject:
    """Builds a subject of weights that are no run's: `trained` and `given` mean the same there."""
    if name == "pixels":
        return who.pixels(preprocess)
    origin = Origin(backbone=config_choice("backbone"))
    weights = name in ("trained", "given")
    if weights and not has_weights(config.backbone):
        raise InputError("backbone.weights=FILE is missing: without weights there is nothing but a random network")
    if weights and config.backbone.get("partial"):
        raise InputError(who.PARTLY)
    subject = who.given(config.backbone, preprocess, with_weights=weights)
    return replace(subject, name=subject.name if weights else name, origin=origin)


def _dataset_of_run(run: Path, config: Any, named: Any | None) -> Any:
    """Returns the configuration of the dataset that a run is evaluated on, read as the run does: a named one, or its own."""
    if named is not None:
        return as_in_run(named, run, _key_of_named(config))
    return dataset_of(run, "eval_dataset" if read_config(run).get("eval_dataset") else "dataset")


def _key_of_named(config: Any) -> str:
    """Returns the key by which a command names what to evaluate on."""
    return "eval_dataset" if config.dataset is None and config.get("eval_dataset") is not None else "dataset"


def judged_images(train: Source, test_node: Any) -> tuple[Source, Source | None]:
    """Returns those of the training images that have labels, and the test split; None where there is none to judge by.

    test_node: the dataset's configuration. What is missing beside labels is said: training does not need it.
    """
    train = train.labelled_part()
    if not train.labelled and not train.has_several:
        return train, None
    try:
        return train, build_source(test_node, "test").labelled_part()
    except NoTestSplit as error:
        say(f"not judged: {error}")
        return train, None


def labelled_sources(node: Any) -> tuple[Source, Source]:
    """Returns (train, test) of a dataset. Raises InputError where it has no labels."""
    train, test = build_source(node, "train").labelled_part(), build_source(node, "test").labelled_part()
    for source in (train, test):
        if not source.labelled and not source.has_several:
            raise InputError(
                f"{source.name} has no labels to evaluate on: name a labelled dataset, with eval_dataset=… in sslctl"
                " pretrain, dataset=… elsewhere"
            )
    return train, test
