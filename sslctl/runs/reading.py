"""The one reader of a run's files: what it returns fits the schema, and what does not is named by file, line and reason."""

import functools
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sslctl.config.command_line import shell_words
from sslctl.errors import InputError
from sslctl.ops.special_files import SpecialFile, refuse_special
from sslctl.runs.checksums import KEY, check_json, check_yaml
from sslctl.runs.directory import CONFIG, ENVIRONMENT, PREPROCESS, STOPPED, holds_run
from sslctl.runs.schema import CONFIG_KEYS, ENVIRONMENT_KEYS, STOPPED_KEYS, misfit, preprocess_keys

_MOST_VALUES = 100_000  # of a configuration
# What PyYAML raises on a text that is no YAML, or YAML of no plain values: it has no exception of its own for all of it.
_NO_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class Damaged(InputError):
    """A file of a run that is not what was written there. line: counted from 1; None for the whole file."""

    def __init__(self, path: Path, reason: str, line: int | None = None, *, repairable: bool = True):
        self.path, self.reason, self.line = path, " ".join(reason.split()), line
        self.repairable = repairable and holds_run(path.parent)
        command = [repair_command(path.parent)] if self.repairable else []
        what_to_do = "".join(f"; {words} sets aside what cannot be read" for words in command)
        super().__init__(f"{self.describe()}{what_to_do}", advice=command)

    def describe(self) -> str:
        """Returns file, line and reason, without advice."""
        return f"{self.path}{f' line {self.line}' if self.line else ''}: {self.reason}"


def run_word(run: Path) -> str:
    """Returns a run as a word of a command line."""
    word = f"./{run}" if str(run).startswith("-") else str(run)
    return f"ckpt={word}" if "=" in word else word


def repair_command(run: Path) -> str:
    """Returns the command that repairs a run, for a shell."""
    return shell_words(["sslctl", "runs", run_word(run), "repair=true"])


# --- Whole files ---


def read_config(run: Path) -> dict:
    """Reads config.yaml, as plain values. Raises Damaged, as all of these."""
    path = run / CONFIG
    text = _text(path)
    try:
        check_yaml(text)
        config = _copied(_yaml_value(text))
    except _NO_YAML as error:
        raise Damaged(path, str(error), _line_of(error)) from error
    return _fitting(path, config, CONFIG_KEYS)


@functools.lru_cache(16)  # parsing takes longer than all else, and a command asks several times
def _yaml_value(text: str) -> Any:
    return yaml.safe_load(text)


def _copied(value: Any, left: list[int] | None = None) -> Any:
    """Copies plain values, each as often as it is named: by aliases of aliases, few lines of YAML may name billions."""
    left = [_MOST_VALUES] if left is None else left
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"more than {_MOST_VALUES:,} values")
    if isinstance(value, dict):
        return {key: _copied(inner, left) for key, inner in value.items()}
    return [_copied(inner, left) for inner in value] if isinstance(value, list) else value


def read_environment(run: Path) -> dict:
    """Reads environment.json: where and how the run was started, and the facts of its training."""
    environment = _fitting(run / ENVIRONMENT, _json(run / ENVIRONMENT), ENVIRONMENT_KEYS)
    for name in ("batch_size", "steps_per_epoch", "total_steps"):
        if environment["facts"][name] < 1:
            raise Damaged(run / ENVIRONMENT, f"facts.{name}: expected at least 1, found {environment['facts'][name]}")
    return environment


def read_preprocess(run: Path) -> dict:
    """Reads preprocess.json: what the run's backbone expects of a sample."""
    saved = _json(run / PREPROCESS)
    return _fitting(run / PREPROCESS, saved, preprocess_keys(saved))


def read_stopped(run: Path) -> str | None:
    """Reads why training ended early, None where it did not."""
    if not os.path.lexists(run / STOPPED):
        return None
    return _fitting(run / STOPPED, _json(run / STOPPED), STOPPED_KEYS)["reason"]


def _fitting(path: Path, value: Any, schema: dict) -> dict:
    if value is None:
        raise Damaged(path, "empty")
    if reason := misfit(value, schema):
        raise Damaged(path, reason)
    return value


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return _parsed(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise Damaged(path, _reason(error), getattr(error, "lineno", None)) from error


def _parsed(text: str) -> Any:
    """Returns a JSON value without its checksum. Raises ValueError where there is none, or its checksum differs."""
    value = json.loads(check_json(text))
    if isinstance(value, dict) and KEY in value:  # what is left of one
        raise ValueError(f'not as it was written: "{KEY}" is {value[KEY]!r}')
    return value


def _bytes(path: Path) -> bytes:
    try:
        refuse_special(path)
        return path.read_bytes()
    except FileNotFoundError as error:
        reason = "missing; the command that started the run writes it again"
        raise Damaged(path, reason, repairable=False) from error
    except IsADirectoryError as error:
        raise Damaged(path, "a directory is in its place") from error
    except SpecialFile as error:
        raise Damaged(path, str(error.strerror)) from error
    except OSError as error:
        reason = f"cannot be read: {error.strerror}; ask its owner, or work with a copy"
        raise Damaged(path, reason, repairable=False) from error


def _text(path: Path) -> str:
    content = _bytes(path)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Damaged(path, f"byte {error.start} is no UTF-8", content[: error.start].count(b"\n") + 1) from error


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "no UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _line_of(error: Exception) -> int | None:
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark else None


# --- Files of lines ---


@dataclass
class Lines:
    """A file of JSON lines. texts: those that can be read, as they are, without their ends; records: what they hold.

    cut: the last line, where a kill has cut it off. ends_open: whether it is whole, and its end alone is missing.
    """

    texts: list[bytes] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)
    damages: list[Damaged] = field(default_factory=list)
    cut: bytes = b""
    ends_open: bool = False


class CutLine(UserWarning):
    """Warns of a file whose last line is not whole, as a kill leaves it."""


def lines_of(path: Path, read: Callable[[Any], Any]) -> Lines:
    """Reads every line that can be read. read: makes a record of a parsed line, or raises ValueError with a reason.

    Raises Damaged where the file itself cannot be read. None is there where there is no such file.
    """
    result = Lines()
    if not os.path.lexists(path):
        return result
    *whole, last = _bytes(path).split(b"\n")
    for number, line in enumerate([*whole, last], start=1):
        if not line.strip():
            continue
        try:
            record = read(_parsed(line.decode()))
        except (ValueError, RecursionError) as error:
            if number > len(whole) and _is_cut(line):
                result.cut = line
            else:
                result.damages.append(Damaged(path, _reason(error), number))
        else:
            result.texts.append(line)
            result.records.append(record)
            result.ends_open = number > len(whole)
    return result


def _is_cut(line: bytes) -> bool:
    """Tells whether a line can be the beginning of an object's, cut off by a kill."""
    if not (line.startswith(b'{"') or b'{"'.startswith(line)) or not line.isascii() or not line.decode().isprintable():
        return False
    try:
        json.JSONDecoder().raw_decode(line.decode())
    except (ValueError, RecursionError):
        return True
    return False  # a whole one, with more behind it


def read_lines(path: Path, read: Callable[[Any], Any] = lambda value: value) -> list[Any]:
    """Returns what the lines of a file hold, a last one that a kill cut off left out, with a warning. Raises Damaged with the
    first that cannot be read. See `lines_of`."""
    lines = lines_of(path, read)
    if lines.damages:
        raise lines.damages[0]
    if lines.cut:
        warnings.warn(f"{path}: its last line is cut off, and left out", CutLine, stacklevel=2)
    return lines.records
