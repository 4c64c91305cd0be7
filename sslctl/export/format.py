"""What a format of export is: the network it is given, the file it writes, and the lines of Python that load it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sslctl.models.backbones import Backbone
from sslctl.models.preprocess import Preprocess, TextPreprocess

FILE = "FILE"  # stands in the lines for the file's path, quoted


@dataclass(frozen=True)
class Network:
    """What is exported.

    module: the features' whole calculation, normalisation inside: (B, C, S, S) in [0, 1], or (B, L) int64, -> (B, width).
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
    """Python that loads a file and applies what it holds to `images`; printed for the user, and run by the check."""

    load: list[str]
    use: str
    arrays: bool = False  # images are numpy's


@dataclass(frozen=True)
class Format:
    """lines: of a network, raises InputError where the format does not apply. write: the file, all of it.

    tensors: what the loaded `model` must hold to the bit; None where a format keeps no names.
    """

    suffix: str
    loader: str
    lines: Callable[[Network], Lines]
    write: Callable[[Network, Path], None]
    tensors: Callable[[Network], dict[str, Tensor]] | None
