"""The linear probe of the papers: SGD on augmented views through fit(), the backbone frozen and in eval mode."""

import copy
from dataclasses import dataclass

import torch

from sslctl.data.modality import IMAGES
from sslctl.errors import InputError
from sslctl.evaluation.keeping import keep
from sslctl.evaluation.knn import score_results
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Protocol, Task
from sslctl.evaluation.trained_classifier import (
    directory_of,
    lock_directory,
    refuse_processes,
    resolve_settings,
    test_scores,
    train_classifier,
    training_params,
)
from sslctl.methods.base import Facts
from sslctl.methods.supervised import Supervised
from sslctl.runs.results import Result
from sslctl.training.plan import make_plan


@dataclass(frozen=True)
class LinearAugmented(Protocol):
    """A linear classifier on augmented views; its last epoch is judged on the clean test split. Stops and resumes as any run."""

    takes_several = True

    def __call__(self, subject: Subject, task: Task) -> list[Result]:
        train = task.train
        refuse_processes(task.config, "protocol=augmented")
        if subject.backbone is None or subject.features != "backbone":
            raise InputError(f"protocol=augmented probes a backbone's output, not {subject.name} {subject.features}")
        if train.modality != IMAGES:
            raise InputError(f"protocol=augmented takes images; {train.name} has {train.summary()}")
        settings = resolve_settings(task)
        if settings.optimizer.pop("layer_decay", 1.0) != 1:
            raise InputError(
                "a probe's backbone does not learn: optimizer.layer_decay=1", advice=["optimizer.layer_decay=1"]
            )

        def build(facts: Facts) -> Supervised:
            backbone = copy.deepcopy(subject.backbone)
            method = Supervised(backbone, facts, frozen=True, pool="own", layer_decay=1.0, classifier_lr_scale=1.0)
            method.several = train.has_several
            return method

        hashes = {"data": train.content_hash, "weights": subject.weights_sha256}
        run_dir = directory_of(task, f"linear-augmented-{subject.name}", settings, (), hashes)
        heading = [f"linear classifier on {subject.name} weights", *make_plan(settings, train).lines()]
        with lock_directory(run_dir):
            method, plan = train_classifier(build, train, settings, run_dir, heading)
        results = score_results(
            subject,
            task.test,
            [test_scores(method, subject, task.test, settings.workers, plan.device)],
            protocol="linear-augmented",
            labels="all",
            seed=task.seed,
            epoch_rule=f"last of {plan.epochs}",
            params=training_params(settings, plan) | {"training_images": len(train)},
            details={"lr": plan.lr, "steps": plan.total_steps},
        )
        weight, bias = (tensor.detach().cpu() for tensor in (method.classifier.weight, method.classifier.bias))
        as_they_are = {
            "mean": torch.zeros(weight.shape[1]),
            "std": torch.ones(weight.shape[1]),
        }  # features, not standardised
        return keep("linear", subject, task, results, lambda: {"weight": weight.T, "bias": bias, **as_they_are}, {})
