"""trainer.processes=N: the processes of one run on this machine, started, watched and ended together."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from sslctl.config.targets import allowed_by_user

_GRACE_SECONDS = 10  # for the others to notice that one is gone


class ProcessFailed(RuntimeError):
    """One of the processes ended early. Its own message, where it has one, is part of this one."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def launch(config: dict[str, Any], command: str, processes: int) -> int:
    """Runs `sslctl pretrain` with a resolved configuration in so many processes; returns 0, 130 or 143.

    Signals to this process go on to all of them. When one fails, the others are ended. Raises ProcessFailed.
    """
    with tempfile.TemporaryDirectory(prefix="sslctl-processes-") as scratch, contextlib.ExitStack() as stack:
        job = Path(scratch) / "job.json"
        job.write_text(json.dumps({"config": config, "command": command, "allow": allowed_by_user(), "path": sys.path}))
        watched, kept_open = os.pipe()  # the processes end when the other end closes, that is when this one dies
        stack.callback(os.close, kept_open)
        children: list[subprocess.Popen] = []
        # Signals are forwarded from before the first process is there; one that is being started then gets them below.
        with _forwarded(children) as sent:
            for rank in range(processes):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "SSLCTL_PARENT": watched}
                place |= {"SSLCTL_RENDEZVOUS": f"file://{scratch}/rendezvous", "SSLCTL_FAILED": f"{scratch}/failed"}
                errors = stack.enter_context((Path(scratch) / f"errors-{rank}").open("w+")) if rank else None
                child = subprocess.Popen(
                    [sys.executable, "-m", "sslctl.commands._pretrain_process", str(job)],
                    env=os.environ | {name: str(value) for name, value in place.items()},
                    pass_fds=(watched,),
                    stderr=errors,
                    start_new_session=True,  # Ctrl-C reaches them through this process, once
                )
                children.append(child)
                if sent:
                    child.send_signal(sent[0])
            os.close(watched)
            first = _wait(children)
        if first is not None and sent and not (Path(scratch) / "failed").exists():  # before they could listen
            return 128 + sent[0]
        return _verdict(children, first, Path(scratch))


@contextlib.contextmanager
def _forwarded(children: list[subprocess.Popen]):
    """Sends SIGTERM and SIGINT on to all children while it lasts, instead of obeying them. Yields the list of those that came."""
    sent = []

    def forward(number: int, _) -> None:
        sent.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT)} if main else {}
    try:
        yield sent
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen]) -> int | None:
    """Waits for all; when one fails the others get a few seconds. Returns the number of the first that failed."""
    first, deadline, alive = None, None, True
    while alive:
        alive = any(child.poll() is None for child in children)
        if first is None:
            failed = [r for r, c in enumerate(children) if c.returncode not in (None, 0, 130, 143)]
            first = min(failed, key=lambda r: children[r].returncode, default=None)  # a signal's is negative: the cause
            deadline = time.monotonic() + _GRACE_SECONDS
        elif time.monotonic() > deadline:
            for child in children:
                child.kill()
        if alive:
            time.sleep(0.05)
    return first


def _verdict(children: list[subprocess.Popen], first: int | None, scratch: Path) -> int:
    if first is None:
        return max(child.returncode for child in children)
    status = children[first].returncode
    if status < 0:
        raise ProcessFailed(
            f"process {first} was killed by {signal.Signals(-status).name}; the same command continues the run", 1
        )
    if (scratch / "failed").exists():  # ends are seen in no sure order: the others fail for want of the first to fail
        first = int((scratch / "failed").read_text())
        status = max(1, children[first].returncode)
    if first == 0 or children[0].returncode == status == 2:  # its message is on the terminal already
        raise ProcessFailed("", status)
    errors = (scratch / f"errors-{first}").read_text().strip().splitlines()
    errors = [line.removeprefix("sslctl: ") for line in errors if line.startswith("sslctl: ")] or errors[-1:]
    raise ProcessFailed("\n".join([f"process {first} failed:", *errors]), status)
