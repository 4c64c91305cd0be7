"""What is damaged in a run, and its repair: nothing is deleted, what can be read is kept, the rest set aside."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sslctl.runs import directory as rundir
from sslctl.runs.atomic import free_name, move_aside, write_bytes
from sslctl.runs.checkpoint import CheckpointError, load_tensors, verify
from sslctl.runs.description import restore
from sslctl.runs.metrics import metrics_of
from sslctl.runs.ownership import steps_on_disk
from sslctl.runs.reading import Damaged, lines_of, read_config, read_environment, read_preprocess, read_stopped
from sslctl.runs.results import Result

_LINES: dict[str, Callable[[Any], Any]] = {rundir.METRICS: metrics_of, rundir.RESULTS: Result.from_line}
_WHOLE: dict[str, Callable[[Path], Any]] = {
    rundir.CONFIG: read_config,
    rundir.ENVIRONMENT: read_environment,
    rundir.PREPROCESS: read_preprocess,
    rundir.STOPPED: read_stopped,
}
_STARTS_ANEW = "the command that started the run writes it again"
_LOSSES = {
    rundir.METRICS: "nothing is known of what was logged",
    rundir.RESULTS: "nothing is known of what was measured",
    rundir.STOPPED: "nothing is known of why training stopped",
    **dict.fromkeys((rundir.CONFIG, rundir.ENVIRONMENT, rundir.PREPROCESS), _STARTS_ANEW),
}


def damages(run: Path) -> list[Damaged]:
    """Lists what cannot be read in a run, the first of each file; empty where all can. Checkpoints are not looked at."""
    return [*_damaged_descriptions(run), *(d for name in _LINES for d in _damaged_lines(run, name)[:1])]


def _damaged_descriptions(run: Path) -> list[Damaged]:
    result = []
    for read in _WHOLE.values():
        try:
            read(run)
        except Damaged as damage:
            result.append(damage)
    return result


def _damaged_lines(run: Path, name: str) -> list[Damaged]:
    try:
        return lines_of(run / name, _LINES[name]).damages
    except Damaged as damage:
        return [damage]


def repair_logs(run: Path) -> list[str]:
    """Sets aside the logs, notes and backbone that cannot be read, with the logs' readable lines written again; returns what was
    done, a sentence a file. Only for the holder of the run's lock."""
    done = [sentence for name in _LINES if (sentence := _repair_lines(run, name))]
    done += [_set_aside(damage) for damage in _damaged_descriptions(run) if damage.path.name == rundir.STOPPED]
    return done + _repair_backbone(run)


def _repair_backbone(run: Path) -> list[str]:
    path = run / rundir.BACKBONE
    if not os.path.lexists(path):
        return []
    try:
        load_tensors(path)
    except CheckpointError as error:
        return [f"{error}; set aside as {move_aside(path).name}: {_STARTS_ANEW}"]
    return []


def repair(run: Path) -> list[str]:
    """Repairs everything in a run, its checkpoints too; returns what was done, a sentence a file, empty where nothing was.
    Only for the holder of the run's lock."""
    done = repair_logs(run)
    done += [sentence] if (sentence := restore(run)) else []
    done += [_set_aside(damage) for damage in _damaged_descriptions(run) if os.path.lexists(damage.path)]
    for path in steps_on_disk(run):
        try:
            verify(path)
        except CheckpointError as error:
            done.append(f"{error}: set aside as {move_aside(path).name}")
    return done


def _repair_lines(run: Path, name: str) -> str | None:
    path = run / name
    try:
        lines = lines_of(path, _LINES[name])
    except Damaged as damage:
        return _set_aside(damage)
    if not lines.damages:
        return None
    aside = free_name(path)
    write_bytes(aside, path.read_bytes())
    write_bytes(path, b"".join(text + b"\n" for text in lines.texts))
    lost, first = len(lines.damages), lines.damages[0]
    return (
        f"{path}: {lost} line{'s' * (lost > 1)} cannot be read (line {first.line}: {first.reason}); {len(lines.texts)} are"
        f" kept, the whole file is set aside as {aside.name}"
    )


def _set_aside(damage: Damaged) -> str:
    return f"{damage.describe()}; set aside as {move_aside(damage.path).name}: {_LOSSES[damage.path.name]}"
