"""What a format of export is: the network it is given, the file it writes, its loading, and the same in lines of Python.

The lines are for people. Nothing runs them: what they hold of a configuration are names and plain values, written by `arguments`.
"""

import keyword
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sslctl.errors import InputError, shown
from sslctl.models.backbones import Backbone
from sslctl.models.preprocess import Preprocess, TextPreprocess

FILE = "\0"  # stands in the lines for the file's path, quoted; no value's text has this character


@dataclass(frozen=True)
class Network:
    """What is exported.

    module: the features' whole calculation, normalisation inside: (B, C, H, W) in [0, 1], or (B, L) int64, -> (B, width).
    backbone: the one whose own output these features are, or None where a method makes more of them. pool: arguments of
    timm.create_model by which its output differs from that of the configuration `node`.
    """

    module: nn.Module
    backbone: Backbone | None
    pool: dict[str, Any]
    node: dict
    preprocess: Preprocess | TextPreprocess
    features: str
    width: int


@dataclass(frozen=True)
class Lines:
    """Python that loads a file and applies what it holds to `images`, as the user is told it."""

    load: list[str]
    use: str
    arrays: bool = False  # images are numpy's

    def script(self, file: Path) -> list[str]:
        """Returns all lines, for a file that lies there."""
        return [*(line.replace(FILE, repr(str(file))) for line in self.load), self.use]


@dataclass(frozen=True)
class Loaded:
    """A file as its own library reads it. model: None where it is no module. features: (B, …) of the input -> (B, D)."""

    model: nn.Module | None
    features: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """lines: of a network, raises InputError where the format does not apply. write: the file, all of it. load: what lines say.

    tensors: what the loaded model must hold to the bit; None where a format has no names for them.
    """

    suffix: str
    loader: str
    lines: Callable[[Network], Lines]
    write: Callable[[Network, Path], None]
    load: Callable[[Network, Path], Loaded]
    tensors: Callable[[Network], dict[str, Tensor]] | None


# --- Values of a configuration as Python ---


def arguments(*values: Any, **named: Any) -> str:
    """Writes the arguments of a call. Raises InputError for what is no name or no plain value."""
    for name in named:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise InputError(f"backbone.kwargs.{shown(name)}: expected the name of an argument")
    return ", ".join([*map(literal, values), *(f"{name}={literal(value, name)}" for name, value in named.items())])


def literal(value: Any, name: str = "value") -> str:
    """Writes a plain value: None, a boolean, a finite number, a string, or a list, tuple or dictionary of them."""
    if type(value) in (list, tuple):
        for entry in value:
            literal(entry, name)
    elif type(value) is dict:
        for pair in value.items():
            literal(pair, name)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise InputError(f"{name}={shown(repr(value))}: expected a plain value, found {type(value).__name__}")
    elif type(value) is float and not math.isfinite(value):
        raise InputError(f"{name}={value}: expected a finite number")
    return repr(value)
