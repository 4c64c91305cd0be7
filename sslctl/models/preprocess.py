"""What a backbone expects of a sample, kept beside its weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslctl.data.sources import Source
from sslctl.errors import InputError
from sslctl.models.backbones import Backbone


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the backbone's input. Sizes in pixels."""

    channels: int
    image_size: int
    resize: int  # of the shorter side, before the central square is cut out
    mean: list[float]  # of images in [0, 1], one a channel; the backbone applies them itself
    std: list[float]

    def summary(self) -> str:
        cut = "" if self.resize == self.image_size else f", shorter side to {self.resize}, central square"
        return f"{self.channels}×{self.image_size}×{self.image_size}{cut}"

    def facts(self) -> dict[str, int]:
        """What the constructor of a network is told."""
        return {"channels": self.channels, "image_size": self.image_size}

    def to_backbone(self, network: nn.Module) -> Backbone:
        return Backbone(network, self.mean, self.std)

    def example(self, device: torch.device) -> Tensor:
        """(2, C, S, S) of zeros."""
        return torch.zeros(2, self.channels, self.image_size, self.image_size, device=device)

    def refuse_other(self, what: str, source: Source, key: str) -> None:
        """The backbone sees images as in pretraining: others are refused, not converted silently."""
        _refuse_other_kind(what, "tokens" in source.gives, "images", source)
        if (source.channels, source.image_size) != (self.channels, self.image_size):
            found = f"{source.channels}×{source.image_size}×{source.image_size}"
            channels = "" if source.channels == self.channels else f" and {key}.channels={self.channels}"
            raise InputError(
                f"{what} takes {self.summary()}, {source.name} has {found} images:"
                f" set {key}.image_size={self.image_size}{channels}"
            )


@dataclass(frozen=True)
class TextPreprocess:
    """How a text becomes the backbone's input: `length` ids below `vocabulary`, by the tokenizer beside the weights.

    tokenizer: its hash; empty in runs that did not keep it.
    """

    vocabulary: int
    length: int
    resize: None = None
    tokenizer: str = ""

    def summary(self) -> str:
        return f"{self.length} tokens of {self.vocabulary:,}"

    def facts(self) -> dict[str, int]:
        return {"vocabulary": self.vocabulary, "length": self.length}

    def to_backbone(self, network: nn.Module) -> Backbone:
        return Backbone(network)

    def example(self, device: torch.device) -> Tensor:
        """(2, L) of zeros."""
        return torch.zeros(2, self.length, dtype=torch.int64, device=device)

    def refuse_other(self, what: str, source: Source, key: str) -> None:
        """The backbone knows the ids of one tokenizer."""
        _refuse_other_kind(what, "tokens" not in source.gives, "texts", source)
        if (source.vocabulary, source.image_size) != (self.vocabulary, self.length):
            raise InputError(
                f"{what} takes {self.summary()}, {source.name} has {source.image_size} of {source.vocabulary:,}:"
                f" {key}.tokenizer=RUN/tokenizer.json {key}.length={self.length}"
            )
        if self.tokenizer and source.tokenizer_hash != self.tokenizer:
            raise InputError(
                f"{what} knows the ids of another tokenizer than {source.name}: {key}.tokenizer=RUN/tokenizer.json"
            )


def _refuse_other_kind(what: str, other: bool, kind: str, source: Source) -> None:
    if other:
        raise InputError(f"{what} takes {kind}, {source.name} has {source.summary()}")


def preprocess_of(node: Any, source: Source) -> Preprocess | TextPreprocess:
    """What the backbone gets to see of a dataset."""
    if source.gives == "tokens":
        return TextPreprocess(source.vocabulary, source.image_size, tokenizer=source.tokenizer_hash)
    for key in ("mean", "std"):
        if len(node[key]) != source.channels:
            raise InputError(f"dataset.{key} has {len(node[key])} values for {source.channels} channels")
    size = source.image_size
    resize = node.get("resize") or (size if source.all_of_one_size else round(size * 256 / 224))
    if resize < size:
        raise InputError(f"dataset.resize={resize} is less than the image size {size}")
    return Preprocess(source.channels, size, resize, list(node.mean), list(node.std))


def preprocess_from(saved: dict[str, Any]) -> Preprocess | TextPreprocess:
    """What `vars` of it was."""
    return TextPreprocess(**saved) if "vocabulary" in saved else Preprocess(**saved)
