"""What the files of a run directory hold, format 1: the keys of each, with the types of their values.

A schema is a dict of key → type: a key with a ? may be missing, and beside `...` there may be others.
"""

import math
import types
import typing
from typing import Any

CONFIG_KEYS = {  # config.yaml: the resolved configuration, whose parts the code that uses them checks
    "seed": int,
    "names": {"dataset": str, "method": str, "backbone": str, ...: Any},
    **dict.fromkeys(("dataset", "method", "backbone", "trainer"), dict),
    "scheduler": {"warmup_steps?": float | None, "warmup_epochs?": float | None, ...: Any},
    "eval_dataset?": dict | None,
    ...: Any,
}
SIZE = int | list[int]  # of images: a side, or [height, width]
FACTS_KEYS = dict.fromkeys(
    ("channels", "num_images", "num_classes", "batch_size", "steps_per_epoch", "total_steps"), int
) | {"image_size": SIZE}
HEALTH_KEYS = {
    **dict.fromkeys(("num_classes?", "majority?", "knn_images?"), float),
    **dict.fromkeys(("uninformative_loss?", "feature_dim?"), float | None),
}
ENVIRONMENT_KEYS = {
    **dict.fromkeys(("command", "cwd", "host", "platform", "started"), str),
    "cpus": int | None,
    "versions": dict[str, str],
    "hashes?": dict[str, str],
    "facts": FACTS_KEYS,
    "known?": HEALTH_KEYS,
    "segments?": list[dict],
}
IMAGE_KEYS = {
    **dict.fromkeys(("channels", "resize"), int),
    "image_size": SIZE,
    **dict.fromkeys(("mean", "std"), list[float]),
    "value_range?": list[float] | None,
}
TEXT_KEYS = {"vocabulary": int, "length": int, "tokenizer": str, "resize?": None}
STOPPED_KEYS = {"reason": str}

_NAMES = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", type(None): "null"}
_NAMES |= {dict: "an object", list: "a list"}


def preprocess_keys(saved: Any) -> dict:
    """Returns the schema of a preprocess.json: of texts, or of images and frames."""
    return TEXT_KEYS if isinstance(saved, dict) and "vocabulary" in saved else IMAGE_KEYS


def misfit(value: Any, expected: Any, name: str = "") -> str | None:
    """Says in which way a parsed value is not of a type or schema, by its name and what was found; None where it is."""
    if isinstance(expected, dict):
        return _object_misfit(value, expected, name)
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (types.UnionType, typing.Union):
        reasons = [misfit(value, one, name) for one in arguments]
        return None if None in reasons else reasons[0]
    if origin is list and isinstance(value, list):
        return next((m for i, v in enumerate(value) if (m := misfit(v, arguments[0], f"{name}[{i}]"))), None)
    if origin is dict and isinstance(value, dict):
        return next((m for k, v in value.items() if (m := misfit(v, arguments[1], f"{name}.{k}"))), None)
    kind = types.NoneType if expected is None else origin or expected
    if kind is Any or (type(value) is kind and (kind is not float or math.isfinite(value))):
        return None
    if kind is float and type(value) is int and abs(value) < 2**63:
        return None
    return f"{name + ': ' if name else ''}expected {_NAMES[kind]}, found {_brief(value)}"


def _object_misfit(value: Any, schema: dict, name: str) -> str | None:
    if not isinstance(value, dict):
        return misfit(value, dict, name)
    keys = {key.removesuffix("?"): kind for key, kind in schema.items() if key is not ...}
    missing = [key for key in schema if key is not ... and not key.endswith("?") and key not in value]
    unknown = [] if ... in schema else [key for key in value if key not in keys]
    lists = (("without", missing), ("with unknown", unknown))
    parts = [f"{words} {', '.join(sorted(map(str, listed))[:5])}" for words, listed in lists if listed]
    if parts:
        return f"{name + ' ' if name else ''}{' and '.join(parts)}"
    prefix = f"{name}." if name else ""
    return next((m for k, kind in keys.items() if k in value and (m := misfit(value[k], kind, prefix + k))), None)


def _brief(value: Any) -> str:
    """Returns a value in a few characters, lists and objects by their kind."""
    if isinstance(value, dict | list):
        return _NAMES[type(value)]
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
