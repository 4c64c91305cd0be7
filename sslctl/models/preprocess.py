"""What a backbone expects of a sample, kept beside its weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from sslctl.config.command_line import task_words
from sslctl.data.modality import IMAGES, TEXTS, VIDEOS, Modality
from sslctl.data.pixels import Reading, from_array, from_pillow
from sslctl.data.sources import Source
from sslctl.data.text import TextTransform
from sslctl.errors import InputError
from sslctl.models.backbones import Backbone
from sslctl.models.network import Network
from sslctl.ops.image_size import ImageSize, as_key, height_width, image_size_of, in_words, shape_in_words, shorter_side
from sslctl.runs.schema import misfit, preprocess_keys
from sslctl.views.maker import clean, resize_and_crop

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # of red, green and blue


@dataclass(frozen=True)
class Preprocess:
    """How an image, or a frame of a video, becomes the backbone's input. Sizes in pixels."""

    channels: int
    image_size: ImageSize  # a side, or (height, width)
    resize: int  # of the shorter side, before the central part is cut out
    mean: list[float]  # of images in [0, 1], one a channel; the backbone applies them itself
    std: list[float]
    value_range: list[float] | None = None  # (low, high) that become 0 and 1, of images of more than 8 bits
    modality: ClassVar[Modality] = IMAGES

    @classmethod
    def of(cls, node: Any, source: Source, trained: Callable[[], Source] | None = None) -> "Preprocess":
        """Raises InputError where the dataset's configuration does not fit its images. trained: see `statistics_of`."""
        mean, std = statistics_of(node, source, trained)
        size = source.image_size
        shorter = shorter_side(size)
        resize = node.get("resize") or (shorter if source.all_of_one_size else round(shorter * 256 / 224))
        if resize < shorter:
            raise InputError(f"dataset.resize={resize} is less than the image size {in_words(size)}")
        values = source.reading and source.reading.value_range
        return cls(source.channels, size, resize, mean, std, list(values) if values else None)

    def summary(self) -> str:
        shape = shape_in_words(self.channels, self.image_size)
        if self.resize == shorter_side(self.image_size):
            return shape
        part = "part" if isinstance(self.image_size, tuple) else "square"
        return f"{shape}, shorter side to {self.resize}, central {part}"

    def to_backbone(self, network: Network) -> Backbone:
        return Backbone(network, self.mean, self.std)

    def to_transform(self, tokenizer: Path) -> "Transform":
        """tokenizer: the file beside the weights; images have none."""
        return Transform(self)

    def example(self, device: torch.device) -> Tensor:
        """(2, C, H, W) of zeros."""
        return torch.zeros(2, self.channels, *height_width(self.image_size), device=device)

    def noise(self, count: int, generator: Generator) -> Tensor:
        """(count, C, H, W) in [0, 1], inputs that no two networks treat alike."""
        return torch.rand(count, self.channels, *height_width(self.image_size), generator=generator)

    def at(self, image_size: ImageSize) -> "Preprocess":
        """Returns what becomes the input of a network that is judged at another size: all lengths in proportion."""
        resize = round(self.resize * shorter_side(image_size) / shorter_side(self.image_size))
        return replace(self, image_size=image_size, resize=resize)

    def refuse_other(self, what: str, source: Source, key: str, *, judges: bool = False) -> None:
        """Raises InputError for images of another size than in pretraining: they are refused, not converted silently.

        judges: they are to be judged by, at another size where a key asks for it.
        """
        _refuse_other_modality(what, self, source)
        asked_for = source.image_size if judges and source.size_is_asked else self.image_size
        if (source.channels, source.image_size) == (self.channels, asked_for):
            return
        # A configuration takes size and channels of the run unless the command names others, or the dataset has no such key.
        named = {word.partition("=")[0] for word in task_words()}
        needed = {f"{key}.image_size": as_key(self.image_size), f"{key}.channels": self.channels}
        named |= {f"{key}.image_size"} if source.paths and source.image_size != self.image_size else set()
        advice = [f"{name}={value}" for name, value in needed.items() if name in named]
        size = shape_in_words(source.channels, source.image_size)
        what_to_do = f"set {' and '.join(advice)}" if advice else "name other images"
        raise InputError(f"{what} takes {self.summary()}, {source.name} has {size} images: {what_to_do}", advice=advice)


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
    def of(cls, node: Any, source: Source, trained: Callable[[], Source] | None = None) -> "TextPreprocess":
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

    def at(self, length: int) -> "TextPreprocess":
        """Returns itself: a text has one length."""
        return self

    def refuse_other(self, what: str, source: Source, key: str, *, judges: bool = False) -> None:
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


def preprocess_of(
    node: Any, source: Source, trained: Callable[[], Source] | None = None
) -> Preprocess | TextPreprocess:
    """Returns what a backbone gets to see of a dataset. node: the dataset's configuration. trained: gives its training split."""
    return _CLASSES[source.modality].of(node, source, trained)


def preprocess_from(saved: dict[str, Any]) -> Preprocess | TextPreprocess:
    """Reads what was saved as `vars` of a preprocess. Raises InputError for other keys and values."""
    kind, keys = TextPreprocess if "vocabulary" in saved else Preprocess, preprocess_keys(saved)
    if reason := misfit(saved, keys):
        raise InputError(f"preprocess {reason}; expected what {kind.__name__} holds")
    if kind is Preprocess:
        saved = saved | {"image_size": image_size_of(saved["image_size"])}
    return kind(**saved)


def measures_statistics(node: Any, source: Source) -> bool:
    """Tells whether mean and std are measured: where none are given, and where ImageNet's would be of other pixels.

    A folder's configuration has those of ImageNet: of three channels, of 8 bits, that are red, green and blue.
    """
    if source.reading is None:
        return False
    given, reading = {key: node[key] for key in IMAGENET}, source.reading
    usual = reading.channels == 3 and reading.value_range is None and reading.bands is None
    return None in given.values() or (given == IMAGENET and not usual)


def statistics_of(
    node: Any, source: Source, trained: Callable[[], Source] | None = None
) -> tuple[list[float], list[float]]:
    """Returns mean and std of a dataset's channels, of images in [0, 1]. Raises InputError for more or fewer values.

    trained: gives the training split, where `source` is another.
    """
    if measures_statistics(node, source):
        return (trained() if trained and source.split != "train" else source).statistics()
    for key in ("mean", "std"):
        if node[key] is None or len(node[key]) != source.channels:
            values = "null" if node[key] is None else f"{len(node[key])} values"
            raise InputError(f"dataset.{key}={values} for {source.channels} channels: expected a value for each")
    return list(node.mean), list(node.std)


class Transform:
    """One image to the backbone's input."""

    def __init__(self, settings: Preprocess):
        self.settings = settings

    def __call__(self, image: Image.Image | np.ndarray | Tensor) -> Tensor:
        """A PIL image, (H, W, C) array or (C, H, W) tensor -> (C, h, w) float in [0, 1].

        Arrays and tensors are of uint8, or of any type where the backbone was trained on values of more than 8 bits.
        """
        settings = self.settings
        reading = Reading(settings.channels, tuple(settings.value_range) if settings.value_range else None)
        if isinstance(image, Image.Image):
            image = from_pillow(image, reading)
        else:
            array = (
                image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) and image.ndim == 3 else np.asarray(image)
            )
            array = array[..., None] if array.ndim == 2 else array
            if (
                (array.dtype != np.uint8 and reading.value_range is None)
                or array.ndim != 3
                or array.shape[2] != settings.channels
            ):
                kind = "numbers" if reading.value_range else "uint8"
                raise InputError(
                    f"expected ({settings.channels}, H, W) {kind}, found {tuple(image.shape)} {image.dtype}"
                )
            image = from_array(array, reading)
        return clean(resize_and_crop(image, settings.image_size, settings.resize))
