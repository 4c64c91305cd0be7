"""What an evaluation keeps of the classifier that it judged, for `sslctl predict`: only of a run's own trained weights."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sslctl.data.sources import Source
from sslctl.errors import say
from sslctl.evaluation.feature_files import as_utf8
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Task
from sslctl.ops.image_size import shorter_side
from sslctl.runs import classifiers
from sslctl.runs.atomic import why_unwritable
from sslctl.runs.classifiers import Classifier
from sslctl.runs.directory import now
from sslctl.runs.results import Result


def keep(
    kind: str,
    subject: Subject,
    task: Task,
    results: list[Result],
    tensors: Callable[[], dict[str, Tensor]],
    settings: dict[str, Any],
    limit_mb: float | None = None,
) -> list[Result]:
    """Writes the classifier that some results are of into the run, and returns these with its name among their details.

    results: of one classifier; the first is by which it is chosen later. settings: of its kind, see `runs.classifiers`.
    limit_mb: what its tensors may take, None: as the task says. One that is larger, and a run that cannot be written,
    are said, and the results returned as they are.
    """
    limit = task.keep_mb if limit_mb is None else limit_mb
    if task.run is None or subject.name != "trained" or not limit or (task.config and task.config.backbone is not None):
        return results
    if reason := why_unwritable(task.run / classifiers.CLASSIFIERS):
        say(f"  {kind}: not kept for sslctl predict: {reason}")
        return results
    first, held = results[0], tensors()
    size = sum(tensor.nbytes for tensor in held.values()) / 2**20
    if size > limit:
        key = (
            "keep_mb" if task.config else "evaluation.keep_mb"
        )  # the end of a pretraining has no configuration of its own
        say(f"  {kind}: not kept for sslctl predict, it takes {size:,.0f} MiB: {key}={math.ceil(size)}")
        return results
    about = Classifier(
        kind=kind,
        time=now(),
        metric=first.metric,
        value=first.value,
        judged_on=_described(task.test),
        fitted_on=_described(task.train),
        classes=[as_utf8(name) for name in task.train.classes],
        several=task.train.has_several,
        features=subject.features,
        weights_sha256=subject.weights_sha256,
        step=subject.step,
        preprocess=vars(subject.preprocess),
        resize=shorter_side(task.test.image_size) if task.test.all_of_one_size else subject.preprocess.resize,
        bands=list(task.test.reading.bands) if task.test.reading and task.test.reading.bands else None,
        settings=settings,
    )
    path = classifiers.write(task.run, about, _key_of(first, task.train), held)
    return [replace(r, details=r.details | {"classifier": str(path.relative_to(task.run))}) for r in results]


def _key_of(result: Result, train: Source) -> str:
    """Returns 16 digits for all that decides a result, but its value."""
    content = (
        *(result.protocol, result.params, result.labels, result.seed, result.measured_on, train.content_hash),
        *(result.weights_sha256, result.features, result.preprocess),
    )
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _described(source: Source) -> dict[str, Any]:
    return {
        "dataset": as_utf8(source.name),
        "split": source.split,
        "content": source.content_hash,
        "images": len(source),
    }


# --- The names of many images, as one tensor beside theirs ---


def names_of(source: Source) -> Tensor:
    """Returns the names of a source's images, absolute paths where they are files: bytes (n,) uint8, each name's end a 0."""
    names = (source.describe(row) for row in range(len(source)))
    paths = (os.path.abspath(name) if source.paths else name for name in names)
    return torch.frombuffer(bytearray(b"".join(os.fsencode(path) + b"\0" for path in paths)), dtype=torch.uint8)


def names_in(tensor: Tensor) -> list[str]:
    """Reads what `names_of` wrote."""
    return [os.fsdecode(name) for name in tensor.numpy().tobytes().split(b"\0")[:-1]]
