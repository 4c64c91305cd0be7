"""One process of trainer.processes=N: `python -m sslctl.commands._pretrain_process JOB`, as sslctl.training.launch starts it."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

from omegaconf import OmegaConf

from sslctl.cli import end, guarded
from sslctl.config.targets import allow
from sslctl.ops.allocator import keep_freed_memory


def _end_with_parent() -> None:
    """Kills this process, and with it its loader workers, when the one that started it is gone."""
    descriptor = int(os.environ["SSLCTL_PARENT"])

    def watch() -> None:
        os.read(descriptor, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def child(path: str) -> None:
    """Does the job that the parent process wrote down."""
    from sslctl.commands.pretrain import pretrain

    job = json.loads(Path(path).read_text())
    sys.path.extend(entry for entry in job["path"] if entry not in sys.path)
    allow(job["allow"], [])
    keep_freed_memory()  # as the command line does for a verb
    pretrain(OmegaConf.create(job["config"]), job["command"])


if __name__ == "__main__":
    _end_with_parent()
    end(guarded(lambda: child(sys.argv[1])))
