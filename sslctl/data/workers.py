"""Worker processes of a loader: what they deliver, how they end, and how one that dies is reported."""

import contextlib
import functools
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from sslctl.data import files
from sslctl.errors import reason_of

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def fetching(loader: DataLoader) -> Iterator[Iterator]:
    """Gives what a loader fetches; its workers end with the block.

    They ignore SIGTERM, so that an exception which keeps the iterator alive would leave the interpreter waiting for
    them at its exit. torch has no public way to end them.
    """
    report = sys.unraisablehook
    sys.unraisablehook = functools.partial(report_unless_noticed, report)
    before = multiprocessing.active_children()
    with _held_back():
        iterator = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    try:
        yield map(raise_if_error, _naming_the_dead(iterator, workers) if loader.num_workers else iterator)
    finally:
        if loader.num_workers:
            iterator._shutdown_workers()
        sys.unraisablehook = report


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Holds signals back, also from the workers that begin here: none reaches one before it ignores them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _naming_the_dead(iterator: Iterator, workers: list[BaseProcess]) -> Iterator:
    """Yields what workers deliver; a connection that breaks off within a batch is a worker's death, in torch's words."""
    try:
        yield from iterator
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        for worker in workers:
            worker.join(1)  # a moment to end
        dead = ", ".join(str(worker.pid) for worker in workers if not worker.is_alive())
        raise RuntimeError(f"DataLoader worker (pid {dead}) died: {reason_of(error)}") from error


def report_unless_noticed(report: Callable, failure: "sys.UnraisableHookArgs") -> None:
    """Reports what is raised where nothing can catch it, but for a worker's death: torch raises it at any place, and again where
    a batch of that worker is waited for. One that has nothing more to deliver is not missed."""
    if not (issubclass(failure.exc_type, RuntimeError) and str(failure.exc_value).startswith("DataLoader worker (pid")):
        report(failure)


def ignore_signals(worker: int) -> None:
    """Leaves signals to the main process, and its death to whoever sees it: a thread that serves it would show a traceback."""
    sys.excepthook = functools.partial(report_unless_cut_off, sys.excepthook)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


def report_unless_cut_off(report: Callable, kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        report(kind, error, trace)


# A bad image comes out of a worker as a value: raised there, torch would wrap its one line in a traceback.


def raise_if_error(batch):
    """Returns a batch; raises the ImageError that stands in its place."""
    if isinstance(batch, files.ImageError):
        raise batch
    return batch
