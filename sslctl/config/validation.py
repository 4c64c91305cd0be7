"""Checks of a composed configuration, and the errors of bad input. The keys themselves: schema.py.

Nothing in this file needs torch.
"""

import operator
import typing
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sslctl.config.keys import UNTYPED, KeyFacts, facts_in
from sslctl.config.schema import ViewGroupConfig
from sslctl.errors import nearest


def mistakes(schema: type, config: DictConfig) -> list[str]:
    """Every value of a composed configuration that is missing, out of range or contradicts another one."""
    found = _out_of_range(schema, config, "")
    if "probe" in config:
        found += [
            f"probe.{key} is empty: name at least one value" for key in ("lr", "weight_decay") if not config.probe[key]
        ]
    if "optimizer" in config:
        found += _optimizer_mistakes(config)
    if "trainer" in config:
        found += _trainer_mistakes(config.trainer)
    return found


def _out_of_range(schema: type, config: DictConfig, prefix: str) -> list[str]:
    found = []
    hints = typing.get_type_hints(schema)
    for f in fields(schema):
        path = f"{prefix}{f.name}"
        if OmegaConf.is_missing(config, f.name):
            found.append(f"{path} has no value: no configuration file of this verb sets it")
            continue
        value = config[f.name]
        if value is None:
            continue
        if is_dataclass(hints[f.name]):
            found += _out_of_range(hints[f.name], value, f"{path}.")
        elif hints[f.name] == dict[str, ViewGroupConfig]:
            for group, settings in value.items():
                if group == "local" and OmegaConf.missing_keys(settings):
                    found.append(
                        f"{path}.local: this augmentation has no local views, which are asked for: augmentation=swav, dino"
                        " or lejepa"
                    )
                    continue
                found += _out_of_range(ViewGroupConfig, settings, f"{path}.{group}.")
                found += _view_mistakes(settings, f"{path}.{group}")
        else:
            found += _range_mistake(path, value, facts_in(f))
    return found


def _range_mistake(path: str, value: Any, limits: KeyFacts) -> list[str]:
    if OmegaConf.is_list(value):
        return [mistake for entry in value for mistake in _range_mistake(path, entry, limits)]
    if limits.choices and value not in limits.choices:
        return [f"{path}={value}: expected one of {', '.join(limits.choices)}{nearest(str(value), limits.choices)}"]
    for bound, holds, words in (
        (limits.low, operator.ge, "at least"),
        (limits.high, operator.le, "at most"),
        (limits.above, operator.gt, "more than"),
    ):
        if bound is not None and not holds(value, bound):
            return [f"{path}={value}: expected {words} {bound}"]
    return []


def _view_mistakes(settings: DictConfig, path: str) -> list[str]:
    found = []
    for name in ("jitter", "blur", "solarize"):
        probability = settings[name].probability
        listed = OmegaConf.is_list(probability)
        values = list(probability) if listed else [probability]
        if listed and len(values) != settings.count:
            found.append(f"{path}.{name}.probability has {len(values)} entries for {settings.count} views")
        if not all(isinstance(p, int | float) and 0 <= p <= 1 for p in values):
            found.append(f"{path}.{name}.probability={probability}: expected numbers between 0 and 1")
    for name, low, high in (("scale", 0, 1), ("ratio", 0, 100)):
        pair = list(settings[name])
        if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
            found.append(f"{path}.{name}={pair}: expected two rising numbers, more than {low} and at most {high}")
    return found


def _trainer_mistakes(trainer: DictConfig) -> list[str]:
    parts = trainer.processes * trainer.accumulate_steps
    if parts < 1 or trainer.batch_size % parts == 0:
        return []
    return [
        f"trainer.batch_size={trainer.batch_size} does not divide by trainer.processes={trainer.processes} ×"
        f" trainer.accumulate_steps={trainer.accumulate_steps}"
    ]


def _optimizer_mistakes(config: DictConfig) -> list[str]:
    optimizer, scheduler, found = config.optimizer, config.scheduler, []
    for key in ("base_lr", "weight_decay", "lr_scaling"):
        limits = UNTYPED[f"optimizer.{key}"]
        if isinstance(optimizer[key], str) and not limits.choices:
            found.append(f"optimizer.{key}={optimizer[key]}: expected a number")
        else:
            found += _range_mistake(f"optimizer.{key}", optimizer[key], limits)
    for key in [k for k in scheduler if k.endswith("_epochs")]:
        twin = key.replace("_epochs", "_steps")
        if scheduler[key] is not None and scheduler.get(twin) is not None:
            found.append(f"scheduler.{key} and scheduler.{twin} are both set: at most one may be (null for the other)")
    return found
