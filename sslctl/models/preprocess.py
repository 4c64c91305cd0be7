"""What a backbone expects of a sample, kept beside its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from sslctl.data.files import as_8_bit
from sslctl.data.modality import IMAGES, TEXTS, VIDEOS, Modality
from sslctl.data.sources import Source
from sslctl.data.text import TextTransform
from sslctl.errors import InputError
from sslctl.models.backbones import Backbone
from sslctl.models.network import Network
from sslctl.runs.schema import misfit, preprocess_keys
from sslctl.views.maker import resize_and_crop


@dataclass(frozen=True)
class Preprocess:
    """How an image, or a frame of a video, becomes the backbone's input. Sizes in pixels."""

    channels: int
    image_size: int
    resize: int  # of the shorter side, before the central square is cut out
    mean: list[float]  # of images in [0, 1], one a channel; the backbone applies them itself
    std: list[float]
    value_range: list[float] | None = None  # (low, high) that become 0 and 1, of images of more than 8 bits
    modality: ClassVar[Modality] = IMAGES

    @classmethod
    def of(cls, node: Any, source: Source) -> "Preprocess":
        """Raises InputError where the dataset's configuration does not fit its images."""
        for key in ("mean", "std"):
            if len(node[key]) != source.channels:
                raise InputError(f"dataset.{key} has {len(node[key])} values for {source.channels} channels")
        size = source.image_size
        resize = node.get("resize") or (size if source.all_of_one_size else round(size * 256 / 224))
        if resize < size:
            raise InputError(f"dataset.resize={resize} is less than the image size {size}")
        values = list(source.value_range) if source.value_range else None
        return cls(source.channels, size, resize, list(node.mean), list(node.std), values)

    def summary(self) -> str:
        cut = "" if self.resize == self.image_size else f", shorter side to {self.resize}, central square"
        return f"{self.channels}×{self.image_size}×{self.image_size}{cut}"

    def to_backbone(self, network: Network) -> Backbone:
        return Backbone(network, self.mean, self.std)

    def to_transform(self, tokenizer: Path) -> "Transform":
        """tokenizer: the file beside the weights; images have none."""
        return Transform(self)

    def example(self, device: torch.device) -> Tensor:
        """(2, C, S, S) of zeros."""
        return torch.zeros(2, self.channels, self.image_size, self.image_size, device=device)

    def noise(self, count: int, generator: Generator) -> Tensor:
        """(count, C, S, S) in [0, 1], inputs that no two networks treat alike."""
        return torch.rand(count, self.channels, self.image_size, self.image_size, generator=generator)

    def refuse_other(self, what: str, source: Source, key: str) -> None:
        """Raises InputError for images of another size than in pretraining: they are refused, not converted silently."""
        _refuse_other_modality(what, self, source)
        if (source.channels, source.image_size) != (self.channels, self.image_size):
            size = f"{source.channels}×{source.image_size}×{source.image_size}"
            channels = "" if source.channels == self.channels else f" and {key}.channels={self.channels}"
            raise InputError(
                f"{what} takes {self.summary()}, {source.name} has {size} images:"
                f" set {key}.image_size={self.image_size}{channels}"
            )


@dataclass(frozen=True)
class TextPreprocess:
    """How a text becomes the backbone's input: `length` ids below `vocabulary`, by the tokenizer beside the weights.

    tokenizer: its hash.
    """

    vocabulary: int
    length: int
    tokenizer: str
    resize: None = None
    modality: ClassVar[Modality] = TEXTS

    @classmethod
    def of(cls, node: Any, source: Source) -> "TextPreprocess":
        return cls(source.vocabulary, source.image_size, source.tokenizer_hash)

    def summary(self) -> str:
        return f"{self.length} tokens of {self.vocabulary:,}"

    def to_backbone(self, network: Network) -> Backbone:
        return Backbone(network)

    def to_transform(self, tokenizer: Path) -> TextTransform:
        return TextTransform(tokenizer, self.length)

    def example(self, device: torch.device) -> Tensor:
        """(2, L) of zeros."""
        return torch.zeros(2, self.length, dtype=torch.int64, device=device)

    def noise(self, count: int, generator: Generator) -> Tensor:
        """(count, L) ids, without the padding."""
        return torch.randint(1, self.vocabulary, (count, self.length), generator=generator)

    def refuse_other(self, what: str, source: Source, key: str) -> None:
        """Raises InputError for texts of another tokenizer, whose ids the backbone does not know."""
        _refuse_other_modality(what, self, source)
        if (source.vocabulary, source.image_size) != (self.vocabulary, self.length):
            raise InputError(
                f"{what} takes {self.summary()}, {source.name} has {source.image_size} of {source.vocabulary:,}:"
                f" {key}.tokenizer=RUN/tokenizer.json {key}.length={self.length}"
            )
        if source.tokenizer_hash != self.tokenizer:
            raise InputError(
                f"{what} knows the ids of another tokenizer than {source.name}: {key}.tokenizer=RUN/tokenizer.json"
            )


_CLASSES = {IMAGES: Preprocess, VIDEOS: Preprocess, TEXTS: TextPreprocess}  # a network sees one frame of a video


def _refuse_other_modality(what: str, preprocess: Preprocess | TextPreprocess, source: Source) -> None:
    if not isinstance(preprocess, _CLASSES[source.modality]):
        raise InputError(f"{what} takes {preprocess.modality.plural}, {source.name} has {source.summary()}")


def preprocess_of(node: Any, source: Source) -> Preprocess | TextPreprocess:
    """Returns what a backbone gets to see of a dataset. node: the dataset's configuration."""
    return _CLASSES[source.modality].of(node, source)


def preprocess_from(saved: dict[str, Any]) -> Preprocess | TextPreprocess:
    """Reads what was saved as `vars` of a preprocess. Raises InputError for other keys and values."""
    kind, keys = TextPreprocess if "vocabulary" in saved else Preprocess, preprocess_keys(saved)
    if reason := misfit(saved, keys):
        raise InputError(f"preprocess {reason}; expected what {kind.__name__} holds")
    return kind(**saved)


class Transform:
    """One image to the backbone's input."""

    def __init__(self, settings: Preprocess):
        self.settings = settings

    def __call__(self, image: Image.Image | np.ndarray | Tensor) -> Tensor:
        """A PIL image, (H, W, C) uint8 array or (C, H, W) uint8 tensor -> (C, S, S) float in [0, 1]."""
        if isinstance(image, Image.Image):
            image = np.asarray(
                as_8_bit(image, self.settings.value_range).convert("L" if self.settings.channels == 1 else "RGB")
            )
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(image.copy())
            image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != self.settings.channels:
            raise InputError(
                f"expected ({self.settings.channels}, H, W) uint8, found {tuple(image.shape)} {image.dtype}"
            )
        return resize_and_crop(image, self.settings.image_size, self.settings.resize).float() / 255
