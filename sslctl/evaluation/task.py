"""What every protocol has in common: what it measures on, the features it reads, and how it is found by its configuration."""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf
from torch import Tensor

from sslctl.data.sources import Source
from sslctl.errors import InputError
from sslctl.evaluation.features import Features, cached, extract, refuse_non_finite
from sslctl.evaluation.subjects import Subject
from sslctl.factory.from_config import build_source
from sslctl.factory.from_run import dataset_of
from sslctl.runs.reading import read_environment
from sslctl.runs.results import Result
from sslctl.runs.segments import current_hashes


class Reader:
    """Reads the features of a subject on a source: extracted once, kept on disk, those of the last subject in memory."""

    def __init__(self, device: torch.device, workers: int, cache_gb: float):
        self.device, self.workers, self.cache_gb = device, workers, cache_gb
        self.subject: Subject | None = None
        self.memory: dict[tuple, Any] = {}

    def __call__(self, subject: Subject, source: Source) -> Features:
        """Returns the features of all images of a source. Raises InputError where they are not finite numbers."""
        key = key_of(subject, source)

        def extract_all() -> Tensor:
            if subject.module is not None:
                subject.module.to(self.device)
            rows, resize = torch.arange(len(source)), subject.preprocess.resize
            place = {"workers": self.workers, "device": self.device}
            features = extract(subject.function, source, rows, resize=resize, **place)
            return refuse_non_finite(features, features_of(subject, source))

        def read() -> Features:
            features = cached(key, extract_all, self.cache_gb)
            return Features(features, source.labels, len(source.classes), source.targets, source.groups)

        return self.once(subject, key, read)

    def once(self, subject: Subject, key: tuple, compute: Callable[[], Any]) -> Any:
        """Returns what `compute` returns, computed once a key; forgotten as soon as another subject is read."""
        if subject is not self.subject:
            self.subject, self.memory = subject, {}
        if key not in self.memory:
            self.memory[key] = compute()
        return self.memory[key]


def features_of(subject: Subject, source: Source) -> str:
    """Names the features of a subject in messages."""
    return f"{subject.features} features of {subject.name} weights on {source.name}'s {source.split} split"


def key_of(subject: Subject, source: Source) -> tuple[str, ...]:
    """Returns what features are kept under."""
    return (subject.weights_sha256, subject.features, subject.preprocess.summary(), source.version, source.split)


@dataclass(frozen=True)
class Task:
    """Images to evaluate on. test is None where there are no labels.

    seed: of everything that is drawn. config, dataset: of the command and of the images. work: a directory for what a
    protocol must keep. run: whose weights they are. keep_mb: up to which size a classifier is kept there for `sslctl predict`, 0:
    none is. A protocol appends to `omitted` what it leaves out, and why, and to
    `notes` what else a reader of its results must know; both are printed once, below the results.
    """

    train: Source
    test: Source | None
    read: Reader | None = None
    seed: int = 0
    config: Any = None
    dataset: Any = None
    work: Path | None = None
    run: Path | None = None
    keep_mb: float = 0
    omitted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def pretraining_images(self) -> Source:
        """Returns the training images that label-free figures are of: a run's own, wherever it is evaluated; else the task's."""
        if self.run is None:
            return self.train
        node, source = dataset_of(self.run), self.train
        if node != self.dataset:
            try:
                source = build_source(OmegaConf.merge(node, {"memory_gb": 0}) if "memory_gb" in node else node, "train")
            except InputError as error:
                self.notes.append(
                    f"figures without labels are of {self.train.name}, those pretrained on are not there any more: {error}"
                )
                return self.train
        trained_on = current_hashes(read_environment(self.run)).get("data")
        if trained_on and source.content_hash != trained_on:
            self.notes.append(f"figures without labels: {source.name} has changed since the run was trained on it")
        return self.train if source.version == self.train.version else source


class Protocol(abc.ABC):
    """A way to measure a subject. A subclass is a frozen dataclass; its fields are its settings.

    `sslctl evaluate` finds it by its configuration: configs/protocols/<name>.yaml names the class and its fields, and
    protocols=[…,<name>] adds it. Everything else that knows it is the file of the class.
    """

    needs_labels: ClassVar[bool] = True  # it is left out where a task has no test split
    takes_several: ClassVar[bool] = False  # labels an image; else it is left out where images have several
    subjects: ClassVar[tuple[str, ...]] = ("trained", "given", "random", "pixels")  # that it can measure
    title: ClassVar[str] = "frozen {features} features"  # of its table

    @abc.abstractmethod
    def __call__(self, subject: Subject, task: Task) -> list[Result]:
        """Measures a subject."""

    def plan(self, subject: Subject, task: Task) -> list[str]:
        """Returns the lines that plan_only=true prints of a subject."""
        test = f"{len(task.test):,} test images" if task.test else "no labels"
        return [f"  {subject.name}: {len(task.train):,} training and {test}, {subject.preprocess.summary()}"]


# --- Amounts of labels ---


def label_amount(labels: Any, key: str = "labels") -> float | None:
    """Returns None for all labels, n ≥ 1 a class, or a share of each class below 1. Raises InputError for anything else."""
    if labels == "all":
        return None
    number = isinstance(labels, int | float) and not isinstance(labels, bool) and math.isfinite(labels)
    if not number or labels <= 0 or (labels > 1 and labels != int(labels)):
        raise InputError(f"{key}={labels}: expected all, a number a class ({key}=5) or a share ({key}=0.1)")
    return float(labels)


def amount_in_words(amount: float | None) -> str:
    """Returns an amount of labels as results name it: all, 5/class or 0.1."""
    return "all" if amount is None else f"{amount:g}/class" if amount >= 1 else f"{amount:g}"


def draw_number(seed: int, draw: int) -> int:
    """Returns what a draw of labels is drawn with: others for every draw of every seed, below a thousand draws."""
    return 1000 * seed + draw
