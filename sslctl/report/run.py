"""What a run left on disk, read once for the page."""

import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sslctl.evaluation.before_after import PROTOCOL
from sslctl.report.measurement import UNTRAINED, Measurement, measurement_of
from sslctl.runs.checkpoint import STATE, load_pickle, step_of
from sslctl.runs.claim import is_held
from sslctl.runs.directory import RESULTS
from sslctl.runs.fingerprint import fingerprint, fingerprint_keys, flat
from sslctl.runs.health import Finding, findings, verdict
from sslctl.runs.metrics import read_metrics
from sslctl.runs.reading import read_config, read_environment
from sslctl.runs.results import Result, read_results
from sslctl.runs.segments import data_changes
from sslctl.training.progress import duration


@dataclass(frozen=True)
class Run:
    """One run at its newest checkpoint. findings: of its health. label: how the page calls it; threads: what its
    results depend on, on a CPU."""

    path: Path
    checkpoint: Path
    label: str
    config: dict
    environment: dict
    metrics: list[dict]
    results: list[Result]
    findings: list[Finding]
    threads: int

    @property
    def facts(self) -> dict:
        return self.environment["facts"]

    @property
    def names(self) -> dict:
        return self.config["names"]

    @property
    def step(self) -> int:
        return step_of(self.checkpoint)

    @property
    def epochs(self) -> float:
        """Returns the epochs trained so far."""
        return self.step / self.facts["steps_per_epoch"]

    @property
    def status(self) -> str:
        if is_held(self.path):
            return "running"
        return "finished" if self.finished else "stopped"

    @property
    def finished(self) -> bool:
        return self.step == self.facts["total_steps"]

    @property
    def level(self) -> str:
        """Returns the level of its health: ok, early, warn or bad."""
        return verdict(self.findings).level

    @cached_property
    def group(self) -> str:
        """Returns what is the same for runs that differ in their seed alone."""
        return fingerprint(self.fingerprint_keys)

    @property
    def fingerprint_keys(self) -> dict:
        """Returns the keys that can change a weight, and the hashes of what the run reads, on which images it went on."""
        changed = data_changes(self.environment)
        hashes = self.environment.get("hashes", {}) | ({"data changes": changed} if changed else {})
        return fingerprint_keys(self.config, hashes)

    @property
    def keys(self) -> dict:
        """Returns every key of the configuration, flat."""
        return flat(self.config)

    def latest(self, subject: str) -> dict[Measurement, Result]:
        """Returns the last result of each measurement of a subject; of trained weights, at this checkpoint's step only."""
        step = {"trained": self.step}.get(subject)
        results = [
            r for r in self.results if r.subject == subject and r.protocol != PROTOCOL
        ]  # which has a section of its own
        return {measurement_of(r): r for r in results if step in (None, r.step)}

    def untrained(self) -> dict[Measurement, Result]:
        """Returns the last result of each measurement of the network as it began, or fine-tuned from there."""
        return {m: result for subject in UNTRAINED for m, result in self.latest(subject).items()}

    def began_with(self) -> str:
        """Returns the weights that the run was given, as its configuration names them; '' of random ones."""
        backbone = self.config["backbone"]
        if backbone.get("weights"):
            return backbone["weights"]
        return f"timm's weights of {backbone['model']}" if backbone.get("pretrained") else ""

    @property
    def network(self) -> str:
        """Returns the backbone's name: of timm's models their own."""
        return self.config["backbone"].get("model") if self.names["backbone"] == "timm" else self.names["backbone"]

    def series(self, name: str) -> list[tuple[float, float]]:
        """Returns (epoch, value) of what was logged under a name."""
        return [(m["epoch"], m[name]) for m in self.metrics if isinstance(m.get(name), int | float)]

    def training_time(self) -> str:
        """Returns what the steps took, by the logged speed; '' where none was logged."""
        speeds = [value for _, value in self.series("images_per_second") if value > 0]
        if not speeds:
            return ""
        return duration(self.step * self.facts["batch_size"] / statistics.harmonic_mean(speeds))

    @property
    def dataset(self) -> str:
        """Returns 'digits', or 'folder photos' of images that lie somewhere."""
        root = self.config["dataset"].get("root")
        return f"{self.names['dataset']} {Path(root).name}" if root else self.names["dataset"]


def read_run(path: Path, checkpoint: Path, label: str) -> Run:
    return Run(
        path,
        checkpoint,
        label,
        read_config(path),
        read_environment(path),
        read_metrics(path),
        read_results(path / RESULTS),
        findings(path),
        load_pickle(checkpoint / STATE)["threads"],
    )
