"""Signals that stop a run after the step it is in."""

import signal
import sys
import threading
from typing import ClassVar


class Interrupted(Exception):
    """A signal arrived in a long calculation outside the steps; the weights are saved already."""


class Signals:
    """SIGTERM and SIGINT set a flag that long loops look at; a second Ctrl-C ends the process at once."""

    STATUS: ClassVar = {signal.SIGINT: 130, signal.SIGTERM: 143}

    def __init__(self) -> None:
        self.status = 0

    def __enter__(self) -> "Signals":
        main = threading.current_thread() is threading.main_thread()
        self.before = {s: signal.signal(s, self._caught) for s in self.STATUS} if main else {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _) -> None:
        if number == signal.SIGINT and self.status == 130:
            raise KeyboardInterrupt
        self.status = self.STATUS[signal.Signals(number)]
        print("\nsslctl: stopping after this step (Ctrl-C again to stop at once)", file=sys.stderr, flush=True)

    def poll(self) -> None:
        """Raises Interrupted when a signal has arrived."""
        if self.status:
            raise Interrupted
