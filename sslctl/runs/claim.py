"""Claiming a run directory: to start a run in it, to resume the one that is there, or to refuse.

Resumed is a run whose fingerprint keys, hashes of data and weights, and seed are those asked for; any other is refused with
the keys that differ. While a process trains, its lock keeps others out.
"""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from pathlib import Path
from typing import Any

from sslctl.errors import InputError, say
from sslctl.runs.atomic import NOT_OFFERED, make_folder, move_aside, point, why_unwritable, why_unwritable_file
from sslctl.runs.continuing import DATA_KEY, ways_on
from sslctl.runs.description import (
    Description,
    current_identity,
    identity,
    restore,
    saved_description,
    write_description,
)
from sslctl.runs.directory import BACKBONE, ENVIRONMENT, PREPROCESS, RESULTS, environment, run_named_by, write_json
from sslctl.runs.file_list import Changes, FileList
from sslctl.runs.fingerprint import value_of
from sslctl.runs.ownership import LOCK, mark, refuse_other
from sslctl.runs.reading import Damaged, read_preprocess
from sslctl.runs.repair import repair_logs
from sslctl.runs.segments import next_segment


def claim(run_dir: Path, **description: Any) -> tuple["Lock", Description]:
    """Takes a run directory for this process: makes it, locks it, and starts or resumes the run that `describe` is given.

    Returns the lock and what `describe` returns. Raises InputError where it cannot be written, is not sslctl's, another
    process holds it, or it holds another run.
    """
    lock = take(run_dir)
    try:
        there = describe(run_dir, **description)
    except BaseException:
        lock.release()
        raise
    point_latest(run_dir)
    return lock, there


def take(run_dir: Path) -> "Lock":
    """Makes a directory for a run, locks it and marks it as one of sslctl's. One that is anything else is not touched.

    Logs in it that cannot be read are set aside, which is said.
    """
    refuse_other(run_dir)
    make(run_dir)
    lock = Lock(run_dir)
    try:
        mark(run_dir)
        for sentence in repair_logs(run_dir):
            say(f"sslctl: {sentence}", file=sys.stderr)
        if reason := why_unwritable_file(run_dir / RESULTS):  # found now, not when there are results
            raise InputError(f"{reason}: make it writable, or choose another run_dir=")
    except BaseException:
        lock.release()
        raise
    return lock


def describe(
    run_dir: Path,
    config: dict,
    hashes: dict[str, str],
    facts: dict,
    preprocess: dict,
    command: str,
    health_facts: dict | None = None,
    files: FileList | None = None,
) -> Description:
    """Writes a new run's config.yaml, environment.json and preprocess.json, or checks that what is there is of this run.

    What is lost of the three is written again. Returns what the manifests of the run's checkpoints hold.
    health_facts: fields of RunFacts, for the verdict on the run. files: those that the hash of the data is of.
    """
    there = saved_description(run_dir)
    if there is None:
        write_json(run_dir / PREPROCESS, preprocess)
        if files:
            files.write(run_dir)
        facts_of_run = {"hashes": hashes, "facts": facts, "known": health_facts or {}}
        there = {"config": {**config, "run_dir": str(run_dir)}, "environment": environment(command) | facts_of_run}
        write_description(run_dir, there)
        return there
    refuse_another_config(run_dir, there, config, hashes, files)
    if restored := restore(run_dir):
        say(f"sslctl: {restored}", file=sys.stderr)
    _restore_preprocess(run_dir, preprocess)
    if not (run_dir / BACKBONE).exists():
        there = _go_on(run_dir, there, hashes, facts, files)
    if files and FileList.read(run_dir) is None:
        files.write(run_dir)
    return there


def _go_on(
    run_dir: Path, there: Description, hashes: dict[str, str], facts: dict, files: FileList | None
) -> Description:
    """Records in environment.json that a run goes on under other versions, or on other images, and says so, once."""
    segment, sentences = next_segment(run_dir, there["environment"], hashes, files)
    if segment is None:
        return there
    segments = [*there["environment"].get("segments", []), segment]
    there = there | {"environment": there["environment"] | {"segments": segments, "facts": facts}}
    write_json(run_dir / ENVIRONMENT, there["environment"])
    if "data" in segment and files:
        files.write(run_dir)
    for sentence in sentences:
        say(f"sslctl: {run_dir} {sentence}", file=sys.stderr)
    return there


def _restore_preprocess(run_dir: Path, preprocess: dict) -> None:
    """Writes preprocess.json again where it cannot be read, or is not what it was, and says so."""
    try:
        if all(read_preprocess(run_dir).get(key) == value for key, value in preprocess.items()):
            return
        reason = f"{run_dir / PREPROCESS}: not what the run's data say"
    except Damaged as damage:
        reason = damage.describe()
    if os.path.lexists(run_dir / PREPROCESS):
        reason += f"; set aside as {move_aside(run_dir / PREPROCESS).name}"
    write_json(run_dir / PREPROCESS, preprocess)
    say(f"sslctl: {reason}; written again", file=sys.stderr)


def refuse_another_config(
    run_dir: Path, there: Description, config: dict, hashes: dict[str, str], files: FileList | None = None
) -> None:
    """Raises InputError with the keys, and the files, that differ when the directory holds another run.

    on_data_change=continue lets an unfinished one go on with other images. files: those that the hash of the data is of.
    """
    old, new = current_identity(there), identity({"config": config, "environment": {"hashes": hashes}})
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    finished = (run_dir / BACKBONE).exists()
    if not keys or (keys == [DATA_KEY] and config.get("on_data_change") == "continue" and not finished):
        return
    lines = [f"  {k}: {value_of(old, k)} → {value_of(new, k)}" for k in keys[:10]] + (["  …"] if len(keys) > 10 else [])
    older, changes = FileList.read(run_dir), Changes()
    if DATA_KEY in keys and older and files:
        changes = Changes.between(older, files)
        lines += [f"  {line}" for line in changes.lines()]
    bad = len({*changes.removed, *(older.names[row] for row in older.unreadable)}) if older else 0
    replaceable = bool(files and files.are_rows)
    ways, advice = ways_on(run_dir, old, new, changes, bad, finished=finished, replaceable=replaceable)
    raise InputError(
        f"{run_dir} holds a run with another configuration (there → asked for):", *lines, *ways, advice=advice
    )


def point_latest(run_dir: Path) -> None:
    """Points runs/latest at a run that lies below runs/: a link, or where there are none a file with its path."""
    runs = Path("runs").resolve()
    latest = runs / "latest"
    if runs not in run_dir.resolve().parents:
        return
    if latest.is_symlink() or not latest.exists() or run_named_by(latest):
        point(latest, run_dir.resolve().relative_to(runs))
    else:  # a file is somebody's, a directory the copy of a run, of links that were followed
        say(f"sslctl: {latest} is no link: it stays as it is, and does not lead to {run_dir}", file=sys.stderr)


# --- The directory and its lock ---


class Lock:
    """Holds a run directory for this process alone; the kernel lets go of it when the process dies, however it dies."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / LOCK
        try:
            self.descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"{self.path} cannot be opened: {error.strerror}; {_advice(error)}") from error
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self.descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(self.descriptor)
            raise InputError(f"{run_dir} is in use by {holder}: wait for it, or choose another run_dir=") from None
        except OSError as error:
            if error.errno not in (*NOT_OFFERED, errno.ENOLCK):
                raise
            say(
                "sslctl: this file system has no locks: two runs at once in one directory are not kept apart",
                file=sys.stderr,
            )
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, _holder().encode(), 0)
        os.register_at_fork(after_in_child=self.release)  # workers must not hold it after a kill of this process

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _holder() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}\n"


def refuse_replaced(run_dir: Path) -> None:
    """Raises RuntimeError where the directory that this process holds was moved away, and another has its name."""
    with contextlib.suppress(OSError):
        holder = (run_dir / LOCK).read_text(errors="replace")
        if holder and holder != _holder():
            raise RuntimeError(
                f"{run_dir} was moved away, and is now in use by {holder.strip()}: this run ends, and writes nothing there"
            )


def _advice(error: OSError) -> str:
    return "move it away" if isinstance(error, IsADirectoryError) else "ask its owner, or choose another run_dir="


def is_held(run_dir: Path) -> bool:
    """Tells whether a process holds a run's lock; of a lock that cannot be opened, no."""
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return False
    finally:
        os.close(descriptor)
    return False


def refuse_unwritable(path: Path) -> None:
    """Raises InputError when a run directory could not be made or written at a path; makes nothing."""
    if reason := why_unwritable(path):
        raise InputError(f"run_dir={path} cannot be written: {reason}")


def make(run_dir: Path) -> None:
    """Creates a run directory, or raises InputError with the path that cannot be written."""
    try:
        make_folder(run_dir)
    except OSError as error:
        raise InputError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error
