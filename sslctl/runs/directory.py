"""A run's directory: who holds it, what it was started with, and what it has logged."""

import fcntl
import json
import os
import platform
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from sslctl.errors import InputError
from sslctl.runs.fingerprint import fingerprint_keys

CONFIG, ENVIRONMENT, METRICS, RESULTS = "config.yaml", "environment.json", "metrics.jsonl", "results.jsonl"
BACKBONE, PREPROCESS, TOKENIZER = "backbone.safetensors", "preprocess.json", "tokenizer.json"
STOPPED = "stopped.json"  # why training ended early, where it was not a signal


class Lock:
    """An exclusive hold on a run directory; the kernel lets go of it when the process dies, however it dies."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / "lock"
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
    """Whether a process holds a run's lock."""
    if not (run_dir / "lock").exists():
        return False
    descriptor = os.open(run_dir / "lock", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def refuse_unwritable(path: Path) -> None:
    """Raises when a directory could not be made or written here; makes nothing."""
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"run_dir={path} cannot be written: {there} is {'not writable' if there.is_dir() else 'not a directory'}"
        )


def make(run_dir: Path) -> None:
    """Creates the directory, or says which path cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a sibling file and renames it into place."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(path)


def start(
    run_dir: Path,
    config: dict,
    hashes: dict[str, str],
    facts: dict,
    preprocess: dict,
    command: str,
    known: dict | None = None,
) -> None:
    """Writes a new run's config.yaml, environment.json and preprocess.json, or checks that the old ones are of this run.

    known: of the method, for the verdict on the run's health.
    """
    if is_run(run_dir):
        refuse_another_config(run_dir, config, hashes)
        return
    write_atomically(run_dir / PREPROCESS, json.dumps(preprocess, indent=1))
    write_atomically(
        run_dir / ENVIRONMENT,
        json.dumps(environment(command) | {"hashes": hashes, "facts": facts, "known": known or {}}, indent=1),
    )
    write_atomically(
        run_dir / CONFIG, yaml.safe_dump({**config, "run_dir": str(run_dir)}, sort_keys=False, allow_unicode=True)
    )


def refuse_another_config(run_dir: Path, config: dict, hashes: dict[str, str]) -> None:
    """Raises with the keys that differ when the directory's run is another one."""
    saved = read_config(run_dir)
    old = fingerprint_keys(saved, read_json(run_dir / ENVIRONMENT).get("hashes", {})) | {"seed": saved.get("seed")}
    new = fingerprint_keys(config, hashes) | {"seed": config["seed"]}
    if old == new:
        return
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    lines = [f"  {k}: {old.get(k)} → {new.get(k)}" for k in keys[:10]] + (["  …"] if len(keys) > 10 else [])
    raise InputError(
        f"{run_dir} holds a run with another configuration (there → asked for):", *lines, "choose another run_dir="
    )


def read_config(run_dir: Path) -> dict:
    """config.yaml of a run, as plain values."""
    try:
        config = yaml.safe_load((run_dir / CONFIG).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{run_dir / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{run_dir / CONFIG} is empty")
    return config


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def versions() -> dict[str, str]:
    """The versions that a number may depend on."""
    from importlib.metadata import version

    names = ("sslctl", "torch", "torchvision", "timm", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def environment(command: str) -> dict[str, Any]:
    """Where and with what a run was started."""
    return {
        "command": command,
        "cwd": os.getcwd(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions(),
        "started": now(),
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_lines(path: Path) -> list[dict]:
    """The records of a .jsonl file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number + 1 < len(lines):
                raise InputError(f"{path} line {number + 1} is not JSON: {error}") from error
    return records


def append_line(path: Path, record: dict) -> None:
    with path.open("a") as opened:
        opened.write(json.dumps(record) + "\n")


def cut_metrics(run_dir: Path, step: int) -> list[dict]:
    """Removes what was logged after `step` (a kill loses those steps) and returns what is left."""
    path = run_dir / METRICS
    kept = [record for record in read_lines(path) if record["step"] <= step]
    if path.exists():
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def is_run(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / ENVIRONMENT).is_file()


def find_runs(path: Path) -> list[Path]:
    """The run directories at or below a path, sorted; links such as runs/latest count once."""
    if is_run(path):
        return [path.resolve()]
    return sorted(config.parent.resolve() for config in path.rglob(CONFIG) if is_run(config.parent))


def total_size(path: Path) -> int:
    """Bytes below a directory."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and not f.is_symlink())


# --- The fingerprint of a run ---


def point_latest(run_dir: Path) -> None:
    """runs/latest, when the run lies below runs/."""
    runs = Path("runs").resolve()
    if runs in run_dir.resolve().parents:
        link, temporary = runs / "latest", runs / ".latest"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run_dir.resolve().relative_to(runs))
        temporary.replace(link)
