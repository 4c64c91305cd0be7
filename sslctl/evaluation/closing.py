"""The evaluation at the end of pretraining: kNN and linear, of the trained weights beside the random ones they began as."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sslctl.data.sources import Source
from sslctl.evaluation import subjects as who
from sslctl.evaluation.knn import Knn
from sslctl.evaluation.linear import LinearProbe, ProbeGrid
from sslctl.evaluation.provenance import origin_of
from sslctl.evaluation.task import Reader, Task
from sslctl.methods.base import Method
from sslctl.models.preprocess import Preprocess
from sslctl.runs.directory import RESULTS
from sslctl.runs.results import Result, read_results
from sslctl.training.plan import Plan


def has_closing_results(run_dir: Path, plan: Plan, test: Source) -> bool:
    """Tells whether every closing result is on disk: two subjects, two protocols, top-1 and of many classes top-5."""
    results = [r for r in read_results(run_dir / RESULTS) if r.details.get("closing")]
    measured = {(r.protocol, r.subject, r.metric) for r in results if r.step in (0, plan.total_steps)}
    return len(measured) == 2 * 2 * (2 if len(test.classes) > 5 else 1)


def closing_results(
    config: Any,
    run_dir: Path,
    method: Method,
    preprocess: Preprocess,
    plan: Plan,
    train: Source,
    test: Source,
) -> list[Result]:
    """Measures the trained and the random weights on the test split by kNN and by a linear probe on all labels."""
    grid = ProbeGrid(**OmegaConf.to_container(config.probe, resolve=True))
    knn = config.evaluation.knn
    protocols = (Knn([knn.k], knn.temperature), LinearProbe(grid))
    trained = who.method_subject("trained", method, preprocess, None, plan.total_steps)
    subjects = [replace(s, origin=origin_of(run_dir, None, s.name)) for s in (trained, who.random(run_dir, None))]
    task = Task(train, test, Reader(plan.device, config.trainer.workers, config.evaluation.cache_gb))
    results = [result for subject in subjects for protocol in protocols for result in protocol(subject, task)]
    return [replace(result, details=result.details | {"closing": True}) for result in results]
