"""From a `_target_` to a callable and its arguments: only from allowed packages, and only when the signature fits."""

import importlib
import inspect
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sslctl.config.keys import own_keys
from sslctl.errors import InputError, nearest

# What a file may name by itself: parts, not the commands and tools around them.
_OWN = ("sslctl.data", "sslctl.models", "sslctl.methods", "sslctl.evaluation", "sslctl.training.optim", "torch.optim")
_allowed: list[str] = [*_OWN]


def allow(packages: list[str], directories: list[Path]) -> None:
    """Lets `_target_` reach the user's own packages, looked for in these directories too. The command line's only."""
    _allowed.extend(package for package in packages if package not in _allowed)
    sys.path.extend(str(d) for d in directories if packages and str(d) not in sys.path)


def allowed_by_user() -> list[str]:
    """Returns the packages that the command line allowed."""
    return _allowed[len(_OWN) :]


def is_below(name: str, packages: Iterable[str]) -> bool:
    """Tells whether a dotted name is one of these packages or in one of them."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def refuse_targets(config: Any, path: str = "") -> None:
    """Raises InputError for a `_target_` outside the allowed packages anywhere in a configuration, read by code or not."""
    if isinstance(config, DictConfig) and config.get("_target_") is not None:
        _refuse_other(config.get("_target_"), path)
    for key in config if isinstance(config, DictConfig) else range(len(config)):
        if OmegaConf.is_config(value := None if OmegaConf.is_missing(config, key) else config[key]):
            refuse_targets(value, f"{path}.{key}".lstrip("."))


def _refuse_other(name: Any, path: str) -> None:
    if not isinstance(name, str):
        raise InputError(f"{path}._target_={name}: expected the name of a class or function")
    if not is_below(name, _allowed):
        raise InputError(f"{path}._target_={name} is not sslctl's own: {allow_advice(name)}")


def allow_advice(name: str) -> str:
    """Returns what to do about a name of somebody's code."""
    return f"add allow=[{name.split('.')[0]}] to the command if you trust it"


def target_of(node: DictConfig, path: str) -> Any:
    """Imports the class or function that a node's `_target_` names. Raises InputError outside the allowed packages."""
    name = node.get("_target_")
    if not name:
        raise InputError(f"{path} has no _target_")
    _refuse_other(name, path)
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: a name without a module
        raise InputError(f"{path}._target_={name} cannot be imported: {error}") from error
    # A module of ours imports tools of others, which a file must not reach through it.
    if not is_below(name, allowed_by_user()) and not is_below(str(getattr(target, "__module__", "")), _OWN):
        raise InputError(f"{path}._target_={name} is not defined there")
    return target


def bind(node: DictConfig, path: str, *, given: tuple[str, ...] = ()) -> tuple[Any, dict]:
    """Returns a node's target and its arguments, checked against the signature before anything is built.

    Keys that sslctl reads itself are left out. given: arguments that the caller adds. Raises InputError with every mismatch:
    unknown names with the nearest one, missing arguments, wrong types.
    """
    target = target_of(node, path)
    arguments = {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in node.items()
        if key not in ("_target_", *own_keys(path))
    }
    parameters = inspect.signature(target).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    messages = []
    for key, value in arguments.items():
        if key not in parameters and not takes_any:
            messages.append(
                f"{path}.{key} is not an argument of {target.__name__}{nearest(key, set(parameters) - set(given))}"
            )
        elif key in hints and not _fits(value, hints[key]):
            messages.append(f"{path}.{key}={value}: {target.__name__} expects {_describe(hints[key])}")
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and name not in arguments and name not in given:
            messages.append(f"{path}.{name} is missing: {target.__name__} needs it")
    if messages:
        raise InputError(*messages)
    return target, arguments


def _fits(value: Any, hint: Any) -> bool:
    """Tells whether a YAML value may be given where a parameter has this annotation; what is not plain is not judged."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, dict):
        return isinstance(value, hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    return True


def _describe(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
