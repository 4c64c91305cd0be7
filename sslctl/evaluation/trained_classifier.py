"""A classifier trained on a backbone through fit(): what the probe on augmented views and fine-tuning share."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from sslctl import distributed
from sslctl.config.literal import as_config
from sslctl.data.sources import Source
from sslctl.errors import InputError, Stopped, say
from sslctl.evaluation.features import extract, refuse_non_finite
from sslctl.evaluation.provenance import config_choice
from sslctl.evaluation.provenance import settings as settings_words
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Task
from sslctl.factory.from_config import build_views, refuse_sizes
from sslctl.methods.base import Facts
from sslctl.methods.supervised import Supervised
from sslctl.runs.claim import take
from sslctl.runs.fingerprint import fingerprint, fingerprint_keys
from sslctl.signals import Signals
from sslctl.training.plan import Plan, Run, make_plan
from sslctl.training.setup import set_up
from sslctl.training.train import Outcome, fit


def resolve_settings(task: Task) -> Any:
    """Returns the resolved configuration, whose dataset is the one evaluated on."""
    config = task.config.copy()
    config.dataset = task.dataset
    return as_config(OmegaConf.to_container(config, resolve=True))


def refuse_processes(config: Any, what: str) -> None:
    """Raises InputError for several processes."""
    if config.trainer.processes > 1 or distributed.is_distributed():
        raise InputError(f"{what} runs in one process: trainer.processes=1", advice=["trainer.processes=1"])


def directory_of(task: Task, name: str, settings: Any, keys: tuple[str, ...], hashes: dict[str, str]) -> Path:
    """Returns where a training is kept: the same settings, weights and images find it again.

    keys: of the settings that decide a weight, beside those of every training.
    """
    plain = OmegaConf.to_container(settings)
    content = {k: plain[k] for k in ("dataset", "augmentation", "optimizer", "scheduler", "trainer", "seed", *keys)}
    return task.work / f"{name}-{fingerprint(fingerprint_keys(content, hashes))}-s{settings.seed}"


def train_classifier(
    build: Callable[[Facts], Supervised], source: Source, settings: Any, run_dir: Path, heading: list[str]
) -> tuple[Supervised, Plan]:
    """Trains what `build` builds, from the newest checkpoint in run_dir on. Raises Stopped after a signal, with all saved.

    heading: lines to print before it begins.
    """
    method, plan = build_classifier(build, source, settings)
    # Sizes that do not fit are refused first; then it is the loop that pretrains, with its checkpoints and resume.
    views = build_views(settings, source, method.backbone.network)
    refuse_sizes(method.backbone, views, source.image_size)
    setup = set_up(settings, Run(plan, method, source, views, run_dir))
    say(*heading)
    with Signals() as signals:
        if fit(setup, signals) is not Outcome.FINISHED:
            say(f"stopped; the same command continues {run_dir}")
            raise Stopped(signals.status)
    return method.eval(), plan


@contextlib.contextmanager
def lock_directory(run_dir: Path) -> Iterator[None]:
    """Makes a directory, marks it as a run and keeps other processes out of it."""
    lock = take(run_dir)
    try:
        yield
    finally:
        lock.release()


def build_classifier(build: Callable[[Facts], Supervised], source: Source, settings: Any) -> tuple[Supervised, Plan]:
    """Builds the classifier as training begins with it, and its plan."""
    plan = make_plan(settings, source)
    torch.set_num_threads(plan.threads)
    torch.manual_seed(settings.seed)
    try:
        return build(plan.facts(len(source.classes))), plan
    except ValueError as error:
        raise InputError(str(error)) from error


def test_scores(method: Supervised, subject: Subject, test: Source, workers: int, device: torch.device) -> Tensor:
    """Returns the classifier's scores (N, C) of the clean images."""
    scores = extract(
        lambda images: method.classifier(method.pooled(images)),
        test,
        torch.arange(len(test)),
        resize=subject.preprocess.resize,
        workers=workers,
        device=device,
    )
    refuse_non_finite(scores, f"scores of the classifier on {subject.name} weights, on {test.name}'s test split")
    return scores


def training_params(settings: Any, plan: Plan) -> dict:
    """Returns what decides a trained classifier beside its draws and its images, as results name it."""
    plain = OmegaConf.to_container(settings)
    names = ("precision", "clip_grad_norm", "accumulate_steps")
    augmentation = {"name": config_choice("augmentation"), **settings_words(plain["augmentation"])}
    return {
        "epochs": plan.epochs,
        "batch_size": plan.batch_size,
        **{name: plain["trainer"][name] for name in names},
        **{name: settings_words(plain[name]) for name in ("optimizer", "scheduler")},
        "augmentation": augmentation | {"dropped": list(plan.dropped)},
    }
