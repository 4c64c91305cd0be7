"""Signals that stop a run after the step it is in.

A handler belongs to the whole process, so does what it notes: `check()` may be called from any depth of a long calculation.
"""

import signal
import sys
import threading
from typing import ClassVar


class Interrupted(Exception):
    """A signal arrived in a long calculation outside the steps; the weights are saved already."""


class Signals:
    """While this context lasts, SIGTERM and SIGINT only note their exit status; a second Ctrl-C ends the process at once.

    status: 0, or 130 or 143 after a signal.
    """

    STATUS: ClassVar = {signal.SIGINT: 130, signal.SIGTERM: 143}
    current: "ClassVar[Signals | None]" = None

    def __init__(self) -> None:
        self.status = 0

    def __enter__(self) -> "Signals":
        main = threading.current_thread() is threading.main_thread()
        self.handlers_before = {s: signal.signal(s, self._note) for s in self.STATUS} if main else {}
        self.enclosing, Signals.current = Signals.current, self
        return self

    def __exit__(self, *_) -> None:
        Signals.current = self.enclosing
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if number == signal.SIGINT and self.status == 130:
            raise KeyboardInterrupt
        self.status = self.STATUS[signal.Signals(number)]
        print("\nsslctl: stopping after this step (Ctrl-C again to stop at once)", file=sys.stderr, flush=True)


def check() -> None:
    """Raises Interrupted when a signal has arrived. Loops of a second and more outside the training steps call it."""
    if Signals.current and Signals.current.status:
        raise Interrupted
