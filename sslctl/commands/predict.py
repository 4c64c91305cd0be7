"""sslctl predict: classes of new images by a classifier that an evaluation kept, a batch at a time from images to disk."""

import contextlib
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sslctl.config.command_line import task_words
from sslctl.config.targets import target_of
from sslctl.data import packed, sources, tables
from sslctl.data.layout import NoTestSplit
from sslctl.data.sources import Source
from sslctl.data.tiles import Tiles
from sslctl.data.unreadable import WHEN_READ
from sslctl.errors import InputError, Stopped, say, user_path
from sslctl.evaluation.feature_files import as_utf8, chosen_format, import_pyarrow
from sslctl.evaluation.prediction_files import WRITERS, About, columns_of, is_own
from sslctl.evaluation.predictions import Summary, rows_of
from sslctl.evaluation.predictor import build_predictor, preprocess_of
from sslctl.factory.from_config import build_source
from sslctl.factory.from_run import as_in_run, resolve_runs, with_preprocess
from sslctl.models.preprocess import Preprocess, TextPreprocess
from sslctl.runs.atomic import make_folder_of, refuse_others_file, replacing
from sslctl.runs.classifiers import Classifier, choose, command_that_keeps, kept_in
from sslctl.runs.directory import now, versions
from sslctl.runs.ownership import step_of
from sslctl.runs.reading import read_environment
from sslctl.signals import Interrupted, Signals
from sslctl.training.plan import choose_device
from sslctl.training.progress import Progress

_NOT_HERE = ("dataset.skip", "dataset.max_bad")  # they are about what stands in for bad images in training


def predict(config: Any) -> None:
    """Writes a row for each image: its class, how probable that is, and the labelled images nearest to it."""
    # What can be refused by the command alone is refused before a network is read.
    kind, device = _format(config), choose_device(config.device)
    if any(word.partition("=")[0] in _NOT_HERE for word in task_words()):
        raise InputError(
            f"{' and '.join(_NOT_HERE)} are of training, where other images stand in for bad ones; here"
            " dataset.on_error=skip gives each a row with its error"
        )
    if not config.ckpt:
        raise InputError("no run to predict with: sslctl predict runs/latest dataset.root=FOLDER")
    runs = resolve_runs(config.ckpt)
    if len(runs) > 1:
        raise InputError(f"ckpt names {len(runs)} runs, predictions are of one: name it")
    run, checkpoint = runs[0]

    # Which classifier, and the images, read as those that it was judged on.
    classifier, bank = _choose(config, run, step_of(checkpoint))
    preprocess = preprocess_of(classifier, run)
    splits = _sources(config, run, preprocess, classifier)
    say(f"{run} at {checkpoint.name}", *_lines_of(config, run, classifier, bank))
    for source in splits:
        preprocess.refuse_other(str(run), source, "dataset")
        say(f"data        {source.name} ({source.split}): {source.summary()}")
        say(*(f"            {line}" for line in source.data_lines()))
        if source.content_hash == classifier.fitted_on["content"]:
            say(
                "            the classifier was fitted on these images: how many are right says nothing of others; split=test"
            )
    predictor = build_predictor(run, checkpoint, classifier, bank, config.neighbours)
    for module in predictor.modules:
        module.to(device)

    # From images to disk. A signal, or an image that ends the command, leaves no file.
    out, summary, total = _out(config, run, splits[0], classifier, kind), Summary(classifier), sum(map(len, splits))
    about = About(_columns(config, splits, classifier, bank), _origin(run, checkpoint, splits, classifier))
    reading = {"batch_size": config.batch_size, "workers": config.workers, "device": device}
    skip = config.dataset.get("on_error") == "skip"
    try:
        with (
            Signals() as handler,
            replacing(out) as temporary,
            WRITERS[kind](temporary, about) as write,
            Progress(total, transient=True) as progress,
        ):
            for source in splits:
                with contextlib.closing(rows_of(predictor, classifier, source, skip=skip, **reading)) as feed:
                    for rows in feed:
                        write(rows)
                        summary.add(rows)
                        progress.update(summary.images, f"{summary.images:,} of {total:,} images")
    except Interrupted:
        raise Stopped(handler.status) from None
    say(*summary.lines(), f"{out}: {summary.images:,} rows, {out.stat().st_size / 2**20:,.1f} MiB")


# --- The classifier ---


def _choose(config: Any, run: Path, step: int) -> tuple[Classifier, Classifier | None]:
    """Returns a classifier of the run's weights after a step, and the kept kNN whose images are named as the nearest, if any.

    Raises InputError where none is kept that the command asks for.
    """
    kept, errors = kept_in(run)
    for error in errors:
        say(f"left out: {error}")
    of_step = [one for one in kept if one.step == step]
    usable = [one for one in of_step if config.classifier in (None, one.kind)]
    if not usable:
        labelled = read_environment(run)["facts"]["num_classes"] > 0
        words = () if labelled else ("dataset=imagefolder", "dataset.root=FOLDER")
        command = command_that_keeps(run, config.classifier or "linear", *words)
        what = f"{config.classifier} classifier" if config.classifier else "classifier"
        there = ", ".join(f"{one.kind} of step {one.step:,}" for one in kept) or "none"
        raise InputError(
            f"{run} keeps no {what} of step {step:,} (kept: {there}): {command} keeps one",
            advice=[command] if labelled else [],
        )
    classifier = choose(usable)
    if not config.neighbours or classifier.kind == "knn":
        return classifier, classifier if config.neighbours else None
    wanted = ("knn", classifier.features, classifier.preprocess, classifier.resize)
    banks = [one for one in of_step if (one.kind, one.features, one.preprocess, one.resize) == wanted]
    if not banks and any(word.startswith("neighbours=") for word in task_words()):
        command = command_that_keeps(run, "knn")
        raise InputError(
            f"neighbours={config.neighbours}: {run} keeps no labelled images of step {step:,} as its {classifier.kind}"
            f" classifier sees them: {command} keeps them",
            advice=[command],
        )
    return classifier, max(banks, key=lambda one: one.time, default=None)


def _lines_of(config: Any, run: Path, classifier: Classifier, bank: Classifier | None) -> list[str]:
    """Returns the plan's lines on the classifier, and on the labelled images."""
    judged, fitted = classifier.judged_on, classifier.fitted_on
    by = "asked for" if config.classifier else "classifier=… takes another of those kept"
    lines = [
        f"classifier  {classifier.kind}, {len(classifier.classes)} classes, of {fitted['images']:,} images of"
        f" {fitted['dataset']} ({fitted['split']})",
        f"            {classifier.figure} of {judged['images']:,} images of {judged['dataset']} ({judged['split']}): {by}",
    ]
    if bank is not None:
        frozen = ", by the run's features before fine-tuning" if classifier.kind == "finetune" else ""
        of = f"{bank.fitted_on['images']:,} labelled images of {bank.fitted_on['dataset']}"
        return [*lines, f"nearest     {config.neighbours} of {of}{frozen}; neighbours=…"]
    if config.neighbours:
        lines.append(f"nearest     none: no labelled images are kept, which {command_that_keeps(run, 'knn')} does")
    return lines


# --- The images ---


def _sources(config: Any, run: Path, preprocess: Preprocess | TextPreprocess, classifier: Classifier) -> list[Source]:
    """Returns the splits that are asked for, read as the images that the classifier was judged on, none kept in memory."""
    node = with_preprocess(as_in_run(config.dataset, run), preprocess)
    if "memory_gb" in node:
        node = OmegaConf.merge(node, {"memory_gb": 0})
    if classifier.bands and "bands" in node and node.bands is None:
        node = OmegaConf.merge(node, {"bands": classifier.bands})
    # A bad image has a row of its own, not another's in its place.
    if node.get("on_error") == "skip" and node.get("tiles") is None:
        node = OmegaConf.merge(node, {"on_error": WHEN_READ})
    target, whole = target_of(node, "dataset"), (tables.csv, sources.folder)
    if config.split != "all":
        splits = [build_source(node, config.split)]
    elif target in whole and node.get("label") is None:
        splits = [build_source(node, "all")]
    else:
        splits = [build_source(node, "train")]
        if splits[0].classes or target is packed.hf:  # others without labels are one split
            with contextlib.suppress(NoTestSplit):
                splits.append(build_source(node, "test"))
    values = splits[0].reading.value_range if splits[0].reading else None
    if values and node.get("range") is None and getattr(preprocess, "value_range", None) is None:
        words = f"dataset.range=[{values[0]:g},{values[1]:g}]"
        raise InputError(
            f"{run} was judged on images of 8 bits, {splits[0].name} has more of them: {words} says which values become 0 and 1",
            advice=[words],
        )
    return splits


# --- The file ---


def _format(config: Any) -> str:
    """Returns csv or parquet. Raises InputError where what writes it is missing."""
    kind = chosen_format(config, WRITERS)
    if kind == "parquet":
        import_pyarrow("format=csv")
    return kind


def _out(config: Any, run: Path, source: Source, classifier: Classifier, kind: str) -> Path:
    """Returns where the file goes. Raises InputError where none can be written."""
    name = f"{as_utf8(source.name)}-{classifier.kind}.{kind}"
    out = user_path(config.out) if config.out else run / "predictions" / name
    make_folder_of(out)
    refuse_others_file(out, "predict", lambda path: is_own(path, kind))
    if out.exists():
        say(f"{out} was written by sslctl predict before: it is replaced")
    return out


def _columns(config: Any, splits: list[Source], classifier: Classifier, bank: Classifier | None) -> dict[str, type]:
    """Returns the columns of the file."""
    return columns_of(
        classifier.classes,
        several=classifier.several,
        tiled=isinstance(splits[0], Tiles),
        labelled=any(source.classes for source in splits),
        neighbours=min(config.neighbours, bank.fitted_on["images"]) if bank else 0,
    )


def _origin(run: Path, checkpoint: Path, splits: list[Source], classifier: Classifier) -> dict[str, Any]:
    """Returns where the predictions come from, as plain values."""
    return {
        "run": as_utf8(str(run)),
        "checkpoint": checkpoint.name,
        "classifier": classifier.path.name,
        "figure": classifier.figure,
        "classes": classifier.classes,
        "dataset": as_utf8(splits[0].name),
        "versions": versions(),
        "time": now(),
    }
