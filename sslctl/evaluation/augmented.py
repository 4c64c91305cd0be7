"""The linear probe of the papers: SGD on augmented views through fit(), the backbone frozen and in eval mode."""

import copy

import torch
from omegaconf import OmegaConf

from sslctl import distributed
from sslctl import run_directory as rundir
from sslctl.build import build_views
from sslctl.cli import Stopped
from sslctl.config import InputError
from sslctl.evaluation.features import extract
from sslctl.evaluation.knn import accuracy
from sslctl.evaluation.protocols import Task
from sslctl.evaluation.results import record
from sslctl.evaluation.subjects import Subject
from sslctl.methods.supervised import Supervised
from sslctl.plan import make_plan
from sslctl.run_directory import decisive, fingerprint
from sslctl.signals import Signals
from sslctl.train import fit, set_up


def augmented_records(subject: Subject, task: Task) -> list[dict]:
    """Trains a linear classifier and judges its last epoch on the clean test split. Stops and resumes as any run."""
    config, train = task.config, task.train
    if config.trainer.processes > 1 or distributed.launched():
        raise InputError("protocol=augmented runs in one process: trainer.processes=1")
    if subject.backbone is None or subject.features != "backbone":
        raise InputError(f"protocol=augmented probes a backbone's output, not {subject.name} {subject.features}")
    resolved = OmegaConf.to_container(config, resolve=True)
    resolved["dataset"] = OmegaConf.to_container(task.dataset, resolve=True)
    settings = OmegaConf.create(resolved)
    plan = make_plan(settings, train)
    torch.set_num_threads(plan.threads)
    torch.manual_seed(config.seed)
    facts = plan.facts(len(train.classes))
    method = Supervised(copy.deepcopy(subject.backbone), facts, frozen=True)
    views = build_views(config, train.image_size, plan.dropped)
    decided = {k: resolved[k] for k in ("dataset", "augmentation", "optimizer", "scheduler", "trainer", "seed")}
    hashes = {"data": train.content_hash, "weights": subject.weights_sha256}
    run_dir = task.work / f"linear-augmented-{subject.name}-{fingerprint(decisive(decided, hashes))}-s{config.seed}"
    rundir.make(run_dir)
    lock = rundir.Lock(run_dir)
    try:
        setup = set_up(config, plan, method, train, views, run_dir)
        print("\n".join([f"linear classifier on {subject.name} weights", *plan.lines()]), flush=True)
        with Signals() as signals:
            if not fit(setup, signals):
                print(f"stopped; the same command continues {run_dir}", flush=True)
                raise Stopped(signals.status)
    finally:
        lock.release()
    method.eval()
    scores = extract(
        lambda images: method.classifier(method.backbone(images)),
        task.test,
        torch.arange(len(task.test)),
        resize=subject.preprocess.resize,
        workers=config.workers,
        device=plan.device,
    )
    return [
        record(
            subject,
            task.test,
            protocol="linear-augmented",
            metric=metric,
            values=[value],
            labels="all",
            seed=config.seed,
            epoch_rule=f"last of {plan.epochs}",
            details={"lr": plan.lr, "weight_decay": config.optimizer.weight_decay, "batch_size": plan.batch_size},
        )
        for metric, value in accuracy(scores, task.test.labels).items()
    ]
