"""The files of a run directory: their names, how its descriptions are written, and where there are any."""

import json
import os
import platform
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from sslctl.errors import say
from sslctl.ops.special_files import refuse_special
from sslctl.runs.atomic import write_text
from sslctl.runs.checksums import sign_json, sign_yaml
from sslctl.runs.manifest import names_run
from sslctl.runs.ownership import is_own, steps_on_disk

CONFIG, ENVIRONMENT, METRICS, RESULTS = "config.yaml", "environment.json", "metrics.jsonl", "results.jsonl"
BACKBONE, PREPROCESS, TOKENIZER = "backbone.safetensors", "preprocess.json", "tokenizer.json"
TEACHER = "teacher.safetensors"  # a frozen one
GIVEN = "given.safetensors"  # the backbone that a run began with, where its weights were not random
DATA = "data.json"  # what was inferred of the data
PROBES = "probes"  # the directories of trainings by labels
CLASSIFIERS = "classifiers"  # that evaluations keep for sslctl predict
STOPPED = "stopped.json"  # why training ended early, where it was not a signal


def write_config(run_dir: Path, config: dict) -> None:
    """Writes config.yaml, with its checksum."""
    text = yaml.safe_dump({**config, "run_dir": str(run_dir)}, sort_keys=False, allow_unicode=True)
    write_text(run_dir / CONFIG, sign_yaml(text))


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file, with its checksum."""
    write_text(path, sign_json(json.dumps(value, indent=1)))


def write_if_other(path: Path, text: str) -> None:
    """Writes a text file unless it holds that text already: what is finished is left as it is."""
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


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


def run_named_by(path: Path) -> Path | None:
    """Returns the run that a small file leads to, as runs/latest does on file systems without links; None for all else."""
    try:
        refuse_special(path)
        with path.open("rb") as opened:
            line = os.fsdecode(opened.read(4097))
    except OSError:
        return None
    target = path.parent / line.removesuffix("\n")
    return target if line.endswith("\n") and line.count("\n") == 1 and "\0" not in line and is_run(target) else None


def is_run(path: Path) -> bool:
    return os.path.isfile(path / CONFIG) and os.path.isfile(path / ENVIRONMENT)


def holds_run(path: Path) -> bool:
    """Tells whether a directory is a run, or what is left of one that has lost some of its files.

    The directories of trained classifiers are sslctl's too, and have neither of these two.
    """
    if is_run(path) or not is_own(path):
        return is_run(path)
    return any(os.path.lexists(path / name) for name in (CONFIG, ENVIRONMENT)) or any(
        map(names_run, steps_on_disk(path))
    )


def find_runs(path: Path) -> list[Path]:
    """Lists the run directories at or below a path, damaged ones too, sorted; links such as runs/latest count once."""
    if holds_run(path):
        return [path.resolve()]

    def complain(error: OSError) -> None:
        say(f"sslctl: {error.filename} cannot be searched: {error.strerror}", file=sys.stderr)

    return sorted(Path(folder).resolve() for folder, *_ in os.walk(path, onerror=complain) if holds_run(Path(folder)))


def total_size(path: Path) -> int:
    """Counts the bytes below a directory."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and not f.is_symlink())
