"""Checks of a composed configuration. The keys themselves: schema.py and nodes.py.

Nothing in this file needs torch.
"""

import operator
import typing
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sslctl.config.keys import UNTYPED, KeyFacts, facts_in
from sslctl.config.nodes import ViewGroupConfig
from sslctl.errors import nearest


def mistakes(schema: type, config: DictConfig) -> list[str]:
    """Lists every value of a composed configuration that is missing, out of range or contradicts another one."""
    messages = _out_of_range(schema, config, "")
    if "probe" in config:
        messages += [
            f"probe.{key} is empty: name at least one value" for key in ("lr", "weight_decay") if not config.probe[key]
        ]
    if "optimizer" in config:
        messages += _optimizer_mistakes(config)
    if "trainer" in config:
        messages += _trainer_mistakes(config.trainer)
    return messages


def _out_of_range(schema: type, config: DictConfig, prefix: str) -> list[str]:
    messages = []
    hints = typing.get_type_hints(schema)
    for f in fields(schema):
        path = f"{prefix}{f.name}"
        if OmegaConf.is_missing(config, f.name):
            messages.append(f"{path} has no value: no configuration file of this verb sets it")
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
            messages += _range_mistake(path, value, facts_in(f))
    return messages


def _range_mistake(path: str, value: Any, limits: KeyFacts) -> list[str]:
    if OmegaConf.is_list(value):
        return [mistake for entry in value for mistake in _range_mistake(path, entry, limits)]
    if limits.choices and value not in limits.choices:
        return [f"{path}={value}: expected one of {', '.join(limits.choices)}{nearest(str(value), limits.choices)}"]
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
        listed = OmegaConf.is_list(probability)
        values = list(probability) if listed else [probability]
        if listed and len(values) != settings.count:
            messages.append(f"{path}.{name}.probability has {len(values)} entries for {settings.count} views")
        if not all(isinstance(p, int | float) and 0 <= p <= 1 for p in values):
            messages.append(f"{path}.{name}.probability={probability}: expected numbers between 0 and 1")
    for name, low, high in (("scale", 0, 1), ("ratio", 0, 100)):
        pair = list(settings[name])
        if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
            messages.append(f"{path}.{name}={pair}: expected two rising numbers, more than {low} and at most {high}")
    return messages


def _trainer_mistakes(trainer: DictConfig) -> list[str]:
    parts = trainer.processes * trainer.accumulate_steps
    if parts < 1 or trainer.batch_size % parts == 0:
        return []
    return [
        f"trainer.batch_size={trainer.batch_size} does not divide by trainer.processes={trainer.processes} ×"
        f" trainer.accumulate_steps={trainer.accumulate_steps}"
    ]


def _optimizer_mistakes(config: DictConfig) -> list[str]:
    optimizer, scheduler, messages = config.optimizer, config.scheduler, []
    for key in ("base_lr", "weight_decay", "lr_scaling"):
        limits = UNTYPED[f"optimizer.{key}"]
        if isinstance(optimizer[key], str) and not limits.choices:
            messages.append(f"optimizer.{key}={optimizer[key]}: expected a number")
        else:
            messages += _range_mistake(f"optimizer.{key}", optimizer[key], limits)
    for key in [k for k in scheduler if k.endswith("_epochs")]:
        twin = key.replace("_epochs", "_steps")
        if scheduler[key] is not None and scheduler.get(twin) is not None:
            messages.append(
                f"scheduler.{key} and scheduler.{twin} are both set: at most one may be (null for the other)"
            )
    return messages
