"""Kinds of values: whether one from YAML or a command line may be given where a type is asked for, and both in words."""

import math
import types
import typing
from typing import Any

_LARGEST = 2**63  # whole numbers below it fit into a tensor, an index, a file's size
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    list: "a list",
    dict: "a dictionary",
    type(None): "null",
}
_LONGEST = 200  # characters of a value's text
_MANY = {int: "whole numbers", float: "numbers", str: "words", list: "lists"}


def fits(value: Any, hint: Any) -> bool:
    """Tells whether a plain value may be given where a parameter or key has this annotation; what is not plain is not judged."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(fits(value, option) for option in typing.get_args(hint))
    arguments, hint = typing.get_args(hint), typing.get_origin(hint) or hint
    if hint is typing.Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint in (list, tuple):  # YAML has no tuples
        entry = arguments[0] if arguments else Any
        return isinstance(value, list) and all(fits(item, entry) for item in value)
    if hint is dict:
        entry = arguments[-1] if arguments else Any
        return isinstance(value, dict) and all(fits(item, entry) for item in value.values())
    return True


def describe(hint: Any) -> str:
    """Describes an annotation in words: list[int] | None -> 'a list of whole numbers or null'."""
    arguments, hint = typing.get_args(hint), typing.get_origin(hint) or hint
    if hint in (types.UnionType, typing.Union):
        return " or ".join(describe(option) for option in arguments)
    if hint is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if hint in (list, tuple):
        return f"a list of {_MANY[arguments[0]]}" if arguments and arguments[0] in _MANY else "a list"
    return _WORDS.get(hint or type(None), getattr(hint, "__name__", str(hint)))


def kind_of(value: Any) -> str:
    """Names the kind of a value in words."""
    from omegaconf import OmegaConf

    if OmegaConf.is_list(value):
        return "a list"
    return _WORDS.get(type(value), "a dictionary")


def short(value: Any) -> str:
    """Returns a value's text, cut where it is a whole node's."""
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def is_number(value: Any) -> bool:
    """Tells whether a value is a number. true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_usable(value: Any) -> bool:
    """Tells whether a value is no number, or one to calculate with: finite, and no larger than a tensor can hold."""
    if not is_number(value):
        return True
    return math.isfinite(value) if isinstance(value, float) else abs(value) < _LARGEST
