"""sslctl linear-eval: a linear classifier on frozen features."""

from typing import Any

from omegaconf import OmegaConf

from sslctl.errors import InputError
from sslctl.evaluation.linear import ProbeGrid, linear_records
from sslctl.evaluation.linear_augmented import augmented_records
from sslctl.evaluation.runner import evaluate_all, label_amount, reader_of
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Task
from sslctl.runs.results import Result


def linear_eval(config: Any) -> None:
    """sslctl linear-eval: a linear classifier on frozen features."""
    amount = label_amount(config.labels)
    if config.protocol == "augmented":
        if amount is not None:
            raise InputError("protocol=augmented trains on all labels; few labels go with protocol=cached")
        evaluate_all(config, augmented_records)
        return
    grid = ProbeGrid(**OmegaConf.to_container(config.probe, resolve=True))
    draws = config.draws if amount is not None else 1
    read = reader_of(config)

    def probe(subject: Subject, task: Task) -> list[Result]:
        return linear_records(subject, task.train, task.test, grid, amount, draws, read, seed=config.seed)

    evaluate_all(config, probe)
