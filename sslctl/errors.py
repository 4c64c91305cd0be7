"""The errors that end a command with a short message, and the nearest right word for them."""

import difflib
import os
import typing
from pathlib import Path
from typing import Any, TextIO


class Stopped(BaseException):
    """A run that a signal stopped after saving. Not an Exception: it ends a sweep as well."""

    def __init__(self, status: int):
        super().__init__(f"stopped by a signal, status {status}")
        self.status = status


class InputError(Exception):
    """Bad input, found before the first step: one or several short messages, exit status 2.

    advice: what the messages tell to say: words to add to the command, or whole commands (sslctl …). Tests execute it.
    """

    def __init__(self, *messages: str, advice: typing.Iterable[str] = ()):
        super().__init__("\n".join(messages))
        self.messages, self.advice = messages, tuple(advice)


def user_path(text: Any) -> Path:
    """Expands a path as a user writes it; ~ of a user who does not exist stays as it is.

    Raises InputError for what no file system takes for a name, which every look at it would fail on.
    """
    path = os.path.expanduser(str(text))
    try:
        longest = max(len(part) for part in os.fsencode(path).split(b"/"))
    except UnicodeEncodeError:
        raise InputError(f"{shown(path)}: not a name that a file can have") from None
    if "\0" in path or longest > _LONGEST_NAME:
        raise InputError(f"{shown(path)[:40]}…: not a name that a file can have, it has {longest} bytes")
    return Path(path)


_LONGEST_NAME = 255  # bytes, on Linux and macOS


def shown(text: Any) -> str:
    """Returns a text as one line of what can be seen: control characters, which a terminal would obey, as escapes (\\x1b)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def say(*lines: Any, file: TextIO | None = None) -> None:
    """Prints lines at once, each as `shown`: there may be a name of a file in any."""
    if lines:
        print(*map(shown, lines), sep="\n", file=file, flush=True)


def first_line(error: BaseException) -> str:
    """Returns what an error says first, or its kind where it says nothing. The network's and the system's: without numbers."""
    error = getattr(error, "reason", None) if isinstance(getattr(error, "reason", None), OSError) else error
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def reason_of(error: BaseException) -> str:
    """Returns in a line why something failed, for a message that names it already: of the system's errors no number, no path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def nearest(word: str, choices: typing.Iterable[str]) -> str:
    """Returns ' (nearest: …)' for a message, or '' when no choice is near."""
    near = difflib.get_close_matches(word, sorted(choices), n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""
