"""The pretrainings of an adaptation: their words, and their configurations as running jobs."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from sslctl.config.command_line import Prepared, prepare, task_overrides
from sslctl.config.recipes import key_of, recipe_words, unsaid
from sslctl.config.running import running_job
from sslctl.config.schema import CONFIGS, SCHEMAS
from sslctl.config.validation import mistakes
from sslctl.errors import InputError
from sslctl.training.sizing import epochs_between_looks

# What adapt says for pretrain where the command does not: the choices of configs/adapt.yaml, and no evaluation of pretrain's own.
_BASE = (
    "backbone=timm",
    "evaluation.closing=false",
    "evaluation.knn.k=20",
    "trainer.save_every_epochs=1",
)
_SAVES = 20  # checkpoints of a run, at most: a kill loses no more than a twentieth of it
OWN_KEYS = {f.name for f in fields(SCHEMAS["adapt"])} - {f.name for f in fields(SCHEMAS["pretrain"])}


def own_directories() -> list[Path]:
    """Returns the directories of --config-dir of the running job."""
    from hydra.core.hydra_config import HydraConfig

    sources = [Path(s.path) for s in HydraConfig.get().runtime.config_sources if s.schema == "file"]
    return [path for path in sources if path != CONFIGS]


def typed_words(first_recipe: str) -> list[str]:
    """Returns the words of the running command as they were typed, without those of the recipe that stand before them.

    One that was typed as the recipe has it is left out as well: it says the same.
    """
    words = task_overrides()
    for word in recipe_words(first_recipe, own_directories()):
        if word in words:
            words.remove(word)
    return words


def words_of_run(
    command_words: list[str], recipe: str, choices: Iterable[str], run_dir: Path, epochs: int | None = None, *more: str
) -> list[str]:
    """Returns the overrides of a pretraining: adapt's own, the recipe's, what was chosen, then what was typed, which wins.

    more: words that win over all of these.
    """
    own_words = [
        word for word in command_words if key_of(word).partition(".")[0] not in (*OWN_KEYS, "run_dir", "plan_only")
    ]
    words_by_key = {key_of(word): word for word in (*_BASE, *recipe_words(recipe, own_directories()), *choices)}
    if epochs is not None:
        values = {
            "trainer.epochs": epochs,
            "trainer.save_every_epochs": -(-epochs // _SAVES),
            "evaluation.knn_every_epochs": epochs_between_looks(epochs),
        }
        words_by_key |= {key: f"{key}={value}" for key, value in values.items()}
    last = [*more, *prepare([f"run_dir={run_dir}"]).overrides]
    return [*unsaid(words_by_key.values(), [*own_words, *last]), *unsaid(own_words, last), *last]


@contextlib.contextmanager
def pretraining(words: list[str]) -> Iterator[Any]:
    """Composes a pretraining and makes it the running job; yields its configuration. Raises InputError for what it cannot be."""
    with running_job("pretrain", Prepared(overrides=words, config_dirs=own_directories())) as job:
        if problems := mistakes(SCHEMAS["pretrain"], job):
            raise InputError(*problems)
        yield job
