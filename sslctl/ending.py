"""How a command ends: what it raises becomes a short message and an exit status."""

import functools
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from sslctl.errors import InputError, Stopped, first_line, shown

_MOST_LINES, _LONGEST_LINE = 12, 2_000  # of a message: what is longer is read by nobody, but a command must be whole
_LONG_WORD = re.compile(r"([^\s/,:]{100})[^\s/,:]{156,}")  # longer than any file's name


def guarded(work: Callable[[], int | None]) -> int:
    """Does some work and returns its exit status, 0 for None; what it raises becomes a short message and a status."""
    python = warnings.formatwarning
    warnings.formatwarning = functools.partial(_worded, python)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        return work() or 0
    except InputError as error:
        return refuse(error)
    except Stopped as stop:
        return stop.status
    except KeyboardInterrupt:
        print("\nsslctl: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return fail(error)
    finally:
        warnings.formatwarning = python


def _worded(python: Callable, message: Warning, category: type[Warning], *place: Any) -> str:
    """Formats a warning of sslctl's own without the place in its code, others as Python shows them."""
    if category.__module__.startswith("sslctl."):
        return f"sslctl: {shown(message)}\n"
    return python(message, category, *place)


def refuse(error: InputError) -> int:
    """Says what is wrong with the input, and returns the status of that."""
    report(error)
    return 2


def fail(error: Exception) -> int:
    """Says what went wrong, and returns its status."""
    if str(error) or not hasattr(error, "status"):  # without a message: another process has given it
        report(error)
    return status_of(error)


def status_of(error: Exception) -> int:
    """Returns 2 for the user's mistake, else what the error says of itself, or 1."""
    return 2 if isinstance(error, InputError) else getattr(error, "status", 1)


def report(error: Exception, prefix: str = "") -> None:
    """Prints an error's message, shortened, one line of sslctl's each; with SSLCTL_DEBUG its traceback too."""
    if os.environ.get("SSLCTL_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, OSError):
        lines = [first_line(error)]
    else:
        lines = error.messages if isinstance(error, InputError) else str(error).split("\n")
    lines = [shown(line) for line in lines if line.strip()] or [type(error).__name__]
    if not isinstance(error, InputError | RuntimeError | OSError | ValueError | TypeError):
        lines[0] = f"{type(error).__name__}: {lines[0]}"
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES - 1 :] = [f"… and {len(lines) - _MOST_LINES + 1} more"]
    for line in lines:
        line = _LONG_WORD.sub(r"\1 …", line)
        line = line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} …"
        print(f"sslctl: {shown(prefix)}{line}", file=sys.stderr)


def end(status: int) -> None:
    """Ends this process. One of several goes at once: what torch's threads do while Python winds up may end in an abort."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
