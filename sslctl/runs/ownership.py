"""What in a directory is sslctl's own: a run by its marker, a checkpoint by its manifest. Nothing else is ever deleted.

A run directory is marked before anything else is written to it. What a kill before that leaves is nothing but the lock
and the two temporary files of `_BEGINNINGS`; a directory of these alone counts as empty.
"""

import contextlib
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

from sslctl.errors import InputError, say
from sslctl.ops.special_files import refuse_special
from sslctl.runs.atomic import PROBE, UNFINISHED, free_name, remove_unfinished, write_text
from sslctl.runs.manifest import MANIFEST, STATE, WEIGHTS, describes

FORMAT = 1  # of run directories
MARKER, LOCK = "sslctl-run.json", "lock"
CHECKPOINTS, LAST = "checkpoints", "last"
_BEGINNINGS = re.compile(rf"{LOCK}|{PROBE}|\.{re.escape(MARKER)}{UNFINISHED}", re.ASCII)
_NAMED = re.compile(rb"checkpoints/step-\d+\n|")  # what `last` holds
_STEP = re.compile(r"(\.?)step-(0|[1-9]\d*)((?:\.writing|\.removing)?)", re.ASCII)  # those with a dot are temporary


# --- Runs ---


def refuse_other(folder: Path) -> None:
    """Raises InputError for a directory that is neither empty nor a run of sslctl; changes nothing.

    A run from before there was a marker is one by the manifest of a checkpoint.
    """
    if not folder.is_dir():
        return
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
    others = [name for name in names if not (_BEGINNINGS.fullmatch(name) and (folder / name).is_file())]
    if not others:
        return
    # After the names: a run that another process begins meanwhile is marked before it holds anything else.
    format_ = _marked_format(folder)
    if format_ not in (None, FORMAT):
        raise InputError(f"{folder} is a run of format {format_}; this version of sslctl writes format {FORMAT}")
    if not is_own(folder):
        names = ", ".join(map(ascii, others[:3])) + (", …" if len(others) > 3 else "")
        raise InputError(
            f"{folder} is no run of sslctl and not empty (it holds {names}): nothing is written there, name another or"
            " a new directory"
        )
    if (folder / CHECKPOINTS).is_symlink():
        raise InputError(
            f"{folder / CHECKPOINTS} is a link, and old checkpoints are deleted in the run alone: move the whole run"
            " to where there is space"
        )


def is_own(folder: Path) -> bool:
    """Tells whether a directory has sslctl's marker, or a checkpoint with its manifest."""
    return _marked_format(folder) is not None or any(is_checkpoint(path) for path in steps_on_disk(folder))


def mark(run_dir: Path) -> None:
    """Marks a directory as a run of sslctl, unless it is. Only for the holder of its lock, after `refuse_other`."""
    if _marked_format(run_dir) is None:
        write_text(run_dir / MARKER, json.dumps({"format": FORMAT, "version": version("sslctl")}) + "\n")


def _marked_format(folder: Path) -> int | None:
    """Returns the format that a directory's marker names; None where there is no marker, or none that can be read."""
    try:
        refuse_special(folder / MARKER)
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    format_ = marker.get("format") if isinstance(marker, dict) else None
    return format_ if type(format_) is int else None


# --- Checkpoints ---


def steps_on_disk(run_dir: Path) -> list[Path]:
    """Lists the checkpoints of a run, newest first, valid or not."""
    paths = (run_dir / CHECKPOINTS).glob("step-*")
    return sorted((p for p in paths if (m := _STEP.fullmatch(p.name)) and not m[3]), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Returns the N of checkpoints/step-N, also under its temporary names."""
    return int(_STEP.fullmatch(path.name)[2])


def is_checkpoint(path: Path) -> bool:
    """Tells whether a directory step-N has a manifest of sslctl for this step, whatever has become of the files it lists."""
    return not path.is_symlink() and describes(path, step_of(path))


def remove(path: Path) -> None:
    """Deletes what is in the place of checkpoints/step-N, if it is a checkpoint of sslctl; else sets it aside."""
    if is_checkpoint(path):
        _delete(path)
    else:
        _set_aside(path)


def write_last(run_dir: Path, checkpoint: Path) -> None:
    """Writes which checkpoint is the newest to the file `last`, for whoever looks: a resume asks the checkpoints themselves.

    In its place may be the link that it was once, or, in a run that was copied with links followed, a copy of a checkpoint.
    """
    last, text = run_dir / LAST, f"{checkpoint.relative_to(run_dir)}\n"
    if not _is_pointer(last):
        clear_last(run_dir)
    elif not last.is_symlink() and last.read_text() == text:
        return
    write_text(last, text)


def clear_last(run_dir: Path) -> None:
    """Takes `last` away; what is not sslctl's in its place is set aside."""
    last = run_dir / LAST
    if _is_pointer(last):
        last.unlink()
    elif describes(last):
        _delete(last)
    else:
        _set_aside(last)


def _is_pointer(last: Path) -> bool:
    return last.is_symlink() or (last.is_file() and bool(_NAMED.fullmatch(last.read_bytes())))


def _delete(path: Path) -> None:
    leaving = path.with_name(f".{path.name}.removing")
    discard(leaving)
    path.rename(leaving)  # a kill in mid-removal leaves no half of a checkpoint under its name
    discard(leaving)


def discard(path: Path) -> None:
    """Deletes a checkpoint under a temporary name, its manifest last; what else lies there is set aside."""
    if path.is_dir() and not path.is_symlink():
        for name in (WEIGHTS, STATE, MANIFEST):
            if not (path / name).is_dir():
                (path / name).unlink(missing_ok=True)
        if not any(path.iterdir()):
            path.rmdir()
            return
    _set_aside(path)


def _set_aside(path: Path) -> None:
    """Renames what is in the place of a checkpoint and is not sslctl's, and says so."""
    if not (path.exists() or path.is_symlink()):
        return
    aside = path.rename(free_name(path.with_name(re.sub(r"^[.]|[.](writing|removing)$", "", path.name))))
    say(f"sslctl: {path} is not as sslctl wrote it: not deleted, now {aside.name}", file=sys.stderr)


def remove_leftovers(run_dir: Path) -> None:
    """Deletes the files and checkpoints that a kill left half written or half removed. Only for the holder of the lock."""
    remove_unfinished(run_dir)
    unfinished = [p for p in (run_dir / CHECKPOINTS).glob(".step-*") if (m := _STEP.fullmatch(p.name)) and m[3]]
    for path in (*unfinished, run_dir / f".{LAST}.removing"):
        if path.is_dir():
            with contextlib.suppress(OSError):
                discard(path)
