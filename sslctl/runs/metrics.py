"""metrics.jsonl: what a run logs while it trains, one JSON line a step, each with its checksum."""

import json
import math
from pathlib import Path
from typing import Any

from sslctl.runs.atomic import write_bytes
from sslctl.runs.checksums import sign_json
from sslctl.runs.directory import METRICS
from sslctl.runs.reading import lines_of, read_lines
from sslctl.runs.schema import misfit


def append_metrics(path: Path, record: dict) -> None:
    """Appends one record."""
    with path.open("a") as opened:
        opened.write(sign_json(json.dumps(record)) + "\n")


def metrics_of(value: Any) -> dict[str, float]:
    """Returns what was logged after a step, without values that are not finite: fp16 has them at steps that it skips.

    Raises ValueError for anything else.
    """
    if reason := misfit(value, {"step": int, "epoch": float, ...: Any}):
        raise ValueError(reason)
    record = {name: v for name, v in value.items() if not (isinstance(v, float) and not math.isfinite(v))}
    if reason := misfit(record, dict[str, float]):
        raise ValueError(reason.removeprefix("."))
    return record


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Reads metrics.jsonl; nothing where there is no such file. Raises Damaged with the first line that cannot be read."""
    return read_lines(run / METRICS, metrics_of)


def readable_metrics(run: Path) -> list[dict[str, float]]:
    """Reads those lines that can be read: a run that trains is not ended by others."""
    return lines_of(run / METRICS, metrics_of).records


def cut_metrics(run: Path, step: int) -> list[dict[str, float]]:
    """Removes what was logged after `step` (a kill loses those steps) and returns what is left."""
    path = run / METRICS
    lines = lines_of(path, metrics_of)
    if lines.damages:
        raise lines.damages[0]
    left = [(text, record) for text, record in zip(lines.texts, lines.records, strict=True) if record["step"] <= step]
    if path.exists():
        write_bytes(path, b"".join(text + b"\n" for text, _ in left))
    return [record for _, record in left]
