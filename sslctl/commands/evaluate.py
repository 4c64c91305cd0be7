"""sslctl evaluate: every protocol from one feature extraction."""

from typing import Any

from omegaconf import OmegaConf

from sslctl.errors import InputError
from sslctl.evaluation.console import show_figures, show_protocols, tested_on
from sslctl.evaluation.label_free import pretrained_on
from sslctl.evaluation.runner import label_amount, print_plan, reader_of, subjects_and_tasks
from sslctl.evaluation.suite import sources_of, subject_records
from sslctl.runs.health import as_line, findings, judge_features
from sslctl.runs.results import append_results


def evaluate(config: Any) -> None:
    """Everything that can be said of some weights on a dataset; without labels, what can be said without."""
    for key in ("knn.k", "retrieval.recall"):
        if not OmegaConf.select(config, key):
            raise InputError(f"{key} is empty: name at least one number")
    amounts = [label_amount(amount, "few_labels") for amount in config.few_labels]
    read = reader_of(config)
    for made, task, out in subjects_and_tasks(config, sources_of):
        if config.plan_only:
            print_plan(made, task)
            continue
        left_out: dict[str, None] = {}  # in order, each once
        told: list[str] = []
        seen = pretrained_on(task, told.append)
        records = [
            r for subject in made for r in subject_records(subject, task, seen, amounts, read, left_out.setdefault)
        ]
        if out:
            append_results(out, records)
        if task.test is not None:
            show_protocols(records, f"{tested_on(task.test)}, {made[0].preprocess.summary()}, frozen")
        show_figures(records, f"without labels, of {seen.name}'s {seen.split} split")
        for line in told:
            print(line)
        for line in left_out:
            print(f"left out: {line}")
        if out:
            print(f"appended to {out}")
        for finding in judge_features(records, findings(task.run) if task.run else []):
            print(as_line(finding))
