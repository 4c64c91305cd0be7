"""What is known about a configuration's keys beside their types. Typed keys carry it in their field (schema.py); those of free
nodes stand in UNTYPED."""

import functools
import typing
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

ALWAYS_COUNTS = object()
# Of a view's operations, in their order: what a dataset can drop.
OPERATIONS = ("flip", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize")


@dataclass(frozen=True)
class KeyFacts:
    """low <= value <= high, value > above, or value among the choices; and who cares about the value."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple = ()
    fingerprint: bool = True  # False: cannot change a weight, as moving the data or watching more closely
    # Of a key that a later version adds: the value that reproduces what runs did before. It is left out of the fingerprint, so
    # that the runs of earlier versions, whose config.yaml lacks the key, continue.
    old_behaviour: Any = ALWAYS_COUNTS
    path: bool = False  # a file or folder: anything may stand in its name
    own: bool = False  # sslctl reads it: not an argument of the node's _target_
    free: bool = False  # a dictionary that takes new keys
    optional: bool = False  # a choice of a file that may be null
    several: bool = False  # a choice of several files
    filled: bool = False  # a list of one value at least
    hint: Any = Any  # its type, where neither a schema nor the signature of a _target_ says it


UNTYPED = {
    "experiment": KeyFacts(optional=True),
    "as_typed": KeyFacts(fingerprint=False),  # roots, in the config.yaml of a run
    "dataset@eval_dataset": KeyFacts(optional=True),
    "protocols": KeyFacts(several=True),
    "dataset.root": KeyFacts(path=True, fingerprint=False),
    "dataset.splits": KeyFacts(free=True, old_behaviour=None),
    "dataset.label": KeyFacts(path=True, old_behaviour=None),  # a pattern is written as freely as a path
    "dataset.columns": KeyFacts(free=True),
    "dataset.separator": KeyFacts(path=True),
    "dataset.range": KeyFacts(old_behaviour=None),
    "dataset.on_error": KeyFacts(choices=("raise", "skip"), fingerprint=False),  # a row keeps its place
    "dataset.max_bad": KeyFacts(low=0, fingerprint=False),
    "dataset.skip": KeyFacts(path=True, fingerprint=False),
    "dataset.verify": KeyFacts(fingerprint=False),
    "dataset.class_list": KeyFacts(path=True),
    "dataset.memory_gb": KeyFacts(fingerprint=False, low=0),
    "dataset.download": KeyFacts(fingerprint=False),
    "dataset.image_size": KeyFacts(low=1, high=16384),
    "dataset.channels": KeyFacts(low=1, high=16),
    "dataset.bands": KeyFacts(old_behaviour=None),
    "dataset.tiles": KeyFacts(free=True, old_behaviour=None),
    "dataset.scale": KeyFacts(own=True, fingerprint=False, hint=dict),  # what methods take of it counts itself
    "dataset.drops": KeyFacts(own=True, hint=list[str], choices=OPERATIONS),
    "dataset.mean": KeyFacts(own=True, hint=list[float] | None),
    "dataset.std": KeyFacts(own=True, hint=list[float] | None, above=0),
    "dataset.resize": KeyFacts(own=True, hint=int | None, low=1, high=16384),
    "eval_dataset.root": KeyFacts(path=True),
    "eval_dataset.splits": KeyFacts(free=True),
    "eval_dataset.label": KeyFacts(path=True),
    "eval_dataset.skip": KeyFacts(path=True),
    "eval_dataset.columns": KeyFacts(free=True),
    "eval_dataset.separator": KeyFacts(path=True),
    "eval_dataset.class_list": KeyFacts(path=True),
    "backbone.weights": KeyFacts(own=True, path=True, fingerprint=False, hint=str | None),  # their content counts
    "backbone.partial": KeyFacts(own=True, hint=bool),
    "backbone.pretrained": KeyFacts(own=True, fingerprint=False, hint=bool),
    "backbone.normalization": KeyFacts(  # the content of weights counts, their mean and std among it
        own=True, fingerprint=False, hint=str | None, choices=("weights", "dataset")
    ),
    "backbone.resample_patches": KeyFacts(own=True, hint=bool, old_behaviour=False),
    "backbone.freeze": KeyFacts(own=True, hint=int | str | list[str] | None, old_behaviour=None),
    "backbone.freeze_epochs": KeyFacts(own=True, hint=float | None, above=0, old_behaviour=None),
    "backbone.lora": KeyFacts(own=True, hint=dict | None, old_behaviour=None),
    "backbone.lora.rank": KeyFacts(hint=int, low=0, old_behaviour=0),
    "backbone.lora.alpha": KeyFacts(hint=float, above=0, old_behaviour=16.0),
    "backbone.lora.targets": KeyFacts(hint=list[str], old_behaviour=["qkv", "proj"]),
    "backbone.kwargs": KeyFacts(free=True),
    "optimizer.base_lr": KeyFacts(own=True, hint=float, above=0),
    "optimizer.lr_scaling": KeyFacts(own=True, choices=("linear", "sqrt", "none")),
    "optimizer.weight_decay": KeyFacts(own=True, hint=float, low=0),
    "optimizer.weight_decay_end": KeyFacts(own=True, hint=float | None, low=0),
    "optimizer.exclude_bias_and_norm": KeyFacts(own=True, hint=bool),
    "optimizer.vector_lr_scale": KeyFacts(own=True, hint=float, low=0),
    "optimizer.layer_decay": KeyFacts(own=True, hint=float, above=0, high=1, old_behaviour=1.0),
    "scheduler.shape": KeyFacts(hint=str),
    "scheduler.warmup_epochs": KeyFacts(hint=float | None, low=0),
    "scheduler.warmup_steps": KeyFacts(hint=int | None, low=0),
    "scheduler.end": KeyFacts(hint=float, low=0, high=1),
    "scheduler.stretch": KeyFacts(hint=float, low=1),
    "scheduler.period_epochs": KeyFacts(hint=float | None, above=0),
    "scheduler.period_steps": KeyFacts(hint=int | None, low=1),
    "scheduler.growth": KeyFacts(hint=float, low=1),
    "scheduler.every_epochs": KeyFacts(hint=float | None, above=0),
    "scheduler.every_steps": KeyFacts(hint=int | None, low=1),
    "scheduler.gamma": KeyFacts(hint=float, above=0, high=1),
    "scheduler.milestones_share": KeyFacts(hint=list[float] | None, above=0),
    "scheduler.milestones_epochs": KeyFacts(hint=list[float] | None, above=0),
    "scheduler.milestones_steps": KeyFacts(hint=list[int] | None, low=1),
    "method.teacher": KeyFacts(own=True, path=True, fingerprint=False, hint=str | None),  # its weights count
    "method.teacher_backbone": KeyFacts(own=True, hint=dict | None),
    "method.teacher_backbone.kwargs": KeyFacts(free=True),
    **{f"method.teacher_backbone.{name}": KeyFacts(fingerprint=False) for name in ("freeze", "freeze_epochs")},
    **{f"method.teacher_backbone.lora.{name}": KeyFacts(fingerprint=False) for name in ("rank", "alpha", "targets")},
    "method.teacher_mean": KeyFacts(own=True, hint=list[float] | None),
    "method.teacher_std": KeyFacts(own=True, hint=list[float] | None, above=0),
}
NOTHING_KNOWN = KeyFacts()


def key(**facts: Any) -> Any:
    """Declares a typed key with these KeyFacts; its value comes from configs/*.yaml."""
    return field(default=MISSING, metadata={"facts": KeyFacts(**facts)})


def node(schema: type, **facts: Any) -> Any:
    """Declares a typed node with these KeyFacts."""
    return field(default_factory=schema, metadata={"facts": KeyFacts(**facts)})


def facts_in(typed: Field) -> KeyFacts:
    """Returns the facts that a schema's field carries."""
    return typed.metadata.get("facts", NOTHING_KNOWN)


def facts_along(schema: type, path: str) -> list[KeyFacts]:
    """Returns the facts of a dotted path below a schema, of its outermost node first and of the key itself last."""
    parts, level, facts = path.split("."), schema, []
    for depth, name in enumerate(parts, start=1):
        typed = {f.name: f for f in fields(level)} if is_dataclass(level) else {}
        if name in typed:
            facts.append(facts_in(typed[name]))
            level = _hints(level)[name]
        else:
            facts.append(UNTYPED.get(".".join(parts[:depth]), NOTHING_KNOWN))
            level = typing.get_args(level)[-1] if typing.get_origin(level) is dict else None
    return facts


_hints = functools.cache(typing.get_type_hints)


def own_keys(name: str) -> tuple[str, ...]:
    """Returns the keys of a node that are not arguments of its _target_."""
    below = f"{name}."
    return tuple(path.removeprefix(below) for path, facts in UNTYPED.items() if facts.own and path.startswith(below))
