"""Where evaluated weights come from and by which command they are measured: what every result says beside its value."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslctl.config.command_line import command_line
from sslctl.errors import user_path
from sslctl.runs.directory import run_named_by
from sslctl.runs.reading import read_config, read_environment
from sslctl.runs.segments import data_changes


@dataclass(frozen=True)
class Origin:
    """run: its path as the user named it; None of weights that are no run's. method, backbone: names of choices; None of pixels.
    pretrain_seed: of the run, whose random weights it decides as well. data_changed: at which steps a run went on with other
    images; None where it never did."""

    run: str | None = None
    method: str | None = None
    backbone: str | None = None
    pretrain_seed: int | None = None
    data_changed: str | None = None


UNKNOWN = Origin()


def origin_of(run: Path, ckpt: Any, subject: str) -> Origin:
    """Returns the origin of a run that ckpt= names. subject: pixels have a run, and no network."""
    config, name = read_config(run), as_named(run, ckpt)
    if subject == "pixels":
        return Origin(name)
    backbone = config_choice("backbone") or config["names"]["backbone"]
    changes = data_changes(read_environment(run)) if subject == "trained" else None
    return Origin(name, config["names"]["method"], backbone, config["seed"], changes)


def as_named(run: Path, ckpt: Any) -> str:
    """Returns a run's path as ckpt= has it: below the directory, or around the checkpoint, that the user named.

    A link is followed: runs/latest is another run tomorrow.
    """
    for word in [ckpt] if isinstance(ckpt, str | Path) else list(ckpt or []):
        path = user_path(word)
        path = run_named_by(path) or path
        real = path.resolve()
        if path.is_symlink():
            path = path.parent / os.readlink(path)
        if run.is_relative_to(real):
            return os.path.normpath(path / run.relative_to(real))
        if real.is_relative_to(run):
            return os.path.normpath(path / os.path.relpath(run, real))
    return str(run)


def config_choice(group: str) -> str | None:
    """Returns what this command chose for a part of its configuration, by name: backbone=small_resnet; None where nothing."""
    from hydra.core.hydra_config import HydraConfig

    choice = HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None
    return None if choice in (None, "null") else choice


def measured_by() -> dict[str, str | None]:
    """Returns the words of the running command, and the directory in which they were said."""
    from hydra.core.hydra_config import HydraConfig

    return {"command": command_line() if HydraConfig.initialized() else None, "cwd": os.getcwd()}


def settings(node: dict) -> dict:
    """Returns the settings of a part of a configuration as a result names them: its class by its name, and what is not null."""
    plain = {key: settings(value) if isinstance(value, dict) else value for key, value in node.items()}
    name = plain.pop("_target_", None)
    named = {"name": name.rpartition(".")[2]} if name else {}
    return named | {key: value for key, value in plain.items() if value is not None}


def flat_words(params: dict, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Returns ('optimizer.base_lr', '0.1') of every setting, in their order."""
    for key, value in params.items():
        if isinstance(value, dict):
            yield from flat_words(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", words_of(value)


def words_of(value: Any) -> str:
    """Returns a value as a command line has it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(words_of, value))}]"
    return "null" if value is None else str(value)
