"""What describes a run: config.yaml and environment.json, and the same in the manifest of each of its checkpoints.

What of the two files is lost or damaged is written again from the newest manifest that holds it; those of format 1 do not.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sslctl.errors import InputError, user_path
from sslctl.runs.atomic import move_aside
from sslctl.runs.directory import BACKBONE, CONFIG, ENVIRONMENT, METRICS, RESULTS, write_config, write_json
from sslctl.runs.fingerprint import fingerprint_keys
from sslctl.runs.manifest import MANIFEST, CheckpointError, read_manifest
from sslctl.runs.ownership import steps_on_disk
from sslctl.runs.reading import Damaged, read_config, read_environment, repair_command
from sslctl.runs.segments import current_hashes

Description = dict[str, Any]  # {"config": …, "environment": …}, as the two files hold them


def with_absolute_roots(resolved: dict) -> dict:
    """Returns a configuration that names its images wherever it is read: roots from the top, those as typed beside it."""
    nodes = {name: resolved[name] for name in ("dataset", "eval_dataset") if (resolved.get(name) or {}).get("root")}
    typed = {f"{name}.root": node["root"] for name, node in nodes.items()}
    absolute = {name: node | {"root": os.path.abspath(user_path(node["root"]))} for name, node in nodes.items()}
    return resolved | absolute | ({"as_typed": typed} if typed else {})


def identity(description: Description) -> dict[str, Any]:
    """Returns what two descriptions of one run have in common: its fingerprint's keys, hashes of what it reads, and seed."""
    config, environment = description["config"], description["environment"]
    return fingerprint_keys(config, environment.get("hashes", {})) | {"seed": config.get("seed")}


def current_identity(description: Description) -> dict[str, Any]:
    """Returns the identity of a run as of its latest segment: with the images that it went on with, if it did with others."""
    config, environment = description["config"], description["environment"]
    return identity({"config": config, "environment": {"hashes": current_hashes(environment)}})


def saved_description(run_dir: Path) -> Description | None:
    """Returns what a directory says of the run in it, None where no run has begun.

    Raises InputError where a file is lost, or cannot be read, that no checkpoint holds.
    """
    in_checkpoint = described_by_checkpoint(run_dir)
    if in_checkpoint:
        return _with_segments(in_checkpoint[0], run_dir)
    begun = any((run_dir / name).exists() for name in (CONFIG, METRICS, RESULTS, BACKBONE)) or steps_on_disk(run_dir)
    if not begun:  # config.yaml is the last file of a run that begins
        return None
    advice = (
        "no checkpoint there holds it (those of sslctl 0.1 do not): put it back from a copy, or name another run_dir= and"
        " start from these weights with backbone.weights="
    )
    for path in (run_dir / CONFIG, run_dir / ENVIRONMENT):
        if not path.exists():
            raise InputError(f"{path} is lost; {advice}")
    try:
        description = {"config": read_config(run_dir), "environment": read_environment(run_dir)}
    except Damaged as damage:
        raise InputError(f"{damage.describe()}; {advice}") from damage
    return description


def _with_segments(description: Description, run_dir: Path) -> Description:
    """Adds what environment.json alone holds, as no checkpoint has been written since: segments, and the facts of the latest."""
    try:
        environment = read_environment(run_dir)
    except Damaged:
        return description
    if len(environment.get("segments", [])) <= len(description["environment"].get("segments", [])):
        return description
    later = {key: environment[key] for key in ("segments", "facts")}
    return description | {"environment": description["environment"] | later}


def described_by_checkpoint(run_dir: Path) -> tuple[Description, Path] | None:
    """Returns what the newest manifest that describes its run says, and its path."""
    for checkpoint in steps_on_disk(run_dir):
        try:
            description = read_manifest(checkpoint).get("run")
        except CheckpointError:
            continue
        if description:
            return description, checkpoint / MANIFEST
    return None


def write_description(run_dir: Path, description: Description, names: Iterable[str] = (ENVIRONMENT, CONFIG)) -> None:
    """Writes the files that describe a run: config.yaml last, as with it the directory is a run."""
    if ENVIRONMENT in names:
        write_json(run_dir / ENVIRONMENT, description["environment"])
    if CONFIG in names:
        write_config(run_dir, description["config"])


def restore(run_dir: Path) -> str | None:
    """Writes again what is lost of a run's two files, or is of another run than its checkpoints; returns a sentence if it did.

    What was there is kept beside it. Only for the holder of the run's lock.
    """
    names = lost_files(run_dir)
    if not names:
        return None
    description, manifest = described_by_checkpoint(run_dir)
    aside = [move_aside(run_dir / name).name for name in names if os.path.lexists(run_dir / name)]
    write_description(run_dir, description, names)
    note = f"; what was there is now {' and '.join(aside)}" if aside else ""
    return f"restored {' and '.join(names)} of {run_dir} from {manifest}{note}"


def lost_files(run_dir: Path) -> list[str]:
    """Names what of config.yaml and environment.json is lost, cannot be read, or is of another run than the checkpoints."""
    in_checkpoint = described_by_checkpoint(run_dir)
    if in_checkpoint is None:
        return []
    description, _ = in_checkpoint
    names = []
    for name, part, read in (
        (CONFIG, "config", lambda: read_config(run_dir)),
        (ENVIRONMENT, "environment", lambda: read_environment(run_dir)),
    ):
        try:
            if identity(description | {part: read()}) != identity(description):
                names.append(name)
        except (InputError, AttributeError, TypeError):
            names.append(name)
    return names


def advice_on_lost(run_dir: Path) -> str | None:
    """Says which of a run's two files are lost that its checkpoints hold, and the command that writes them again."""
    names = lost_files(run_dir)
    if not names:
        return None
    _, manifest = described_by_checkpoint(run_dir)
    return (
        f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} lost, damaged, or not of its checkpoints:"
        f" {repair_command(run_dir)} restores {'it' if len(names) == 1 else 'them'} from {manifest}"
    )
