"""What a run says while it trains: metrics.jsonl, TensorBoard events, and lines for whoever is watching."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sslctl.distributed import rank
from sslctl.runs.claim import refuse_replaced
from sslctl.runs.directory import METRICS
from sslctl.runs.metrics import append_metrics, read_metrics
from sslctl.training.plan import Plan
from sslctl.training.progress import Progress


class Log:
    """One record per logged step, written to the file, to TensorBoard and to the terminal.

    first_step: where this process begins; TensorBoard forgets what an earlier one logged beyond it. evaluating: the online
    evaluation of that step is to come, again perhaps: then TensorBoard forgets that step as well, and is given its record anew.
    """

    def __init__(self, run_dir: Path, plan: Plan, first_step: int, tensorboard: bool, *, evaluating: bool = False):
        self.path, self.plan, self.first_step = run_dir / METRICS, plan, first_step
        self.last_record: tuple[float, int] | None = None
        self.latest: dict[str, float] = {}  # of the online evaluation
        self.writer = None
        self.writes = rank() == 0
        self.shows = tensorboard and self.writes
        self.forgets_from = first_step if evaluating or not first_step else first_step + 1
        self.report_thread = threading.excepthook
        self.progress = Progress(plan.total_steps, first_step) if self.writes else contextlib.nullcontext()

    def __enter__(self) -> "Log":
        if self.shows:
            self._open_events()
        self.progress.__enter__()
        return self

    def _open_events(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What its thread cannot write is raised here by the next call, and not shown as a traceback of the thread as well.
        threading.excepthook = functools.partial(_report_unless_raised, self.report_thread)
        run_dir = self.path.parent
        move_events_back(run_dir)
        with self.naming():
            self.writer = SummaryWriter(str(run_dir), purge_step=self.forgets_from)
        for record in read_metrics(run_dir):
            if record["step"] >= self.forgets_from:
                self._show({k: v for k, v in record.items() if k not in ("step", "epoch")}, record["step"])

    def __exit__(self, kind: type | None, *_) -> None:
        self.progress.__exit__(None, None, None)
        if self.writer:
            with contextlib.suppress(OSError) if kind else self.naming():
                self.writer.close()
        threading.excepthook = self.report_thread

    def naming(self) -> contextlib.AbstractContextManager[None]:
        """Names the run directory where TensorBoard's events cannot be written."""
        return _naming(self.path.parent)

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
        self._show(values, step)
        if "rankme" in values:  # by its line in the file an evaluation counts as done: it must be shown by then
            self.flush()
        refuse_replaced(self.path.parent)
        with _naming(self.path):
            append_metrics(self.path, {"step": step, "epoch": round(step / self.plan.steps_per_epoch, 4), **values})
        place = f"epoch {step / self.plan.steps_per_epoch:.1f}/{self.plan.epochs}"
        telling = "rankme" in values or step == self.plan.total_steps
        self.progress.update(step, place, self._figures(values), line_now=telling)

    def _show(self, values: dict[str, float], step: int) -> None:
        with self.naming():
            for name, value in values.items() if self.writer else ():
                self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        if self.writer:
            with self.naming():
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


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names what could not be written: errors of a full disk do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"log not written: {error.strerror}", str(path)) from error


def _report_unless_raised(report: Callable, failure: threading.ExceptHookArgs) -> None:
    if not (issubclass(failure.exc_type, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
        report(failure)


def move_events_back(run_dir: Path) -> None:
    """Renames event files so that one which is made now comes last: TensorBoard reads them in the order of their names.

    These begin with the second: a run that continues in the same one, or after the clock was set back, would come too early.
    """
    start = "events.out.tfevents."
    before = f"{start}{int(time.time()) - 1:010}."
    for path in sorted(run_dir.glob(f"{start}*")):
        if path.name >= before:
            path.rename(path.with_name(before + path.name.removeprefix(start)))
