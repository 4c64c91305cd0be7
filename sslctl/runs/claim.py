"""Claiming a run directory: to start a run in it, to resume the one that is there, or to refuse.

Resumed is a run whose fingerprint keys, hashes of data and weights, and seed are those asked for; any other is refused with
the keys that differ. While a process trains, its lock keeps others out.
"""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

import yaml

from sslctl.errors import InputError
from sslctl.runs.atomic import make_folder, point, why_unwritable, write_text
from sslctl.runs.directory import CONFIG, ENVIRONMENT, PREPROCESS, environment, is_run, read_config, read_json
from sslctl.runs.fingerprint import fingerprint_keys, value_of
from sslctl.runs.ownership import LOCK, mark, refuse_other


def claim(run_dir: Path, **description: Any) -> "Lock":
    """Takes a run directory for this process: makes it, locks it, and starts or resumes the run that `describe` is given.

    Raises InputError where it cannot be written, is not sslctl's, another process holds it, or it holds another run.
    """
    lock = take(run_dir)
    try:
        describe(run_dir, **description)
    except BaseException:
        lock.release()
        raise
    point_latest(run_dir)
    return lock


def take(run_dir: Path) -> "Lock":
    """Makes a directory for a run, locks it and marks it as one of sslctl's. One that is anything else is not touched."""
    refuse_other(run_dir)
    make(run_dir)
    lock = Lock(run_dir)
    try:
        mark(run_dir)
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
) -> None:
    """Writes a new run's config.yaml, environment.json and preprocess.json, or checks that the old ones are of this run.

    config.yaml comes last: with it the directory is a run. health_facts: fields of RunFacts, for the verdict on the run.
    """
    if is_run(run_dir):
        refuse_another_config(run_dir, config, hashes)
        return
    write_text(run_dir / PREPROCESS, json.dumps(preprocess, indent=1))
    write_text(
        run_dir / ENVIRONMENT,
        json.dumps(environment(command) | {"hashes": hashes, "facts": facts, "known": health_facts or {}}, indent=1),
    )
    write_text(
        run_dir / CONFIG, yaml.safe_dump({**config, "run_dir": str(run_dir)}, sort_keys=False, allow_unicode=True)
    )


def refuse_another_config(run_dir: Path, config: dict, hashes: dict[str, str]) -> None:
    """Raises InputError with the keys that differ when the directory holds another run."""
    saved = read_config(run_dir)
    old = fingerprint_keys(saved, read_json(run_dir / ENVIRONMENT).get("hashes", {})) | {"seed": saved.get("seed")}
    new = fingerprint_keys(config, hashes) | {"seed": config["seed"]}
    if old == new:
        return
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    lines = [f"  {k}: {value_of(old, k)} → {value_of(new, k)}" for k in keys[:10]] + (["  …"] if len(keys) > 10 else [])
    raise InputError(
        f"{run_dir} holds a run with another configuration (there → asked for):", *lines, "choose another run_dir="
    )


def point_latest(run_dir: Path) -> None:
    """Points runs/latest at a run that lies below runs/."""
    runs = Path("runs").resolve()
    latest = runs / "latest"
    if runs in run_dir.resolve().parents and (latest.is_symlink() or not latest.exists()):  # a file is somebody's
        point(latest, run_dir.resolve().relative_to(runs))


# --- The directory and its lock ---


class Lock:
    """Holds a run directory for this process alone; the kernel lets go of it when the process dies, however it dies."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / LOCK
        self.descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self.descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(self.descriptor)
            raise InputError(f"{run_dir} is in use by {holder}: wait for it, or choose another run_dir=") from None
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        os.register_at_fork(after_in_child=self.release)  # workers must not hold it after a kill of this process

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def is_held(run_dir: Path) -> bool:
    """Tells whether a process holds a run's lock."""
    if not (run_dir / LOCK).exists():
        return False
    descriptor = os.open(run_dir / LOCK, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
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
