"""How far a long job is, for whoever is watching: a bar on a terminal, lines elsewhere, both with the time that is left."""

import sys
import time

from sslctl.errors import say

_LINE_EVERY = 10  # seconds


class Progress:
    """Shows how much of `total` is done; a context manager. done: what was done before it began, which took none of its time."""

    def __init__(self, total: int, done: int = 0, *, transient: bool = False):
        self.total, self.done_before = total, done
        self.began = self.last_line = time.monotonic()
        self.bar = _bar(total, done, transient) if sys.stdout.isatty() else None

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int, place: str, figures: str = "", *, line_now: bool = False) -> None:
        """Moves the bar, or prints a line where the last one is long ago. place: `done` in words, which a bar shows by itself.

        line_now: prints the line in any case; that of the end is not printed otherwise.
        """
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=done, words=figures)
        elif line_now or (done < self.total and now - self.last_line >= _LINE_EVERY):
            self.last_line = now
            say("  " + "  ".join(part for part in (place, figures, self._left(done, now)) if part))

    def _left(self, done: int, now: float) -> str:
        if done == self.done_before or done == self.total:
            return ""
        return f"{duration((now - self.began) / (done - self.done_before) * (self.total - done))} left"


def duration(seconds: float) -> str:
    """Formats a time: 93 -> '1:33'; 7384 -> '2:03:04'."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def _bar(total: int, done: int, transient: bool):
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[words]}"), transient=transient)
    bar.add_task("", total=total, completed=done, words="")
    return bar
