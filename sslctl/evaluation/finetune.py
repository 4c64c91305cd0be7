"""sslctl finetune: the whole network learns from all labels or a few, beside the same network from random weights."""

import copy
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslctl.data.modality import VIDEOS
from sslctl.data.sources import Source
from sslctl.errors import InputError, say
from sslctl.evaluation.keeping import keep
from sslctl.evaluation.knn import accuracy, score_results
from sslctl.evaluation.labelled_rows import draw_labels
from sslctl.evaluation.multi_label import METRIC, mean_average_precision
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Protocol, Task, amount_in_words, draw_number
from sslctl.evaluation.trained_classifier import (
    build_classifier,
    directory_of,
    lock_directory,
    resolve_settings,
    test_scores,
    train_classifier,
    training_params,
)
from sslctl.factory.backbone_file import visual_metadata
from sslctl.factory.exportable import feature_names
from sslctl.methods.base import Facts
from sslctl.methods.supervised import Supervised
from sslctl.models.backbones import Backbone
from sslctl.models.batchnorm import group_batchnorm
from sslctl.models.layer_decay import describe_decay
from sslctl.runs import directory as rundir
from sslctl.runs.atomic import replacing
from sslctl.runs.checkpoint import load_tensors, remove_all, save_tensors
from sslctl.runs.checksums import digest_of_file
from sslctl.runs.results import Result
from sslctl.training.plan import Plan, make_plan

CLASSIFIER = "classifier.safetensors"  # written last: with it, a training is finished
OWN = ("backbone", "layer_decay", "classifier_lr_scale", "network", "pool")  # keys that can change a weight


@dataclass(frozen=True)
class Finetune(Protocol):
    """Fine-tunes on every draw of labels and judges the last epoch on the test split. Stops and resumes as any run."""

    takes_several = True
    subjects = ("trained", "given", "scratch")
    title = "fine-tuned"
    amount: float | None  # of labels, None for all

    def __call__(self, subject: Subject, task: Task) -> list[Result]:
        scores, run_dirs, draws = [], [], 1 if self.amount is None else task.config.draws
        for draw in range(draws):
            # The same labels as the linear probes' draw of this number, in a directory of their own.
            source = self.draw_source(task, draw)
            settings = settings_for(subject, task, source)
            labels = "all" if self.amount is None else f"{self.amount:g}-draw{draw}"
            hashes = {"data": source.content_hash, "weights": subject.weights_sha256}
            run_dir = directory_of(task, f"finetune-{subject.name}-{labels}", settings, OWN, hashes)
            title = title_of(subject) + (f", draw {draw + 1} of {draws}" if draws > 1 else "")
            heading = [title, *(plan_lines(subject, settings, source) if draw == 0 else [])]
            with lock_directory(run_dir):
                method, plan = finetune_or_load(subject, source, settings, run_dir, heading)
            scores.append(test_scores(method, subject, task.test, settings.trainer.workers, plan.device))
            run_dirs.append(str(run_dir))
            say(f"  {_figure(scores[-1], task.test)}; kept as {run_dir}/{rundir.BACKBONE} and {CLASSIFIER}")
        asked_for = {key: task.config[key] for key in ("classifier_lr_scale", "least_steps")}
        asked_for |= {"layer_decay": task.config.optimizer.get("layer_decay", task.config.layer_decay)}
        params = {**training_params(settings, plan), **asked_for, **{key: settings[key] for key in ("network", "pool")}}
        params |= {"draws": draws, "training_images": len(task.train)}
        details = {
            **{key: settings[key] for key in ("layer_decay", "classifier_lr_scale")},  # as applied: 1 from scratch
            **{"steps": plan.total_steps, "lr": plan.lr, "images_with_labels": len(source), "kept": run_dirs},
        }
        results = score_results(
            subject,
            task.test,
            scores,
            protocol="finetune",
            labels=amount_in_words(self.amount),
            seed=task.seed,
            epoch_rule=f"last of {plan.epochs}",
            params=params,
            details=details,
        )
        if draws > 1:  # their results are the mean of several classifiers
            return results
        tensors = {name: value.detach().cpu() for name, value in method.classifier.state_dict().items()}
        kept = {"network": settings.network, "pool": settings.pool, "directory": run_dir.name}
        kept["sha256"] = digest_of_file(run_dir / rundir.BACKBONE)
        return keep("finetune", subject, task, results, lambda: tensors, kept, limit_mb=math.inf)

    def plan(self, subject: Subject, task: Task) -> list[str]:
        source = self.draw_source(task, 0)
        settings = settings_for(subject, task, source)
        build_classifier(functools.partial(build_network, subject, settings, source), source, settings)
        return [title_of(subject), *plan_lines(subject, settings, source)]

    def draw_source(self, task: Task, draw: int) -> Source:
        """Returns the labelled images of a draw: those of the linear probes' same draw of the same seed."""
        if self.amount is None:
            return task.train
        train, number = task.train, draw_number(task.seed, draw)
        return train.subset(draw_labels(train.labels, self.amount, number, train.targets))


def _figure(scores: Tensor, test: Source) -> str:
    if test.has_several:
        return f"{METRIC} {mean_average_precision(scores, test.targets):.2%}"
    return f"top1 {accuracy(scores, test.labels)['top1']:.2%}"


def settings_for(subject: Subject, task: Task, source: Source) -> Any:
    """Returns the configuration for this many images: batches no larger than all of them, `least_steps` at least.

    New weights have no layers to spare: from scratch, every layer learns at the same rate.
    """
    if source.modality == VIDEOS:
        raise InputError(
            f"finetune takes images or texts; {source.name} has {source.summary()}: dataset=imagefolder dataset.root=FOLDER"
        )
    settings = resolve_settings(task)
    trainer = settings.trainer
    trainer.batch_size = min(trainer.batch_size, len(source))
    trainer.epochs = max(trainer.epochs, -(-settings.least_steps // (len(source) // trainer.batch_size)))
    settings.network, settings.pool = network_of(subject, settings.network, settings.pool)
    # Results and directories know it by the name that it had when only fine-tuning had it.
    settings.layer_decay = settings.optimizer.pop("layer_decay", settings.layer_decay)
    if subject.name == "scratch":
        settings.layer_decay = settings.classifier_lr_scale = 1.0
    return settings


def network_of(subject: Subject, network: str | None, pool: str | None) -> tuple[str, str]:
    """Chooses which of a method's networks, and how a vision transformer's is pooled: as asked for, or as its evaluations do."""
    method = subject.method
    try:
        if pool == "mean":
            subject.backbone.vision_transformer()
    except ValueError as error:
        raise InputError(f"pool=mean: {error}") from error
    if method is None:
        if network == "teacher":
            raise InputError("network=teacher: weights from a file have none")
        return "backbone", pool or "own"
    evaluated_features = feature_names(method, subject.preprocess)[0]
    has_teacher = hasattr(method, "teacher_backbone")
    if network == "teacher" and not has_teacher:
        raise InputError(f"network=teacher: {type(method).__name__} has no teacher of its own")
    evaluated, pooling = method.feature_networks().get(evaluated_features, (method.backbone, "own"))
    is_teacher = has_teacher and evaluated is method.teacher_backbone
    return network or ("teacher" if is_teacher else "backbone"), pool or pooling


def build_network(subject: Subject, settings: Any, source: Source, facts: Facts) -> Supervised:
    """Builds the network with a new classifier."""
    backbone: Backbone = subject.method.teacher_backbone if settings.network == "teacher" else subject.backbone
    method = Supervised(
        group_batchnorm(copy.deepcopy(backbone), 1),  # MoCo's groups are for its own batches
        facts,
        frozen=False,
        pool=settings.pool,
        layer_decay=settings.layer_decay,
        classifier_lr_scale=settings.classifier_lr_scale,
    )
    method.modality, method.several = source.modality, source.has_several
    return method


def finetune_or_load(
    subject: Subject, source: Source, settings: Any, run_dir: Path, heading: list[str]
) -> tuple[Supervised, Plan]:
    """Returns the fine-tuned network in eval mode; a finished one is read. Its training state goes once its weights are kept."""
    build = functools.partial(build_network, subject, settings, source)
    backbone, classifier = run_dir / rundir.BACKBONE, run_dir / CLASSIFIER
    if backbone.exists() and classifier.exists():
        method, plan = build_classifier(build, source, settings)
        say(*heading, "  already trained")
        method.backbone.load_state_dict(load_tensors(backbone))
        method.classifier.load_state_dict(load_tensors(classifier))
        method = method.to(plan.device).eval()
        return method.to(memory_format=torch.channels_last) if plan.channels_last else method, plan
    method, plan = train_classifier(build, source, settings, run_dir, heading)
    rundir.write_json(run_dir / rundir.PREPROCESS, vars(subject.preprocess))
    facts = {"step": str(plan.total_steps), "classes": json.dumps(source.classes), "pool": settings.pool}
    facts |= visual_metadata(method.backbone)
    for path, module in ((backbone, method.backbone), (classifier, method.classifier)):
        with replacing(path) as temporary:
            save_tensors(temporary, module.state_dict(), facts, signed=True)
    remove_all(run_dir)
    return method, plan


def title_of(subject: Subject) -> str:
    """Returns what is trained, in words."""
    return "training from scratch" if subject.name == "scratch" else f"fine-tuning {subject.name} weights"


def plan_lines(subject: Subject, settings: Any, source: Source) -> list[str]:
    """Returns the plan in words, one line a part."""
    network = f"network    {settings.network}, pooling {settings.pool}"
    return [
        *make_plan(settings, source).lines(),
        network,
        *describe_decay(subject.backbone.network, settings.layer_decay),
    ]
