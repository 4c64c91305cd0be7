"""The end of pretraining: kNN and a linear probe of the trained weights beside the random ones, then the backbone's file."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from sslctl.data.sources import Source
from sslctl.errors import say
from sslctl.evaluation import subjects as who
from sslctl.evaluation.console import show, tested_on
from sslctl.evaluation.knn import Knn
from sslctl.evaluation.linear import LinearProbe, ProbeGrid
from sslctl.evaluation.provenance import origin_of
from sslctl.evaluation.task import Reader, Task
from sslctl.factory.backbone_file import save_backbone
from sslctl.factory.exportable import feature_names, find_backbone, with_pooling
from sslctl.methods.base import Method
from sslctl.models.preprocess import Preprocess
from sslctl.runs.directory import BACKBONE, GIVEN, RESULTS, total_size
from sslctl.runs.health import as_line, findings
from sslctl.runs.results import Result, append_results, read_results
from sslctl.training.plan import Plan
from sslctl.training.setup import Setup


def has_closing_results(run_dir: Path, plan: Plan, test: Source) -> bool:
    """Tells whether every closing result is on disk: of two protocols, top-1 and of many classes top-5, or mAP.

    Of the trained and of random weights, and of those that the run was given to begin with, where there are any.
    """
    now = (None, test.content_hash)  # not of images that have changed since
    results = [r for r in read_results(run_dir / RESULTS) if r.details.get("closing") and r.content in now]
    metrics = ("mAP",) if test.has_several else ("top1", "top5") if len(test.classes) > 5 else ("top1",)
    measured = {(r.protocol, r.subject, r.metric) for r in results if r.step in (0, plan.total_steps)}
    subjects = 3 if (run_dir / GIVEN).exists() else 2
    return sum(metric in metrics for _, _, metric in measured) == subjects * 2 * len(metrics)


def closing_results(
    config: Any,
    run_dir: Path,
    method: Method,
    preprocess: Preprocess,
    plan: Plan,
    train: Source,
    test: Source,
) -> list[Result]:
    """Measures the trained, the given and the random weights on the test split by kNN and by a linear probe on all labels."""
    grid = ProbeGrid(**OmegaConf.to_container(config.probe, resolve=True))
    knn = config.evaluation.knn
    protocols = (Knn([knn.k], knn.temperature), LinearProbe(grid))
    trained = who.method_subject("trained", method, preprocess, None, plan.total_steps)
    begun = [who.given_to(run_dir, None)] if (run_dir / GIVEN).exists() else []
    subjects = [
        replace(who.judged_at(subject, test), origin=origin_of(run_dir, None, subject.name))
        for subject in (trained, *begun, who.random(run_dir, None))
    ]
    read = Reader(plan.device, config.trainer.workers, config.evaluation.cache_gb)
    task = Task(train, test, read, run=run_dir, keep_mb=config.evaluation.keep_mb)
    results = [result for subject in subjects for protocol in protocols for result in protocol(subject, task)]
    return [replace(result, details=result.details | {"closing": True}) for result in results]


def is_finished(run_dir: Path, plan: Plan, test: Source | None) -> bool:
    """Tells whether the weights of the last step and the closing results, where there are to be any, are on disk."""
    return (run_dir / BACKBONE).exists() and (test is None or has_closing_results(run_dir, plan, test))


def finish(config: Any, setup: Setup, preprocess: Preprocess, judges: tuple[Source, Source] | None) -> None:
    """Does the closing evaluation and, last of all, writes the backbone's weights: with them the run is finished.

    judges: the labelled (train, test) that the run is judged on.
    """
    run_dir, method = setup.run_dir, setup.method.eval()
    if judges and config.evaluation.closing and not has_closing_results(run_dir, setup.plan, judges[1]):
        say("  evaluating")
        results = closing_results(config, run_dir, method, preprocess, setup.plan, *judges)
        append_results(run_dir / RESULTS, results)
        features = f"frozen features after {setup.plan.epochs} epochs"
        show(results, f"{tested_on(judges[1])}, {preprocess.at(judges[1].image_size).summary()}, {features}")
    elif not judges:
        say(
            "  no labels to evaluate with: name labelled data with eval_dataset=…, or probe later with sslctl linear-eval"
        )
    save_evaluated_backbone(config, setup, preprocess)
    for finding in findings(run_dir):
        say(f"  {as_line(finding)}")
    say(f"done: {run_dir} ({total_size(run_dir) / 2**20:,.1f} MiB)")


def save_evaluated_backbone(config: Any, setup: Setup, preprocess: Preprocess) -> None:
    """Writes backbone.safetensors: the network, alone, that gives the features which evaluation measures."""
    method, node = setup.method, OmegaConf.to_container(config.backbone, resolve=True)
    # Eager: a compiled network would be compiled again for these few images.
    with torch.compiler.set_stance("force_eager") if config.trainer.compile else contextlib.nullcontext():
        features = feature_names(method, preprocess)[0]
        evaluated = find_backbone(method, features, preprocess)
    # Where no backbone alone gives these features, its own output is kept, and the file says that it is not what was measured.
    backbone, pool = evaluated or (method.backbone, {})
    metadata = {"step": str(setup.plan.total_steps)} | ({} if evaluated else {"evaluated": features})
    save_backbone(setup.run_dir / BACKBONE, backbone, with_pooling(node, pool), preprocess, **metadata)
