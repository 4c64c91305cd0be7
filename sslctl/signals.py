"""Signals that stop a run after the step it is in.

A handler belongs to the whole process, so does what it notes: `check()` may be called from any depth of a long calculation.
"""

import signal
import sys
import threading
from typing import ClassVar


class Interrupted(Exception):
    """A signal arrived in a long calculation outside the steps; the weights are saved already."""


TO_BE_CONTINUED = 75  # EX_TEMPFAIL: the exit status of a run that wants to be started again
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
REQUEUE = {"USR1": signal.SIGUSR1, "USR2": signal.SIGUSR2}  # what schedulers send before a job's time is over


class Signals:
    """While this context lasts, SIGTERM and SIGINT only note their exit status; a second Ctrl-C ends the process at once.

    status: 0, or 130 or 143 after a signal. requeue: USR1 or USR2, which then notes TO_BE_CONTINUED.
    """

    current: "ClassVar[Signals | None]" = None

    def __init__(self, requeue: str | None = None) -> None:
        self.status = 0
        self.statuses = STATUS | ({REQUEUE[requeue]: TO_BE_CONTINUED} if requeue else {})

    def __enter__(self) -> "Signals":
        main = threading.current_thread() is threading.main_thread()
        self.handlers_before = {s: signal.signal(s, self._note) for s in self.statuses} if main else {}
        self.enclosing, Signals.current = Signals.current, self
        return self

    def __exit__(self, *_) -> None:
        Signals.current = self.enclosing
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if number == signal.SIGINT and self.status == 130:
            raise KeyboardInterrupt
        self.status = self.statuses[signal.Signals(number)]
        print("\nsslctl: stopping after this step (Ctrl-C again to stop at once)", file=sys.stderr, flush=True)


def check() -> None:
    """Raises Interrupted when a signal has arrived. Loops of a second and more outside the training steps call it."""
    if Signals.current and Signals.current.status:
        raise Interrupted
