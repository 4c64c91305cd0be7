"""What a run says while it trains: metrics.jsonl, TensorBoard events, and lines for whoever is watching."""

import contextlib
import time
from pathlib import Path

from sslctl.distributed import rank
from sslctl.runs.directory import METRICS
from sslctl.runs.metrics import append_metrics
from sslctl.training.plan import Plan
from sslctl.training.progress import Progress


class Log:
    """One record per logged step, written to the file, to TensorBoard and to the terminal.

    first_step: where this process began; TensorBoard forgets what an earlier one logged beyond it.
    """

    def __init__(self, run_dir: Path, plan: Plan, first_step: int, tensorboard: bool):
        self.path, self.plan, self.first_step = run_dir / METRICS, plan, first_step
        self.last_record: tuple[float, int] | None = None
        self.latest: dict[str, float] = {}  # of the online evaluation
        self.writer = None
        self.writes = rank() == 0
        if tensorboard and self.writes:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run_dir), purge_step=first_step and first_step + 1)
        self.progress = Progress(plan.total_steps, first_step) if self.writes else contextlib.nullcontext()

    def __enter__(self) -> "Log":
        self.progress.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self.progress.__exit__(None, None, None)
        if self.writer:
            self.writer.close()

    def record(self, step: int, values: dict[str, float]) -> None:
        """Logs the values of a completed step."""
        if not self.writes:
            return
        now = time.monotonic()
        if "loss" in values:
            if self.last_record is not None:
                seconds = now - self.last_record[0]
                values = values | {"images_per_second": (step - self.last_record[1]) * self.plan.batch_size / seconds}
            self.last_record = (now, step)
        self.latest |= {name: values[name] for name in ("knn", "rankme") if name in values}
        append_metrics(self.path, {"step": step, "epoch": round(step / self.plan.steps_per_epoch, 4), **values})
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        place = f"epoch {step / self.plan.steps_per_epoch:.1f}/{self.plan.epochs}"
        telling = "rankme" in values or step == self.plan.total_steps
        self.progress.update(step, place, self._figures(values), line_now=telling)

    def flush(self) -> None:
        if self.writer:
            self.writer.flush()

    def _figures(self, values: dict[str, float]) -> str:
        parts = []
        for name, label, form in (
            ("loss", "loss", ".3f"),
            ("lr", "lr", ".2g"),
            ("images_per_second", "images/s", ",.0f"),
        ):
            if name in values:
                parts.append(f"{label} {values[name]:{form}}")
        if "knn" in self.latest:
            parts.append(f"kNN {self.latest['knn']:.1%}")
        elif "rankme" in self.latest:
            parts.append(f"RankMe {self.latest['rankme']:.1f}")
        return "  ".join(parts)
