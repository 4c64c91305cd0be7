"""Work in forked children of a process that has imported everything: a fork begins at once, and what it breaks is its own.

The process itself must never train: autograd's threads are gone in a fork of one that has.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

FAILED = 99  # the status of work that raises


@dataclass(frozen=True)
class Task:
    """Work that returns an exit status. out, err: the files that what it prints is appended to. limit: seconds."""

    name: int
    work: Callable[[], int]
    out: Path
    err: Path
    limit: float


@dataclass(frozen=True)
class Ended:
    """How a task ended: its status, minus the number of the signal that ended it, None past its limit; seconds."""

    name: int
    status: int | None
    seconds: float


def run(tasks: Iterable[Task], jobs: int = 1) -> Iterator[Ended]:
    """Yields how tasks end, as they do, so many at a time. One is taken when there is room for it, and ended with all that it
    has started; so are those that still run when nobody asks any more."""
    fork, waiting = multiprocessing.get_context("fork"), iter(tasks)
    running: dict[BaseProcess, tuple[Task, float]] = {}
    try:
        while True:
            while len(running) < jobs and (task := next(waiting, None)) is not None:
                child = fork.Process(target=_child, args=(task,))
                child.start()
                running[child] = task, time.monotonic()
            if not running:
                return
            multiprocessing.connection.wait([child.sentinel for child in running], timeout=0.2)
            for child, (task, began) in list(running.items()):
                status, seconds = child.exitcode, time.monotonic() - began
                if status is None and seconds < task.limit:
                    continue
                _end(child)
                del running[child]
                yield Ended(task.name, status, seconds)
    finally:
        for child in running:
            _end(child)


def _end(child: BaseProcess) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()  # one that has no group yet
    child.join()


def _child(task: Task) -> None:
    """Does a task in a group of processes of its own, and leaves with its status."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, task.out), (2, task.err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = open(0)  # noqa: SIM115  # not those of whoever forked
    sys.stdout, sys.stderr = (open(number, "w", errors="backslashreplace") for number in (1, 2))  # noqa: SIM115
    status = FAILED
    try:
        status = task.work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
