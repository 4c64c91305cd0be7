"""The errors that end a command with a short message, and the nearest right word for them."""

import difflib
import os
import typing
from pathlib import Path
from typing import Any


class Stopped(BaseException):
    """A run that a signal stopped after saving. Not an Exception: it ends a sweep as well."""

    def __init__(self, status: int):
        super().__init__(f"stopped by a signal, status {status}")
        self.status = status


class InputError(Exception):
    """Bad input, found before the first step: one or several short messages, exit status 2."""

    def __init__(self, *messages: str):
        super().__init__("\n".join(messages))
        self.messages = messages


def user_path(text: Any) -> Path:
    """Expands a path as a user writes it; ~ of a user who does not exist stays as it is."""
    return Path(os.path.expanduser(str(text)))


def shown(text: Any) -> str:
    """Returns a text as one line of what can be seen: control characters, which a terminal would obey, as escapes (\\x1b)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def first_line(error: BaseException) -> str:
    """Returns what an error says first, or its kind where it says nothing."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def nearest(word: str, choices: typing.Iterable[str]) -> str:
    """Returns ' (nearest: …)' for a message, or '' when no choice is near."""
    near = difflib.get_close_matches(word, sorted(choices), n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""
