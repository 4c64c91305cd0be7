"""From a `_target_` to a callable and its arguments: only from allowed packages, and only when the signature fits."""

import importlib
import inspect
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sslctl.config.keys import own_keys
from sslctl.config.kinds import describe, fits, short
from sslctl.errors import InputError, first_line, nearest

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
        whose = "cannot be named by a file" if is_below(name, ["sslctl"]) else "is not sslctl's own"
        words = allow_advice(name)
        advice = re.findall(r"allow=\[[\w.]+\]", words)
        raise InputError(f"{path}._target_={name} {whose}: {words}", advice=advice)


def allow_advice(name: str) -> str:
    """Returns what to do about a name of somebody's code, or which of sslctl's own a file may name."""
    if is_below(name, ["sslctl"]) or not all(part.isidentifier() for part in name.split(".")):
        return f"expected a class or function of {', '.join(_OWN)}, or of a package that allow= names"
    return f"add allow=[{name.split('.')[0]}] to the command if you trust it"


def target_of(node: DictConfig, path: str) -> Any:
    """Imports the class or function that a node's `_target_` names. Raises InputError outside the allowed packages."""
    name = node.get("_target_") if isinstance(node, Mapping) else None
    if not name:
        raise InputError(f"{path} has no _target_")
    _refuse_other(name, path)
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: a name without a module
        raise InputError(f"{path}._target_={name} cannot be imported: {error}") from error
    if not callable(target):
        raise InputError(f"{path}._target_={name}: expected a class or function")
    # A module of ours imports tools of others, which a file must not reach through it.
    if not is_below(name, allowed_by_user()) and not is_below(str(getattr(target, "__module__", "")), _OWN):
        raise InputError(f"{path}._target_={name} is not defined there")
    return target


def bind(node: DictConfig, path: str, *, given: tuple[str, ...] = (), kind: type | None = None) -> tuple[Any, dict]:
    """Returns a node's target and its arguments, checked against the signature before anything is built.

    Keys that sslctl reads itself are left out. A parameter that is a dataclass takes the keys that are its fields. given:
    arguments that the caller adds. kind: what a class must be derived from.
    Raises InputError with every mismatch: unknown names with the nearest one, missing arguments, wrong types.
    """
    target = target_of(node, path)
    if kind and inspect.isclass(target) and not issubclass(target, kind):
        raise InputError(f"{path}._target_={node.get('_target_')}: expected a {kind.__name__}")
    arguments = {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in node.items()
        if key not in ("_target_", *own_keys(path))
    }
    parameters, hints = dict(inspect.signature(target).parameters), _hints(target)
    of_keys = {name: hints[name] for name in parameters if name not in given and is_dataclass(hints.get(name))}
    for name, kind in of_keys.items():
        del parameters[name]
        parameters |= inspect.signature(kind).parameters
        hints |= _hints(kind)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    messages = []
    for key, value in arguments.items():
        if key not in parameters and not takes_any:
            messages.append(
                f"{path}.{key} is not an argument of {target.__name__}{nearest(key, set(parameters) - set(given))}"
            )
        elif key in hints and not fits(value, hints[key]):
            messages.append(f"{path}.{key}={short(value)}: {target.__name__} expects {describe(hints[key])}")
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and name not in arguments and name not in given:
            messages.append(f"{path}.{name} is missing: {target.__name__} needs it")
    if messages:
        raise InputError(*messages)
    for name, kind in of_keys.items():
        own = {field.name: arguments.pop(field.name) for field in fields(kind) if field.name in arguments}
        arguments[name] = kind(**own)
    return target, arguments


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # somebody's annotations that are read by a type checker alone
        return {}


def build(path: str, target: Any, *given: Any, **arguments: Any) -> Any:
    """Calls a bound target. What it raises is about the values it gets, which are the user's: InputError names those."""
    try:
        return target(*given, **arguments)
    except Exception as error:
        if type(error).__module__.partition(".")[0] == "sslctl":  # it says itself what it is about
            raise
        raise InputError(_cannot_build(path, target, error)) from error


def _cannot_build(path: str, target: Any, error: Exception) -> str:
    """Says what cannot be built, of which words of the command line, and why where the reason was written to be read."""
    from sslctl.config.command_line import task_words

    words = [word for word in task_words() if word.lstrip("+").startswith(f"{path}.")]
    values = f" with {' '.join(words)}" if words else ""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return f"{path}: {target.__name__} is larger than the memory{values}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{path}: {error.filename}: {error.strerror}"
    if isinstance(error, ValueError | RuntimeError) and not isinstance(error, NotImplementedError):
        return f"{path}{values}: {first_line(error)}" if not str(error).startswith(f"{path}.") else first_line(error)
    return f"{path}: {target.__name__} cannot be built{values}: SSLCTL_DEBUG=1 shows why"
