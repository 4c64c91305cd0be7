"""sslctl check: every choice of every group composes, has sound values, and fits the signature it names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sslctl.config.recipes import FOLDER, choose_recipe
from sslctl.config.schema import CONFIGS, SCHEMAS
from sslctl.config.targets import bind
from sslctl.config.validation import mistakes
from sslctl.errors import InputError, say
from sslctl.factory.from_config import bind_backbone, bind_method
from sslctl.schedules import SHAPES

GROUPS = {
    "pretrain": (
        *("dataset", "scale", "augmentation", "backbone", "optimizer", "scheduler", "trainer", "method", "experiment"),
    ),
    "adapt": (FOLDER,),
    "evaluate": ("protocols",),
}


def check(config: Any) -> None:
    """Prints one line a configuration; raises with all mistakes."""
    from hydra.core.hydra_config import HydraConfig

    from sslctl.config.command_line import PLACED, Prepared, as_typed
    from sslctl.config.diagnose import compose_choices

    directories = [Path(s.path) for s in HydraConfig.get().runtime.config_sources if s.schema == "file"]
    own = Prepared(config_dirs=[d for d in directories if d != CONFIGS])
    mistakes, count = [], 0
    for verb in SCHEMAS:
        combinations = [[]]
        for group in GROUPS.get(verb, ()):
            files = [
                f.stem for d in dict.fromkeys((CONFIGS, *own.config_dirs)) for f in sorted((d / group).glob("*.yaml"))
            ]
            combinations += [
                [f"{_AS_LISTS[group]}=[{name}]" if group in _AS_LISTS else f"{PLACED.get(group, group)}={name}"]
                for name in files
            ]
        for choice in combinations:
            count += 1
            where = f"{verb} {' '.join(map(as_typed, choice))}".strip()
            words = [*_recipe_of(verb, choice, own), *choice]
            problems = problems_of(verb, compose_choices, own, words)
            say(f"{'ok      ' if not problems else 'wrong   '}{where}")
            mistakes += [f"{where}: {p}" for p in problems]
    if mistakes:
        raise InputError(*mistakes)
    say(f"{count} configurations compose, and every signature binds")


_AS_LISTS = {"protocols": "protocols", FOLDER: "recipes"}  # groups of which a key names several files


def _recipe_of(verb: str, choice: list[str], own: Any) -> list[str]:
    """Returns the words that a recipe stands for: its file is no part of a composition."""
    return choose_recipe(replace(own, overrides=choice)) if verb == "adapt" and choice else []


def problems_of(verb: str, compose: Any, own: Any, choice: list[str]) -> list[str]:
    """Lists what is wrong with one composition; empty when nothing is."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        composed = compose(verb.replace("_", "-"), own, choice)
        problems = mistakes(SCHEMAS[verb], composed)
    except (HydraException, OmegaConfBaseException) as error:
        return [" ".join(line.strip() for line in str(error).splitlines()[:2])]
    bindings = [("dataset", ("split",)), ("optimizer", ("params", "lr"))]
    bindings += [(f"protocols.{name}", ()) for name in composed.get("protocols") or ()]
    for key, given in bindings:
        if node := OmegaConf.select(composed, key):
            try:
                bind(node, key, given=given)
            except InputError as error:
                problems += error.messages
    for key, bind_it in (("backbone", bind_backbone), ("method", bind_method)):
        if composed.get(key):
            try:
                bind_it(composed[key])
            except InputError as error:
                problems += error.messages
    if composed.get("scheduler") and composed.scheduler.shape not in SHAPES:
        problems.append(f"scheduler.shape={composed.scheduler.shape} is not one of {', '.join(SHAPES)}")
    return problems
