"""Ways on from a run that is not the one asked for: what is said, and the words of the command that starts a new one from it."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sslctl.config.command_line import quote, recorded_words, shell_words, unquoted_path
from sslctl.errors import InputError, user_path
from sslctl.runs.description import current_identity, saved_description
from sslctl.runs.directory import BACKBONE, TEACHER, is_run, run_named_by
from sslctl.runs.file_list import Changes
from sslctl.runs.fingerprint import default_directory, fingerprint_keys
from sslctl.runs.reading import read_environment

DATA_KEY, EPOCHS_KEY = "content of data", "trainer.epochs"
_SIBLINGS, _NOTED = 100, 2  # runs of one method, backbone and seed that are compared; of which the plan tells
# What a command says of one run: where it is, how it begins, and where its weights came from.
_NOT_TAKEN_OVER = (
    *("run_dir", "plan_only", "trainer.resume", "continue_run", "continue_optimizer", "on_data_change"),
    *("backbone.weights", "backbone.pretrained", "backbone.partial", "backbone.normalization"),
)


def ways_on(
    run_dir: Path,
    old: dict[str, Any],
    new: dict[str, Any],
    changes: Changes,
    bad: int,
    *,
    finished: bool,
    replaceable: bool,
) -> tuple[list[str], list[str]]:
    """Returns what is said, and the words and commands in it, where a run differs from the one asked for.

    old, new: the keys, with their values, that make the two runs. changes: of the files, where both are listed; bad: how many
    have no image of their own now; replaceable: whether others can stand in for these.
    """
    keys = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    lines, advice = [], []
    if keys == [DATA_KEY] and not finished:
        if replaceable and changes.removed and not (changes.added or changes.changed):
            words = f"dataset.on_error=skip dataset.max_bad={bad}"
            lines.append(f"{words} goes on, other images stand in for those that are not there")
            advice.append(words)
        lines.append("on_data_change=continue goes on with the images of now, not exactly, which every result will say")
        advice.append("on_data_change=continue")
    command = continuing_command(run_dir, old, new, keys, finished)
    if command:
        lines.append(f"{'it is finished; ' * finished}a new run from all that this one has learned: {command}")
        advice.append(command)
    return [*lines, "choose another run_dir= for a run of its own"], advice


def continuing_command(
    run_dir: Path, old: dict[str, Any], new: dict[str, Any], keys: Iterable[str], finished: bool
) -> str | None:
    """Returns the command that starts a new run from another with the keys that differ; None where words cannot say them."""
    words = []
    for key in sorted(keys):
        value = new.get(key)
        if key == DATA_KEY:
            continue
        if " " in key or key.endswith("_target_") or isinstance(value, dict) or key not in new:
            return None
        if key == EPOCHS_KEY and finished and value > old[key]:
            value -= old[key]  # those of the new run
        words.append(f"{key}={_word(value)}")
    return shell_words(["sslctl", "pretrain", f"continue_run={run_dir}", *words])


def _word(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if not isinstance(value, str) or re.fullmatch(r"[A-Za-z_][\w.-]*", text) else quote(text)


# --- The other runs of a default directory ---


def find_run(config: Any, resolved: dict, hashes: dict[str, str]) -> tuple[Path, list[Path], list[str]]:
    """Returns the run's directory, the runs that may be it on images as they were before, and what the plan says of others.

    The directory is run_dir=, or runs/<dataset>/<method>-<backbone>-<fingerprint>-s<seed>.
    """
    if config.run_dir:
        return (run_dir := user_path(config.run_dir)), [run_dir], []
    keys = fingerprint_keys(resolved, hashes)
    run_dir = default_directory(config, keys)
    if is_run(run_dir):
        return run_dir, [run_dir], []
    identity = keys | {"seed": config.seed}
    others = siblings(run_dir, identity)
    notes = [note for path, differing in others.items() if (note := note_of(path, differing, identity))]
    return run_dir, [path for path, differing in others.items() if differing == [DATA_KEY]], notes[:_NOTED]


def siblings(run_dir: Path, identity: dict[str, Any]) -> dict[Path, list[str]]:
    """Returns the runs beside runs/<dataset>/<method>-<backbone>-<fingerprint>-s<seed> that differ from it in the images or the
    epochs alone, each with these keys; the newest first."""
    stem, _, seed = run_dir.name.rpartition("-s")
    pattern = re.compile(re.escape(stem.rpartition("-")[0]) + r"-[0-9a-f]{8}-s" + re.escape(seed))
    if not run_dir.parent.is_dir():
        return {}
    others = [path for path in run_dir.parent.iterdir() if pattern.fullmatch(path.name) and is_run(path)]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    alike = {}
    for path in others[:_SIBLINGS]:
        try:
            there = current_identity(saved_description(path))
        except InputError:  # damaged: whoever names it is told
            continue
        keys = [key for key in there.keys() | identity.keys() if there.get(key) != identity.get(key)]
        if keys in ([DATA_KEY], [EPOCHS_KEY]):
            alike[path] = keys
    return alike


def note_of(sibling: Path, keys: list[str], identity: dict[str, Any]) -> str | None:
    """Says of a run that differs in these keys how to go on from it, for the plan of one that begins at step 0."""
    old, finished = current_identity(saved_description(sibling)), (sibling / BACKBONE).exists()
    command = continuing_command(sibling, old, identity, keys, finished)
    if keys == [EPOCHS_KEY]:
        if not finished or identity[EPOCHS_KEY] <= old[EPOCHS_KEY]:
            return None
        return f"{sibling} has finished {old[EPOCHS_KEY]} epochs of this; {command} goes on from it, this begins anew"
    ways = f"{command} goes on from it as a new run"
    if not finished:
        ways = f"run_dir={sibling} on_data_change=continue goes on with it, {ways}"
    return f"{sibling} is this run on other images; {ways}"


# --- continue_run=RUN ---


def named_run(word: Any) -> Path:
    """Returns the run that continue_run= names. Raises InputError where there is none."""
    path = user_path(word)
    path = run_named_by(path) or path
    if not is_run(path):
        raise InputError(f"continue_run={path}: {'not a run' if path.exists() else 'no such run'}")
    return path


def words_of(run: Path, own: Iterable[str]) -> list[str]:
    """Returns the overrides that a run was started with, made ready for Hydra, for a command that goes on from it.

    own: the overrides of that command, which come instead of those of the same key. What a run reads beside its images is
    taken from the run; of Hydra's own settings, which can name code, none is. Raises InputError where the run needed options that
    only a command line gives.
    """
    environment = read_environment(run)
    command_words = recorded_words(environment["command"])[2:]
    options = [word for word in command_words if word.startswith(("-", "allow="))]
    if options:
        own_options = {word.partition("=")[0] for word in own}
        missing = [word for word in options if word.partition("=")[0] not in own_options]
        if missing:
            advice = shell_words(missing)
            raise InputError(f"continue_run={run} was started with {advice}: say it again", advice=[advice])
    excluded_keys = {_key(word) for word in own} | set(_NOT_TAKEN_OVER)
    overrides = [word for word in command_words if word not in options and not _key(word).startswith("hydra")]
    words = [_from_here(word, environment["cwd"]) for word in overrides if _key(word) not in excluded_keys]
    if (run / TEACHER).exists() and "method.teacher" not in excluded_keys:
        words = [word for word in words if not _key(word).startswith(("method.teacher", "backbone@method.teacher"))]
        words.append(f"method.teacher={quote(str((run / TEACHER).resolve()))}")
    return words


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _from_here(word: str, start: str) -> str:
    """Returns an override whose relative path is found from the directory in which the run was started, if it is there."""
    path = unquoted_path(word)
    here = os.path.realpath(start) == os.path.realpath(os.curdir)
    if not path or os.path.isabs(path) or here or not os.path.exists(os.path.join(start, path)):
        return word
    return f"{word.partition('=')[0]}={quote(os.path.join(start, path))}"
