"""From a resolved configuration to sources, backbones and methods. Everything is bound before anything is built."""

from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from sslctl.backbones import Backbone
from sslctl.binding import bind
from sslctl.config import InputError
from sslctl.data.sources import Source
from sslctl.methods.base import Facts, Method
from sslctl.views import ViewMaker
from sslctl.weights import load_weights

DATASET_OWN = ("drops", "scale", "mean", "std", "resize")
BACKBONE_OWN = ("weights", "partial")
OPTIMIZER_OWN = ("base_lr", "lr_scaling", "weight_decay", "weight_decay_end", "exclude_bias_and_norm")


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the backbone's input; kept beside the weights. Sizes in pixels."""

    channels: int
    image_size: int
    resize: int  # of the shorter side, before the central square is cut out
    mean: list[float]  # of images in [0, 1], one a channel; the backbone applies them itself
    std: list[float]

    def words(self) -> str:
        cut = "" if self.resize == self.image_size else f", shorter side to {self.resize}, central square"
        return f"{self.channels}×{self.image_size}×{self.image_size}{cut}"


def build_source(node: Any, split: str) -> Source:
    """A split of the dataset of a configuration."""
    target, arguments = bind(node, "dataset", skip=DATASET_OWN, given=("split",))
    return target(split=split, **arguments)


def preprocess_of(node: Any, source: Source) -> Preprocess:
    """What the backbone gets to see of a dataset."""
    for key in ("mean", "std"):
        if len(node[key]) != source.channels:
            raise InputError(f"dataset.{key} has {len(node[key])} values for {source.channels} channels")
    size = source.image_size
    fixed = source.images is not None and source.images.shape[2:] == (size, size)
    resize = node.get("resize") or (size if fixed else round(size * 256 / 224))
    if resize < size:
        raise InputError(f"dataset.resize={resize} is less than the image size {size}")
    return Preprocess(source.channels, size, resize, list(node.mean), list(node.std))


def bind_backbone(node: Any):
    return bind(node, "backbone", skip=BACKBONE_OWN, given=("channels", "image_size"))


def build_backbone(node: Any, preprocess: Preprocess, *, with_weights: bool = True) -> Backbone:
    """The backbone of a configuration, with the weights that backbone.weights names."""
    target, arguments = bind_backbone(node)
    facts = {"channels": preprocess.channels, "image_size": preprocess.image_size}
    try:
        backbone = Backbone(target(**arguments, **facts), preprocess.mean, preprocess.std)
    except (ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"backbone: {error}") from error
    if with_weights and node.get("weights"):
        print(f"  {load_weights(backbone, node.weights, partial=bool(node.get('partial')))}")
    return backbone


def build_method(node: Any, backbone: Backbone, facts: Facts) -> Method:
    """The method of a configuration around a backbone."""
    target, arguments = bind(node, "method", given=("backbone", "facts"))
    try:
        return target(backbone, facts, **arguments)
    except ValueError as error:
        raise InputError(f"method: {error}") from error


def build_views(config: Any, image_size: int, dropped: tuple[str, ...]) -> ViewMaker:
    return ViewMaker(OmegaConf.to_container(config.augmentation, resolve=True), image_size, dropped)


def refuse_sizes(backbone: Backbone, views: ViewMaker, image_size: int) -> None:
    """Raises InputError for views of other sizes than the images' where a backbone takes only these."""
    other = [f"{group} views of {size}" for group, (_, size) in views.sizes().items() if size != image_size]
    if other and getattr(backbone.network, "fixed_size", False):
        raise InputError(
            f"this backbone takes images of {image_size} pixels only, the augmentation makes {' and '.join(other)}:"
            " choose an augmentation with one size, or a convolutional backbone"
        )
