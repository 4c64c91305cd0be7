"""sslctl evaluate: every protocol from one feature extraction."""

from typing import Any

from sslctl.errors import say
from sslctl.evaluation.console import show_figures, show_protocols, tested_on
from sslctl.evaluation.runner import print_plan, recorded, subjects_and_tasks
from sslctl.evaluation.suite import build_protocols, measure, sources_of
from sslctl.runs.health import as_line, findings, judge_features


def evaluate(config: Any) -> None:
    """Measures some weights on a dataset by every protocol of the configuration; without labels, by those that need none."""
    protocols = build_protocols(config.protocols)
    for subjects, task, out in subjects_and_tasks(config, sources_of):
        if config.plan_only:
            print_plan(protocols.values(), subjects, task)
            continue
        # A subject is measured by all protocols before the next: the features of one alone are in memory.
        results = [result for subject in subjects for result in measure(subject, task, protocols)]
        with recorded(out, results):
            if task.test is not None:
                show_protocols(results, f"{tested_on(task.test)}, {subjects[0].preprocess.summary()}, frozen")
            show_figures(results)
            for note in task.notes:
                say(note)
            for omission in dict.fromkeys(task.omitted):  # each once, though several subjects lack it
                say(f"left out: {omission}")
        # What label-free figures say of the weights stands beside what the run itself has logged.
        for finding in judge_features(results, findings(task.run) if task.run else []):
            say(as_line(finding))
