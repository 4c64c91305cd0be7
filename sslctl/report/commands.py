"""The commands that the page names: each can be pasted into a shell, and sslctl reads it."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from sslctl.config.command_line import quote, recorded_words, shell_words, with_plain_paths
from sslctl.errors import InputError, shown
from sslctl.evaluation.provenance import words_of
from sslctl.report.run import Run
from sslctl.runs.reading import run_word
from sslctl.runs.results import Result

_KNN = ("k", "temperature")
_PROBE = ("lr", "weight_decay", "epochs", "most_steps", "batch_size", "validation")
LEAST_STEPS = 500  # of a run that is long enough to be judged


def placed(cwd: str, words: Sequence[str]) -> str:
    """Returns a command where it was said."""
    return f"cd {shell_words([cwd])} && {shell_words(words)}"


def words_in(command: str) -> list[str]:
    """Returns the words of a recorded command; paths without the quotes that Hydra's grammar asks for, where they need none."""
    words = (word.replace("dataset@eval_dataset=", "eval_dataset=") for word in recorded_words(command))
    return [with_plain_paths(word) for word in words]


def without(words: list[str], *keys: str) -> list[str]:
    return [word for word in words if word.partition("=")[0] not in keys]


def _or_comment(command: Callable[..., str]) -> Callable[..., str]:
    """Makes a comment for the shell of a command that there is none of: what was recorded is no command of sslctl's."""

    @functools.wraps(command)
    def written(*arguments: Any, **keywords: Any) -> str:
        try:
            return command(*arguments, **keywords)
        except InputError as error:
            return f"# none: {shown(error)}"

    return written


# --- Training ---


@_or_comment
def started_with(run: Run) -> str:
    """Returns the command that started a run. Said again it continues the run."""
    return placed(run.environment["cwd"], words_in(run.environment["command"]))


@_or_comment
def repeat_with(run: Run) -> str:
    """Returns the command that trains a run anew, in another directory."""
    words = without(words_in(run.environment["command"]), "run_dir")
    words += [] if run.config["trainer"]["threads"] else [f"trainer.threads={run.threads}"]
    return placed(run.environment["cwd"], [*words, f"run_dir=repeated/{run.path.name}"])


@_or_comment
def more_seeds(runs: Sequence[Run], count: int = 3) -> str:
    """Returns the command after which a setting has been trained with `count` seeds, by the words of its first run.

    Where runs have the directories that sslctl chooses, it finds those that are there and trains the others; where the
    user chose them, it names the others alone, and directories beside.
    """
    first = runs[0]
    words, own = words_in(first.environment["command"]), [run.config["seed"] for run in runs]
    new = [seed for seed in range(count + len(own)) if seed not in own][: max(0, count - len(own))]
    chosen = any(word.startswith("run_dir=") for word in words)
    seeds = new if chosen else sorted([*own, *new])
    words = without(words, "seed", "run_dir")
    place = []
    if chosen:
        name = re.sub(rf"[-_]?(s|seed)?(?<!\d){first.config['seed']}$", "", first.path.name)
        stem = str(first.path.parent / f"{name}-s")
        place = [f"run_dir={stem}${{seed}}" if "${" not in stem else f"run_dir={quote(stem)[:-1]}${{seed}}'"]
    sweep = [*words[:2], "-m", *words[2:], f"seed={','.join(map(str, seeds))}", *place]
    return placed(first.environment["cwd"], sweep)


@_or_comment
def longer(runs: Sequence[Run]) -> str:
    """Returns the command that trains a setting, with the seeds of all its runs, for ten times its epochs, and LEAST_STEPS at
    least, in other directories."""
    run = runs[0]
    epochs = run.facts["total_steps"] / run.facts["steps_per_epoch"]
    epochs = max(math.ceil(10 * epochs), math.ceil(LEAST_STEPS / run.facts["steps_per_epoch"]))
    words = without(words_in(run.environment["command"]), "run_dir", "trainer.epochs")
    words.append(f"trainer.epochs={epochs}")
    if len(runs) > 1:
        seeds = ",".join(str(run.config["seed"]) for run in runs)
        words = [*words[:2], "-m", *without(words[2:], "seed"), f"seed={seeds}"]
    return placed(run.environment["cwd"], words)


# --- Measuring ---


@_or_comment
def measuring(run: Run, result: Result) -> str:
    """Returns the command that measures a result again on the run's newest weights, for this run alone.

    It has the words by which the result was measured; of what pretraining measured at its end, the words that make the
    same settings.
    """
    recorded = words_in(result.command) if result.command else []
    if recorded and recorded[1] != "pretrain":
        return placed(result.cwd, [*recorded[:2], run_word(run.path), *without(recorded[2:], "ckpt")])
    where, params = run_word(run.path), result.params
    words = {
        "knn": ["knn-eval", where, *(f"knn.{key}={words_of(params[key])}" for key in _KNN if key in params)],
        "linear-cached": [
            *("linear-eval", where, "labels=all"),
            *(f"probe.{key}={words_of(params[key])}" for key in _PROBE if key in params),
        ],
    }.get(result.protocol, ["evaluate", where])
    features = [f"features={result.features}"] if result.features not in ("backbone", "pixels") else []
    return placed(run.environment["cwd"], ["sslctl", *words, *features])
