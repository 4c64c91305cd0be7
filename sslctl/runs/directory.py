"""The files of a run directory: their names, how they are read, and what is appended to them."""

import json
import os
import platform
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from sslctl.errors import InputError
from sslctl.runs.atomic import write_text

CONFIG, ENVIRONMENT, METRICS, RESULTS = "config.yaml", "environment.json", "metrics.jsonl", "results.jsonl"
BACKBONE, PREPROCESS, TOKENIZER = "backbone.safetensors", "preprocess.json", "tokenizer.json"
DATA = "data.json"  # what was inferred of the data
PROBES = "probes"  # trained classifiers
STOPPED = "stopped.json"  # why training ended early, where it was not a signal


def read_config(run_dir: Path) -> dict:
    """Reads config.yaml of a run, as plain values."""
    try:
        config = yaml.safe_load((run_dir / CONFIG).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{run_dir / CONFIG} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise InputError(f"{run_dir / CONFIG} is empty")
    return config


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def versions() -> dict[str, str]:
    """Returns the versions that a number may depend on."""
    from importlib.metadata import version

    names = ("sslctl", "torch", "torchvision", "timm", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def environment(command: str) -> dict[str, Any]:
    """Describes where and with what a run was started."""
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
    """Reads the records of a .jsonl file; a last line cut off by a kill is left out."""
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
    records = [record for record in read_lines(path) if record["step"] <= step]
    if path.exists():
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def is_run(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / ENVIRONMENT).is_file()


def find_runs(path: Path) -> list[Path]:
    """Lists the run directories at or below a path, sorted; links such as runs/latest count once."""
    if is_run(path):
        return [path.resolve()]
    return sorted(config.parent.resolve() for config in path.rglob(CONFIG) if is_run(config.parent))


def total_size(path: Path) -> int:
    """Counts the bytes below a directory."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and not f.is_symlink())
