"""The linear probe of the papers: SGD on augmented views through fit(), the backbone frozen and in eval mode."""

import copy

from sslctl.errors import InputError
from sslctl.evaluation.knn import share
from sslctl.evaluation.results import make_result
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Task
from sslctl.evaluation.trained_classifier import (
    directory,
    held,
    judged,
    refuse_processes,
    settings_of,
    trained_by,
    trained_classifier,
)
from sslctl.methods.base import Facts
from sslctl.methods.supervised import Supervised
from sslctl.runs.results import Result
from sslctl.training.plan import make_plan


def augmented_records(subject: Subject, task: Task) -> list[Result]:
    """Trains a linear classifier and judges its last epoch on the clean test split. Stops and resumes as any run."""
    train = task.train
    refuse_processes(task.config, "protocol=augmented")
    if subject.backbone is None or subject.features != "backbone":
        raise InputError(f"protocol=augmented probes a backbone's output, not {subject.name} {subject.features}")
    if train.gives != "global":
        raise InputError(f"protocol=augmented takes images; {train.name} has {train.summary()}")
    settings = settings_of(task)

    def make(facts: Facts) -> Supervised:
        backbone = copy.deepcopy(subject.backbone)
        return Supervised(backbone, facts, frozen=True, pool="own", layer_decay=1.0, classifier_lr_scale=1.0)

    hashes = {"data": train.content_hash, "weights": subject.weights_sha256}
    run_dir = directory(task, f"linear-augmented-{subject.name}", settings, (), hashes)
    said = [f"linear classifier on {subject.name} weights", *make_plan(settings, train).lines()]
    with held(run_dir):
        method, plan = trained_classifier(make, train, settings, run_dir, said)
    return [
        make_result(
            subject,
            task.test,
            protocol="linear-augmented",
            metric=metric,
            values=[share(hits)],
            each=hits,
            labels="all",
            seed=settings.seed,
            epoch_rule=f"last of {plan.epochs}",
            params=trained_by(settings, plan) | {"training_images": len(train)},
            details={"lr": plan.lr, "steps": plan.total_steps},
        )
        for metric, hits in judged(method, subject, task.test, settings.workers, plan.device).items()
    ]
