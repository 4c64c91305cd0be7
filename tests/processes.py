"""sslctl in processes of its own, forked from a server that has imported everything: a command, or several of a group."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from sslctl import distributed
from sslctl.cli import main
from sslctl.commands import _pretrain_process
from sslctl.training import launch
from tests.runs import REPOSITORY, pretrain

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.preloaded"])

# --- One process ---


def start_python(
    words: list[str], folder: Path, environment: dict[str, str] | None = None, module: str = "sslctl"
) -> subprocess.Popen:
    """`python -m sslctl …` in a process group of its own; its output goes to folder/output."""
    with (folder / "output").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=folder,
            env=_environment(folder, environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _environment(folder: Path, more: dict[str, str] | None) -> dict[str, str]:
    own = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    return os.environ | own | (more or {})


class Command:
    """`sslctl …` as start_python starts it, forked from the server instead: saves the four seconds that imports take."""

    def __init__(self, words: list[str], folder: Path, environment: dict[str, str] | None = None):
        (folder / "output").touch()
        (folder / "started").unlink(missing_ok=True)  # it comes when the command begins
        self._process = _SERVER.Process(target=_command, args=(words, folder, _environment(folder, environment)))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status, or minus the number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end, at most so many seconds; returns poll()."""
        self._process.join(timeout)
        assert self.poll() is not None, f"it still runs after {timeout} s"
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Does nothing when it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _command(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of its loader's workers, as in a process of its own
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # that of the environment
    output = os.open("output", os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    sys.argv = ["sslctl", *words]
    (folder / "started").touch()
    launch.start = Forked
    sys.exit(main(words))


start = Command


class Forked:
    """What sslctl.training.launch.start gives, forked from the command, which has imported everything and has not trained."""

    def __init__(self, job: Path, place: dict[str, str], watched: int, errors: Any):
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            try:
                self._work(job, place, watched, errors)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)

    @staticmethod
    def _work(job: Path, place: dict[str, str], watched: int, errors: Any) -> None:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if errors:
            os.dup2(errors.fileno(), 2)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor not in (0, 1, 2, watched, nothing):
                with contextlib.suppress(OSError):  # that of the listing
                    os.dup2(nothing, descriptor)
        os.environ.update(place)
        _pretrain_process.main(json.loads(job.read_text()))

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):  # a signal's handler has asked in between
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def call(words: list[str], folder: Path, environment: dict[str, str] | None = None) -> int:
    """A command to its end; returns the exit status."""
    return start(words, folder, environment).wait(timeout=120)


def status_of(function: Callable, *arguments: Any) -> int:
    """The exit status of a module's function in a process of its own; minus the number of the signal that ends it."""
    process = _SERVER.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def ended_by(function: Callable, *arguments: Any) -> int:
    """The number of the signal that ends a module's function in a process of its own; 0 for none."""
    return -min(status_of(function, *arguments), 0)


def wait_until(condition: Callable[[], Any], process: Command | None = None, seconds: float = 60) -> None:
    """Waits for a condition; fails when the process ends before it, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"the process ended with status {process.returncode}"
        assert time.monotonic() < deadline, f"still waiting after {seconds} s"
        time.sleep(0.02)


def logged_steps(run_dir: Path) -> int:
    """The last step that a living run has logged."""
    path = run_dir / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+)', path.read_text()) if path.exists() else []
    return int(steps[-1]) if steps else 0


# --- Several processes ---


def in_processes(
    function: Callable, *arguments: Any, count: int = 2, seconds: float = 60, patience: float = 60
) -> list[Any]:
    """What a module's function returns in each of so many gloo processes; fails where one of them raises or hangs.

    patience: seconds that one waits for another.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(rank) for rank in range(count)]
        workers = [
            _SERVER.Process(target=_work, args=(place, rank, count, patience, function, arguments))
            for rank, place in enumerate(places)
        ]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + seconds
        for worker in workers:
            worker.join(max(0, deadline - time.monotonic()))
        hanging = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        for worker in workers:
            worker.kill()
            worker.join()
        assert not hanging, f"processes {hanging} still run after {seconds} s"
        outcomes = [torch.load(place, weights_only=False) for place in places]
    errors = [f"process {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    assert not errors, "\n".join(errors)
    return [value for value, _ in outcomes]


def _work(place: Path, rank: int, count: int, patience: float, function: Callable, arguments: tuple) -> None:
    multiprocessing.set_start_method("fork", force=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ["SSLCTL_RENDEZVOUS"] = f"file://{place.parent}/rendezvous"
    os.chdir(place.parent)
    torch.set_num_threads(1)
    value = error = None
    try:
        distributed.join("cpu", timedelta(seconds=patience))
        value = function(*arguments)
    except BaseException:
        error = traceback.format_exc()
    torch.save((value, error), place)


def said_by_pretrain(run_dir: Path, *overrides: str, stop_after: int | None = None) -> tuple[int, str]:
    """A tiny run in one of several processes: its exit status and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        status = pretrain(run_dir, *overrides, stop_after=stop_after)
    return status, printed.getvalue()


def pretrain_in(processes: int, run_dir: Path, *overrides: str, stop_after: int | None = None) -> str:
    """Runs or continues a tiny run in so many processes; returns what the first printed.

    stop_after: a SIGTERM arrives in all of them while this step (counted from 1) is being calculated.
    """
    outcomes = in_processes(_pretrain, run_dir, overrides, stop_after, count=processes)
    assert {status for status, _ in outcomes} == {143 if stop_after else 0}, outcomes
    return outcomes[0][1]


def _pretrain(run_dir: Path, overrides: tuple[str, ...], stop_after: int | None) -> tuple[int, str]:
    return said_by_pretrain(run_dir, *overrides, stop_after=stop_after)


def children_of(parent: int) -> list[int]:
    """The process ids of those that a process has started and that are there, in the order in which it did."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return []


def running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
