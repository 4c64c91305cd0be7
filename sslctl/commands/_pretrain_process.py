"""One process of trainer.processes=N, as sslctl.training.launch starts it."""

import ctypes
import os
import signal
import sys
import threading
from typing import Any

from sslctl.config.literal import as_config
from sslctl.config.targets import allow
from sslctl.ending import end, guarded
from sslctl.ops.allocator import keep_freed_memory

_PR_SET_PDEATHSIG = 1  # of Linux


def end_with_parent() -> None:
    """Sees to it that this process, and with it its loader workers, is killed when the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # reaches one that is stopped, too
    descriptor = int(os.environ["SSLCTL_PARENT"])

    def watch() -> None:
        os.read(descriptor, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(job: dict[str, Any]) -> None:
    """Does the job that the parent process wrote down, and ends the process with its status."""
    end_with_parent()

    def work() -> None:

        from sslctl.commands.pretrain import pretrain

        allow(job["allow"], [])
        keep_freed_memory()  # as the command line does for a verb
        pretrain(as_config(job["config"]), job["command"])

    end(guarded(work))
