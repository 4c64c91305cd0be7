"""trainer.processes=N: the processes of one run on this machine, started, watched and ended together."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sslctl.config.targets import allowed_by_user
from sslctl.runs.scratch import scratch_folder
from sslctl.signals import REQUEUE, STATUS, TO_BE_CONTINUED

_GRACE_SECONDS = 10  # for the others to notice that one has failed
_LAST_SECONDS = 60  # for the others to end as one has ended
_STATUS = (0, *STATUS.values(), TO_BE_CONTINUED)  # of a process that has ended well
# The process imports what this one does, from the same places: -m alone would look into the current directory first.
_PROGRAM = """
import json, sys
with open(sys.argv[1]) as opened:
    job = json.load(opened)
sys.path[:] = job["path"]
from sslctl.commands import _pretrain_process
_pretrain_process.main(job)
"""


class ProcessFailed(RuntimeError):
    """One of the processes ended early. Its own message, where it has one, is part of this one."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def launch(config: dict[str, Any], command: str, processes: int) -> int:
    """Runs `sslctl pretrain` with a resolved configuration in so many processes; returns 0, or that of a signal.

    Signals to this process go on to all of them. When one fails, the others are ended. Raises ProcessFailed.
    """
    with scratch_folder("processes") as scratch, contextlib.ExitStack() as stack:
        job = scratch / "job.json"
        job.write_text(json.dumps({"config": config, "command": command, "allow": allowed_by_user(), "path": sys.path}))
        pipe_end, kept_open = os.pipe()  # the processes end when the other end closes, that is when this one dies
        stack.callback(os.close, kept_open)
        group = _Group(scratch)
        # Signals are heeded from before the first process is there.
        with group.heeding_signals(config["trainer"]["requeue_signal"]):
            for rank in range(processes):
                if group.cut_short:
                    break
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "SSLCTL_PARENT": pipe_end}
                place |= {"SSLCTL_RENDEZVOUS": f"file://{scratch}/rendezvous", "SSLCTL_NOTES": scratch}
                errors = stack.enter_context((scratch / f"errors-{rank}").open("w+")) if rank else None
                group.children.append(start(job, {name: str(value) for name, value in place.items()}, pipe_end, errors))
            os.close(pipe_end)
            group.wait()
        return group.status()


def start(job: Path, place: dict[str, str], pipe_end: int, errors: Any) -> subprocess.Popen:
    """Starts one process. place: its environment's part that says which it is; errors: a file for its messages, if any."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM, str(job)],
        env=os.environ | place,
        pass_fds=(pipe_end,),
        stderr=errors,
        start_new_session=True,  # Ctrl-C reaches them through this process, once
    )


class _Group:
    """The processes of a run, and what becomes of them."""

    def __init__(self, scratch: Path):
        self.scratch, self.children, self.signals = scratch, [], []
        self.first_failed: int | None = None  # the number of the process that is why the others ended
        self.cut_short = False  # by a signal that could not wait for a step
        self.left_others: int | None = None  # the status of one that ended without the others, which then were killed

    @contextlib.contextmanager
    def heeding_signals(self, requeue: str | None):
        """While it lasts SIGTERM, SIGINT and the one that asks for a requeue are for the processes."""
        main = threading.current_thread() is threading.main_thread()
        numbers = (*STATUS, *([REQUEUE[requeue]] if requeue else []))
        before = {number: signal.signal(number, self._pass_on) for number in numbers} if main else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, _) -> None:
        """Passes a signal on when all processes stop by it after their step; else there is no step, and all are ended.

        One that starts up would die of the signal or miss it, and leave the others waiting. A second Ctrl-C ends all, too.
        """
        self.signals.append(number)
        self.cut_short = self.cut_short or not self._listens() or self.signals.count(signal.SIGINT) > 1
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if self.cut_short else number)

    def _listens(self) -> bool:
        marks = [self.scratch / f"listening-{rank}" for rank in range(max(1, len(self.children)))]
        return all(mark.exists() for mark in marks)

    def wait(self) -> None:
        """Waits for all; when one has ended the others get a while, a short one where it has failed."""
        deadline = None
        while None in (statuses := [child.poll() for child in self.children]):
            exit_statuses = [status for status in statuses if status is not None]
            if self.first_failed is self.left_others is None and not set(exit_statuses) <= set(_STATUS):
                self.first_failed, deadline = _worst(statuses), time.monotonic() + _GRACE_SECONDS
            elif exit_statuses and deadline is None:
                deadline = time.monotonic() + _LAST_SECONDS
            if self.cut_short or (deadline and time.monotonic() > deadline):
                if self.first_failed is self.left_others is None:
                    self.left_others = max(exit_statuses, default=0)
                for child in self.children:
                    child.kill()
            time.sleep(0.05)

    def status(self) -> int:
        """Returns the exit status of all when they have ended, or raises ProcessFailed."""
        statuses = [child.returncode for child in self.children]
        if self.cut_short or any(-number in statuses for number in self.signals):
            return STATUS.get(self.signals[-1], TO_BE_CONTINUED)
        if self.left_others:
            return self.left_others
        if set(statuses) <= set(_STATUS):
            return max(statuses)
        first = _worst(statuses) if self.first_failed is None else self.first_failed
        status, note = statuses[first], self.scratch / "failed"
        if status < 0:
            raise ProcessFailed(
                f"process {first} was killed by {signal.Signals(-status).name}; the same command continues the run", 1
            )
        if note.exists():  # ends are seen in no sure order: the others fail for want of the first to fail
            first = int(note.read_text())
            status = max(1, statuses[first])
        if first == 0 or statuses[0] == status == 2:  # its message is on the terminal already
            raise ProcessFailed("", status)
        errors = (self.scratch / f"errors-{first}").read_text().strip().splitlines()
        errors = [line.removeprefix("sslctl: ") for line in errors if line.startswith("sslctl: ")] or errors[-1:]
        raise ProcessFailed("\n".join([f"process {first} failed:", *errors]), status)


def _worst(statuses: list[int | None]) -> int:
    """Returns the number of the process that failed, of several the one that a signal ended: that is the cause."""
    return min(range(len(statuses)), key=lambda rank: (statuses[rank] in (None, *_STATUS), statuses[rank] or 0))
