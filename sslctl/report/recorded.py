"""What a run left on disk, read once for the page."""

import re
import shlex
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sslctl import run_directory as rundir
from sslctl.checkpoint import load_pickle, step_of
from sslctl.health import Finding, findings, verdict
from sslctl.logs import duration
from sslctl.run_directory import decisive, fingerprint, flat

_SETTINGS = ("k", "temperature", "bank")  # details that make another measurement of the same protocol
_SHARE = re.compile(r"top\d+|acc|nmi|ari$|m?ap\b|map|recall|precision|purity|f1|hit", re.IGNORECASE)


@dataclass(frozen=True)
class Measurement:
    """What two results must share to stand in one row or column."""

    protocol: str
    metric: str
    labels: str
    dataset: str
    split: str
    features: str
    settings: tuple[tuple[str, float], ...]

    def words(self) -> str:
        """'knn, all labels, top1'."""
        return f"{self.protocol}, {self.labels} labels, {self.metric}"


@dataclass(frozen=True)
class Run:
    """One run at its newest checkpoint. findings: of its health. shown: how the page calls it; threads: what its
    results depend on, on a CPU."""

    path: Path
    checkpoint: Path
    shown: str
    config: dict
    environment: dict
    metrics: list[dict]
    results: list[dict]
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
        """Trained so far."""
        return self.step / self.facts["steps_per_epoch"]

    @property
    def status(self) -> str:
        if rundir.is_held(self.path):
            return "running"
        return "finished" if self.finished else "stopped"

    @property
    def finished(self) -> bool:
        return self.step == self.facts["total_steps"]

    @property
    def level(self) -> str:
        """Of its health: ok, warn or bad."""
        return verdict(self.findings).level

    @cached_property
    def group(self) -> str:
        """The same for runs that differ in their seed alone."""
        return fingerprint(self.decisive)

    @property
    def decisive(self) -> dict:
        """The keys that can change a weight, with the names of the choices."""
        return decisive(self.config, self.environment.get("hashes", {}))

    @property
    def keys(self) -> dict:
        """Every key of the configuration, flat."""
        return flat(self.config)

    def latest(self, subject: str) -> dict[Measurement, dict]:
        """The last result of each measurement of a subject; of trained weights, at this checkpoint's step only."""
        step = {"trained": self.step}.get(subject)
        return {
            measurement(r): r for r in self.results if r["subject"] == subject and (step is None or r["step"] == step)
        }

    def series(self, name: str) -> list[tuple[float, float]]:
        """(epoch, value) of what was logged under a name."""
        return [(m["epoch"], m[name]) for m in self.metrics if isinstance(m.get(name), int | float)]

    def training_time(self) -> str:
        """What the steps took, by the logged speed; '' where none was logged."""
        speeds = [value for _, value in self.series("images_per_second") if value > 0]
        if not speeds:
            return ""
        return duration(self.step * self.facts["batch_size"] / statistics.harmonic_mean(speeds))

    @property
    def dataset(self) -> str:
        """'digits', or 'folder photos' of images that lie somewhere."""
        root = self.config["dataset"].get("root")
        return f"{self.names['dataset']} {Path(root).name}" if root else self.names["dataset"]

    @property
    def datasets(self) -> set[str]:
        """The names that results on the run's own data carry."""
        nodes = [node for node in (self.config["dataset"], self.config.get("eval_dataset")) if node]
        made = {node["_target_"].rpartition(".")[2] for node in nodes}
        return {self.names["dataset"]} | made | {Path(node["root"]).name for node in nodes if node.get("root")}

    @property
    def started_with(self) -> str:
        """The command that started it, where it was started. Again it continues the run."""
        return self._in_its_place(_words(self.environment["command"]))

    def _in_its_place(self, words: list[str]) -> str:
        return f"cd {shlex.quote(self.environment['cwd'])} && {shlex.join(words)}"

    @property
    def repeat_with(self) -> str:
        """The command that trains it anew, in another directory."""
        words = [word for word in _words(self.environment["command"]) if not word.startswith("run_dir=")]
        words += [] if self.config["trainer"]["threads"] else [f"trainer.threads={self.threads}"]
        return self._in_its_place([*words, f"run_dir=repeated/{self.path.name}"])


def read_run(path: Path, checkpoint: Path, shown: str) -> Run:
    return Run(
        path,
        checkpoint,
        shown,
        rundir.read_config(path),
        rundir.read_json(path / rundir.ENVIRONMENT),
        rundir.read_lines(path / rundir.METRICS),
        rundir.read_lines(path / rundir.RESULTS),
        findings(path),
        load_pickle(checkpoint / "state.pt")["threads"],
    )


_PLAIN = re.compile(r"(run_dir|(?:eval_)?dataset\.root)='([\w./-]+)'")


def _words(command: str) -> list[str]:
    """The words of a command; paths without the quotes that Hydra's grammar asks for, where they need none."""
    return [_PLAIN.sub(r"\1=\2", word) for word in shlex.split(command)]


def measurement(record: dict) -> Measurement:
    details = record.get("details", {})
    return Measurement(
        *(record[name] for name in ("protocol", "metric", "labels", "dataset", "split", "features")),
        tuple((name, details[name]) for name in _SETTINGS if name in details),
    )


def is_share(metric: str) -> bool:
    """Whether a metric is a fraction that reads better in percent."""
    return bool(_SHARE.match(metric))


def number(metric: str, value: float | None, spread: float | None = None) -> str:
    """'91.24 %', '91.24 ± 0.31 %' or '45.3'."""
    if value is None:
        return "–"
    if is_share(metric):
        return f"{100 * value:.2f}{'' if spread is None else f' ± {100 * spread:.2f}'} %"
    return f"{value:.4g}{'' if spread is None else f' ± {spread:.2g}'}"


def shown_value(record: dict) -> str:
    """A result with its spread over draws of labels, where it has one."""
    return number(record["metric"], record["value"], record.get("std"))


def interval(record: dict) -> str:
    """'88.1–91.9 %': the 95 % interval over the test images of a record that has one, else ''."""
    if not record.get("ci95"):
        return ""
    low, high = record["ci95"]
    if is_share(record["metric"]):
        return f"{100 * low:.1f}–{100 * high:.1f} %"
    return f"{low:.4g}–{high:.4g}"


def evaluation_command(run: Run, record: dict) -> str:
    """The command that measures a result again on the run's newest weights."""
    details, protocol = record.get("details", {}), record["protocol"]
    words = ["sslctl", "evaluate", str(run.path)]
    if protocol == "knn":
        words[1] = "knn-eval"
        words += [f"knn.{name}={details[name]}" for name in ("k", "temperature") if name in details]
    elif protocol.startswith("linear-"):
        words[1] = "linear-eval"
        words += [f"protocol={protocol.removeprefix('linear-')}", f"labels={record['labels'].removesuffix('/class')}"]
        words += [f"draws={record.get('draws', 1)}"] if record["labels"] != "all" else []
    elif protocol == "finetune":
        words[1] = "finetune"
    words += [f"features={record['features']}"] if record["features"] not in ("backbone", "pixels") else []
    elsewhere = "" if record["dataset"] in run.datasets else " dataset=… # the one called " + record["dataset"]
    return f"cd {shlex.quote(run.environment['cwd'])} && {shlex.join(words)}{elsewhere}"
