"""sslctl finetune: the whole network learns from all labels or a few, beside the same network from random weights."""

import copy
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from sslctl.data.sources import Source
from sslctl.errors import InputError
from sslctl.evaluation.knn import share
from sslctl.evaluation.linear import draw_labels
from sslctl.evaluation.results import make_result
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Task, amount_words, draw_number
from sslctl.evaluation.trained_classifier import (
    directory,
    held,
    judged,
    settings_of,
    trained_by,
    trained_classifier,
    untrained,
)
from sslctl.factory.backbone_file import visual_metadata
from sslctl.factory.exportable import feature_names
from sslctl.methods.base import Facts
from sslctl.methods.supervised import Supervised
from sslctl.models.backbones import Backbone
from sslctl.models.batchnorm import group_batchnorm
from sslctl.models.layer_decay import layer_depths
from sslctl.runs import directory as rundir
from sslctl.runs.atomic import replacing, write_text
from sslctl.runs.checkpoint import load_tensors, save_tensors
from sslctl.runs.results import Result
from sslctl.training.plan import Plan, make_plan

CLASSIFIER = "classifier.safetensors"  # written last: with it, a training is finished
OWN = ("backbone", "layer_decay", "classifier_lr_scale", "network", "pool")  # keys that can change a weight


def finetune_records(subject: Subject, task: Task, amount: float | None) -> list[Result]:
    """Fine-tunes on every draw of labels and judges the last epoch on the test split. Stops and resumes as any run."""
    hits, kept, draws = [], [], 1 if amount is None else task.config.draws
    for draw in range(draws):
        source = drawn(task.train, amount, draw_number(task.config.seed, draw))
        settings = settings_for(subject, task, source)
        what = f"{subject.name}-all" if amount is None else f"{subject.name}-{amount:g}-draw{draw}"
        hashes = {"data": source.content_hash, "weights": subject.weights_sha256}
        run_dir = directory(task, f"finetune-{what}", settings, OWN, hashes)
        lines = plan_lines(subject, settings, source) if draw == 0 else []
        head = heading(subject) + (f", draw {draw + 1} of {draws}" if draws > 1 else "")
        with held(run_dir):
            method, plan = finetuned(subject, source, settings, run_dir, [head, *lines])
        hits.append(judged(method, subject, task.test, settings.trainer.workers, plan.device))
        kept.append(str(run_dir))
        print(f"  top1 {share(hits[-1]['top1']):.2%}; kept as {run_dir}/{rundir.BACKBONE} and {CLASSIFIER}", flush=True)
    asked_for = {key: task.config[key] for key in ("layer_decay", "classifier_lr_scale", "least_steps")}
    params = {**trained_by(settings, plan), **asked_for, **{key: settings[key] for key in ("network", "pool")}}
    params |= {"draws": draws, "training_images": len(task.train)}
    details = {
        **{key: settings[key] for key in ("layer_decay", "classifier_lr_scale")},  # as applied: 1 from scratch
        **{"steps": plan.total_steps, "lr": plan.lr, "images_with_labels": len(source), "kept": kept},
    }
    return [
        make_result(
            subject,
            task.test,
            protocol="finetune",
            metric=metric,
            values=[share(h[metric]) for h in hits],
            each=hits[0][metric],
            labels=amount_words(amount),
            seed=settings.seed,
            epoch_rule=f"last of {plan.epochs}",
            params=params,
            details=details,
        )
        for metric in hits[0]
    ]


def planned(subject: Subject, task: Task, amount: float | None) -> list[str]:
    """What plan_only=true says of a subject."""
    source = drawn(task.train, amount, draw_number(task.config.seed, 0))
    settings = settings_for(subject, task, source)
    untrained(functools.partial(made, subject, settings, source), source, settings)
    return [heading(subject), *plan_lines(subject, settings, source)]


def drawn(train: Source, amount: float | None, number: int) -> Source:
    """The labelled images of a draw (`draw_number`): those of the linear probes' same draw of the same seed."""
    return train if amount is None else train.subset(draw_labels(train.labels, amount, number))


def settings_for(subject: Subject, task: Task, source: Source) -> Any:
    """The configuration for this many images: batches no larger than all of them, `least_steps` at least.

    New weights have no layers to spare: from scratch, every layer learns at the same rate.
    """
    if source.gives == "frames":
        raise InputError(f"finetune takes images or texts; {source.name} has {source.summary()}: dataset=imagefolder")
    settings = settings_of(task)
    trainer = settings.trainer
    trainer.batch_size = min(trainer.batch_size, len(source))
    trainer.epochs = max(trainer.epochs, -(-settings.least_steps // (len(source) // trainer.batch_size)))
    settings.network, settings.pool = network_of(subject, settings.network, settings.pool)
    if subject.name == "scratch":
        settings.layer_decay = settings.classifier_lr_scale = 1.0
    return settings


def network_of(subject: Subject, network: str | None, pool: str | None) -> tuple[str, str]:
    """Which of a method's networks, and how a vision transformer's is pooled: as asked for, or as its evaluations do."""
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
    names = feature_names(method, subject.preprocess)
    has_teacher = hasattr(method, "teacher_backbone")
    if network == "teacher" and not has_teacher:
        raise InputError(f"network=teacher: {type(method).__name__} has no teacher of its own")
    means = "mean" in names and (names[0] == "mean" or "backbone" not in names)
    return (
        network or ("teacher" if has_teacher and names[0] == "teacher" else "backbone"),
        pool or ("mean" if means else "own"),
    )


def made(subject: Subject, settings: Any, source: Source, facts: Facts) -> Supervised:
    """The network with a new classifier."""
    backbone: Backbone = subject.method.teacher_backbone if settings.network == "teacher" else subject.backbone
    method = Supervised(
        group_batchnorm(copy.deepcopy(backbone), 1),  # MoCo's groups are for its own batches
        facts,
        frozen=False,
        pool=settings.pool,
        layer_decay=settings.layer_decay,
        classifier_lr_scale=settings.classifier_lr_scale,
    )
    method.looks_at = source.gives
    return method


def finetuned(
    subject: Subject, source: Source, settings: Any, run_dir: Path, said: list[str]
) -> tuple[Supervised, Plan]:
    """The fine-tuned network in eval mode; a finished one is read. Its training state goes once its weights are kept."""
    make = functools.partial(made, subject, settings, source)
    backbone, classifier = run_dir / rundir.BACKBONE, run_dir / CLASSIFIER
    if classifier.exists():
        method, plan = untrained(make, source, settings)
        print("\n".join([*said, "  already trained"]), flush=True)
        method.backbone.load_state_dict(load_tensors(backbone))
        method.classifier.load_state_dict(load_tensors(classifier))
        method = method.to(plan.device).eval()
        return method.to(memory_format=torch.channels_last) if plan.channels_last else method, plan
    method, plan = trained_classifier(make, source, settings, run_dir, said)
    write_text(run_dir / rundir.PREPROCESS, json.dumps(vars(subject.preprocess), indent=1))
    facts = {"step": str(plan.total_steps), "classes": json.dumps(source.classes), "pool": settings.pool}
    facts |= visual_metadata(method.backbone)
    for path, module in ((backbone, method.backbone), (classifier, method.classifier)):
        with replacing(path) as temporary:
            save_tensors(temporary, module.state_dict(), facts)
    (run_dir / "last").unlink(missing_ok=True)
    shutil.rmtree(run_dir / "checkpoints")
    return method, plan


def heading(subject: Subject) -> str:
    return "training from scratch" if subject.name == "scratch" else f"fine-tuning {subject.name} weights"


def plan_lines(subject: Subject, settings: Any, source: Source) -> list[str]:
    """The plan in words, one line a subject."""
    lines = [*make_plan(settings, source).lines(), f"network    {settings.network}, pooling {settings.pool}"]
    if settings.layer_decay != 1:
        _, depth = layer_depths(subject.backbone.network)
        least = settings.layer_decay**depth
        lines.append(
            f"layers     lr × {settings.layer_decay:g} from each to the one before, × {least:.2g} at the first"
        )
    return lines
