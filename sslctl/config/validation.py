"""Checks of a composed configuration. The keys themselves: schema.py and nodes.py.

Nothing in this file needs torch.
"""

import contextlib
import operator
import re
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sslctl.config.keys import UNTYPED, KeyFacts, facts_in
from sslctl.config.kinds import describe, fits, is_number, is_usable, kind_of, short
from sslctl.config.nodes import ViewGroupConfig
from sslctl.config.ranges import keys_with_ranges
from sslctl.config.targets import is_below
from sslctl.errors import first_line, nearest

_MOST_ENTRIES = 3  # of a list that are named as wrong


def mistakes(schema: type, config: DictConfig) -> list[str]:
    """Lists every value of a composed configuration that is missing, out of range or contradicts another one.

    Values that are read from elsewhere (${…}) are in their place afterwards: OmegaConf parses each anew whenever it is read.
    """
    references: set[str] = set()
    messages = _unusable(config, "", references) or _misshapen(schema, config, "")
    if messages:  # no value that could be compared with a range
        return messages
    messages = _out_of_range(schema, config, "")
    for path, facts in UNTYPED.items():
        twins = [path, f"eval_{path}"] if path.startswith("dataset.") else [path]
        messages += [mistake for twin in twins for mistake in _untyped_mistakes(config, twin, facts)]
    for path, value, facts in keys_with_ranges(config):
        messages += range_mistake(path, value, facts) if path not in UNTYPED else []
    messages += _protocol_mistakes(schema, config, references)
    if "scheduler" in config:
        messages += _scheduler_mistakes(config.scheduler)
    if "trainer" in config:
        messages += _trainer_mistakes(config.trainer)
    return messages


def _unusable(node: Any, path: str, references: set[str]) -> list[str]:
    """Lists values that cannot be read, as what they refer to (${…}) is not there, and numbers that nothing calculates with.

    Adds the paths of those that refer to others to references.
    """
    messages = []
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        place = f"{path}.{key}".lstrip(".")
        if _refers_to_hydra(place):
            continue
        try:
            value = None if OmegaConf.is_missing(node, key) else node[key]
        except OmegaConfBaseException as error:
            messages.append(located(error, place))
            continue
        if OmegaConf.is_config(value):
            messages += _unusable(value, place, references)
        elif not is_usable(value):
            messages.append(f"{place}={value}: expected a finite number below 2^63")
        elif OmegaConf.is_interpolation(node, key):
            references.add(place)
            if re.search(r"\$\{|^\?\?\?$", str(value)):  # in its place it would be read as something else
                continue
            with contextlib.suppress(OmegaConfBaseException):  # a number where a node belongs: _misshapen says so
                node[key] = value
    return messages


def _misshapen(schema: type, config: DictConfig, prefix: str) -> list[str]:
    """Lists nodes that are of another shape than the schema's: what a ${…} refers to, OmegaConf puts anywhere."""
    messages = []
    for name, hint in typing.get_type_hints(schema).items():
        path = f"{prefix}{name}"
        if OmegaConf.is_missing(config, name) or _refers_to_hydra(path):
            continue
        value = config[name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if value is None and type(None) in options:
            continue
        (kind, *_) = options
        if is_dataclass(kind) or typing.get_origin(kind) is dict:
            messages += _misshapen_node(kind, value, path)
        elif typing.get_origin(kind) is list and not (OmegaConf.is_list(value) or isinstance(value, list)):
            messages.append(f"{path}: expected {describe(hint)}, found {kind_of(value)}")
    return messages


def _misshapen_node(kind: Any, value: Any, path: str) -> list[str]:
    """Lists what of a value is of another shape than a node of this kind, a dataclass or dict[str, …]."""
    if not (OmegaConf.is_dict(value) or isinstance(value, dict)):
        return [f"{path}: expected a dictionary, found {kind_of(value)}"]
    if is_dataclass(kind):
        absent = [f.name for f in fields(kind) if f.name not in list(value)]  # `in` passes over what is missing
        if absent:
            return [f"{path}: expected the keys of {path}, found those of another node: {absent[0]} is missing"]
        return _misshapen(kind, value, f"{path}.")
    entry = typing.get_args(kind)[1]
    if not is_dataclass(entry):
        return []
    return [mistake for key in value for mistake in _misshapen_node(entry, value[key], f"{path}.{key}")]


def located(error: Any, place: str = "") -> str:
    """Returns an OmegaConf error in one line, with the key it is about and without the names of Python's exceptions."""
    key, text = getattr(error, "full_key", None) or place, first_line(error)
    text = re.sub(r"\w+ raised while resolving interpolation: ", "cannot be resolved: ", text)
    text = re.sub(r"Invalid type assigned: NoneType is not a subclass of (\w+)\. value: None", r"null is no \1", text)
    return f"{key}: {short(text)}" if key else short(text)


def _refers_to_hydra(path: str) -> bool:
    """Tells whether a node's values are choices of Hydra's own node, which only a job has."""
    return path == "names" and not HydraConfig.initialized()


def _untyped_mistakes(config: DictConfig, path: str, facts: KeyFacts) -> list[str]:
    """Checks a key that no schema has, where the configuration has it."""
    node, _, leaf = path.rpartition(".")
    parent = OmegaConf.select(config, node) if node else None
    if not isinstance(parent, DictConfig) or leaf not in parent or OmegaConf.is_missing(parent, leaf):
        return []
    value = parent[leaf]
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if not fits(plain, facts.hint):
        return [f"{path}={short(value)}: expected {describe(facts.hint)}"]
    return [] if value is None else range_mistake(path, value, facts)


def _out_of_range(schema: type, config: DictConfig, prefix: str) -> list[str]:
    messages = []
    hints = typing.get_type_hints(schema)
    for f in fields(schema):
        path = f"{prefix}{f.name}"
        if OmegaConf.is_missing(config, f.name):
            messages.append(f"{path} has no value: no configuration file of this verb sets it")
            continue
        if _refers_to_hydra(path):
            continue
        value = config[f.name]
        if value is None:
            continue
        if is_dataclass(hints[f.name]):
            messages += _out_of_range(hints[f.name], value, f"{path}.")
        elif hints[f.name] == dict[str, ViewGroupConfig]:
            for group, settings in value.items():
                if group == "local" and OmegaConf.missing_keys(settings):
                    messages.append(
                        f"{path}.local: this augmentation has no local views, which are asked for: augmentation=swav, dino"
                        " or lejepa"
                    )
                    continue
                messages += _out_of_range(ViewGroupConfig, settings, f"{path}.{group}.")
                messages += _view_mistakes(settings, f"{path}.{group}")
        else:
            messages += range_mistake(path, value, facts_in(f))
    return messages


def range_mistake(path: str, value: Any, limits: KeyFacts) -> list[str]:
    """Returns the sentence of a value, or of an entry of a list, that is past its limits; nothing for one that is not."""
    if OmegaConf.is_list(value) or isinstance(value, list):  # a plain one: the default within an interpolation
        if not value and limits.filled:
            return [f"{path}=[]: expected at least one value"]
        return [mistake for entry in value for mistake in range_mistake(path, entry, limits)][:_MOST_ENTRIES]
    if limits.choices and value not in limits.choices:
        choices = [str(choice) for choice in limits.choices]
        return [f"{path}={value}: expected one of {', '.join(choices)}{nearest(str(value), choices)}"]
    if (limits.low, limits.high, limits.above) != (None, None, None) and not is_number(value):
        return [f"{path}={short(value)}: expected a number"]
    for bound, holds, relation in (
        (limits.low, operator.ge, "at least"),
        (limits.high, operator.le, "at most"),
        (limits.above, operator.gt, "more than"),
    ):
        if bound is not None and not holds(value, bound):
            return [f"{path}={value}: expected {relation} {bound}"]
    return []


def _view_mistakes(settings: DictConfig, path: str) -> list[str]:
    messages = []
    for name in ("jitter", "blur", "solarize"):
        probability = settings[name].probability
        is_list = OmegaConf.is_list(probability)
        values = list(probability) if is_list else [probability]
        if is_list and len(values) != settings.count:
            messages.append(f"{path}.{name}.probability has {len(values)} entries for {settings.count} views")
        if not all(isinstance(p, int | float) and 0 <= p <= 1 for p in values):
            messages.append(f"{path}.{name}.probability={short(probability)}: expected numbers between 0 and 1")
    for name, low, high in (("scale", 0, 1), ("ratio", 0, 100)):
        pair = list(settings[name])
        if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
            messages.append(
                f"{path}.{name}={short(pair)}: expected two rising numbers, more than {low} and at most {high}"
            )
    return messages


def _protocol_mistakes(schema: type, config: DictConfig, references: set[str]) -> list[str]:
    """Checks protocols.NAME.KEY by the range of NAME.KEY, or of the verb's own KEY, for which it stands.

    references: paths of what refers to another key, whose mistake is that key's alone.
    """
    messages, verb = [], _typed_keys(schema)
    for name, node in (config.get("protocols") or {}).items():
        if isinstance(node, DictConfig) and is_below(str(node.get("_target_")), ["sslctl"]):
            own = verb[name][1] if name in verb else None
            messages += _mistakes_below(node, verb | _typed_keys(own), f"protocols.{name}", references)
    return messages


def _mistakes_below(
    node: DictConfig, typed: dict[str, tuple[KeyFacts, Any]], path: str, references: set[str]
) -> list[str]:
    messages = []
    for key in node:
        if key in typed and f"{path}.{key}" not in references and node[key] is not None:
            facts, hint = typed[key]
            if isinstance(node[key], DictConfig):
                messages += _mistakes_below(node[key], _typed_keys(hint), f"{path}.{key}", references)
            else:
                messages += range_mistake(f"{path}.{key}", node[key], facts)
    return messages


def _typed_keys(schema: Any) -> dict[str, tuple[KeyFacts, Any]]:
    """Returns the facts and the types of a schema's keys; none of what is no schema."""
    if not is_dataclass(schema):
        return {}
    hints = typing.get_type_hints(schema)
    return {f.name: (facts_in(f), hints[f.name]) for f in fields(schema)}


def _trainer_mistakes(trainer: DictConfig) -> list[str]:
    parts = trainer.processes * trainer.accumulate_steps
    if parts < 1 or trainer.batch_size % parts == 0:
        return []
    return [
        f"trainer.batch_size={trainer.batch_size} does not divide by trainer.processes={trainer.processes} ×"
        f" trainer.accumulate_steps={trainer.accumulate_steps}"
    ]


def _scheduler_mistakes(scheduler: DictConfig) -> list[str]:
    messages = []
    for key in [k for k in scheduler if k.endswith("_epochs")]:
        twin = key.replace("_epochs", "_steps")
        if scheduler[key] is not None and scheduler.get(twin) is not None:
            messages.append(
                f"scheduler.{key} and scheduler.{twin} are both set: at most one may be (null for the other)"
            )
    return messages
