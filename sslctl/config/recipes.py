"""Recipes of `sslctl adapt`: files of key: value, whose words stand before those of the command line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from sslctl.config.command_line import Prepared, quote
from sslctl.config.schema import CONFIGS
from sslctl.errors import InputError, nearest

FOLDER = "adaptation"  # of configs/ and of --config-dir
CHOSEN = (
    "dataset.image_size",
    "trainer.batch_size",
    "trainer.epochs",
)  # by images and machine, unless a command says them


def recipe_words(name: str, directories: Iterable[Path] = ()) -> list[str]:
    """Returns the overrides that a recipe stands for. directories: the user's own. Raises InputError where there is none."""
    files = {path.stem: path for d in (CONFIGS, *directories) for path in sorted((d / FOLDER).glob("*.yaml"))}
    if name not in files:
        raise InputError(f"recipes=[{name}]: no such recipe{nearest(name, files)}; there are {', '.join(files)}")
    try:
        values = yaml.safe_load(files[name].read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{files[name]}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{files[name]}: expected lines of key: value")
    return [f"{key}={_word(value)}" for key, value in values.items()]


def _word(value: Any) -> str:
    """Returns a plain value as a command line has it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_word(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if not isinstance(value, str) or value.replace("_", "").isalnum() else quote(value)


def key_of(word: str) -> str:
    """Returns the key of an override."""
    return word.partition("=")[0].lstrip("+~")


def choose_recipe(prepared: Prepared) -> list[str]:
    """Returns the words of the recipe that a command of adapt begins with, and its dataset, without those that it says itself.

    Of several recipes the first: the others are composed in its place when their turn comes.
    """
    recipes_word = next((word for word in reversed(prepared.overrides) if key_of(word) == "recipes"), None)
    names = _names(recipes_word.partition("=")[2]) if recipes_word else _default()
    words = recipe_words(names[0], prepared.config_dirs) if names else []
    words = [word for word in words if key_of(word) not in CHOSEN]
    return unsaid(["dataset=folder", *words], prepared.overrides)


def unsaid(words: Iterable[str], others: Iterable[str]) -> list[str]:
    """Returns the overrides whose keys others do not say."""
    keys = {key_of(word) for word in others}
    return [word for word in words if key_of(word) not in keys]


def _names(value: str) -> list[str]:
    try:
        names = yaml.safe_load(value)
    except yaml.YAMLError:
        return []
    names = [names] if isinstance(names, str) else names
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _default() -> list[str]:
    return yaml.safe_load((CONFIGS / "adapt.yaml").read_text())["recipes"]
