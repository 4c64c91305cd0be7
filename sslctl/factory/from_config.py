"""From a resolved configuration to sources, backbones and methods. Everything is bound before anything is built."""

from functools import partial
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from sslctl.config.targets import bind, build, target_of
from sslctl.data.modality import IMAGES, Modality
from sslctl.data.sources import Source
from sslctl.errors import InputError, say
from sslctl.methods.base import Facts, Method
from sslctl.models.backbones import Backbone
from sslctl.models.batchnorm import names_of_norms
from sslctl.models.freezing import copies_of
from sslctl.models.hub import load_pretrained
from sslctl.models.lora import adapt_
from sslctl.models.network import Network
from sslctl.models.preprocess import Preprocess, TextPreprocess
from sslctl.models.vit import patch_size_of
from sslctl.models.weights import load_weights
from sslctl.ops.image_size import ImageSize, as_key, height_width, image_size_of, in_words, shorter_side
from sslctl.views import ViewMaker
from sslctl.views.maker import dropped_operations


def build_source(node: Any, split: str) -> Source:
    """Builds a split of the dataset of a configuration."""
    target, arguments = bind(node, "dataset", given=("split",))
    return build("dataset", target, split=split, **arguments)


def bind_backbone(node: Any):
    """Returns a network's class and its arguments, without those that the data give."""
    return bind(node, "backbone", given=modality_of(target_of(node, "backbone")).network_arguments, kind=nn.Module)


def modality_of(network: Network | type[Network]) -> Modality:
    """Returns what a network takes: images, where it does not say."""
    return getattr(network, "modality", IMAGES)


def build_backbone(
    node: Any, preprocess: Preprocess | TextPreprocess, *, with_weights: bool = True, key: str = "backbone"
) -> Backbone:
    """Builds a configuration's backbone, with the weights that backbone.weights names. key: where the configuration has it."""
    target, arguments = bind_backbone(node)
    takes, has = modality_of(target), preprocess.modality
    if takes != has:
        raise InputError(
            f"backbone: {target.__name__} takes {takes.plural}, the dataset has {has.plural}: {has.network_example}"
        )
    arguments |= {name: getattr(preprocess, name) for name in has.network_arguments}
    backbone = preprocess.to_backbone(build(key, target, **arguments))
    if with_weights and node.get("weights") and node.get("pretrained"):
        raise InputError(f"{key}.weights and {key}.pretrained both name weights: leave one out")
    if with_weights and (node.get("weights") or node.get("pretrained")):
        options = {name: bool(node.get(name)) for name in ("partial", "resample_patches")}
        load = load_pretrained if node.get("pretrained") else partial(load_weights, path=node.weights)
        say(f"  {load(backbone, key=key, **options)}")
        if node.get("normalization") == "dataset" and backbone.normalized:  # a file of sslctl's brings its own
            for name in ("mean", "std"):
                getattr(backbone, name).view(-1).copy_(torch.tensor(getattr(preprocess, name)))
    return backbone


def bind_method(node: Any):
    """Returns a method's class and its arguments, without those that a run gives."""
    given = ("backbone", "facts", "teacher") if "teacher" in node else ("backbone", "facts")
    return bind(node, "method", given=given, kind=Method)


def build_method(node: Any, backbone: Backbone, facts: Facts, teacher: Any | None = None) -> Method:
    """Builds the method of a configuration around a backbone. teacher: a frozen one, where the configuration asks for it."""
    target, arguments = bind_method(node)
    if getattr(target, "squares_only", False) and isinstance(facts.image_size, tuple):
        way = f"dataset.image_size={shorter_side(facts.image_size)}"
        raise InputError(
            f"{target.__name__} takes square images only, dataset.image_size={as_key(facts.image_size)}: {way}",
            advice=[way],
        )
    if teacher is not None:
        arguments["teacher"] = teacher
    return build("method", target, backbone, facts, **arguments)


def adapt_backbone(method: Method, node: Any, *, weights: bool = True) -> None:
    """Makes a method's backbone learn by LoRA where its configuration asks for that. weights: whether it has been given any.

    A teacher is not adapted: it is a mean of the merged weights, see `sslctl.methods.base.ema_update`.
    """
    lora = node.get("lora")
    if not lora or not lora.get("rank"):
        return
    if not weights:
        raise InputError(
            f"backbone.lora.rank={lora.rank} adapts given weights, and there are none: backbone.weights=FILE"
        )
    missing = [name for name in ("alpha", "targets") if name not in lora]
    if missing:
        raise InputError(
            f"backbone.lora.{missing[0]} is missing: +backbone.lora={{rank:8,alpha:16,targets:[qkv,proj]}}"
        )
    adapt_(method.backbone.network, lora.rank, lora.alpha, list(lora.targets))
    for backbone in copies_of(method):
        backbone.frozen_modules = names_of_norms(backbone.network)  # their statistics are of the weights that stay


def build_views(config: Any, source: Source, network: nn.Module | None = None) -> ViewMaker:
    """Builds what makes the views, without the operations that make no sense for these data.

    network: where it takes patches, the sides of views are multiples of them.
    """
    augmentation = OmegaConf.to_container(config.augmentation, resolve=True)
    multiple = patch_size_of(network) if network is not None else 1
    return ViewMaker(augmentation, source.image_size, unused_operations(config, source), multiple)


def unused_operations(config: Any, source: Source) -> tuple[str, ...]:
    """Returns the operations of a configuration's augmentation that are left out for these data."""
    augmentation = OmegaConf.to_container(config.augmentation, resolve=True)
    return tuple(dropped_operations(augmentation, list(config.dataset.get("drops") or []), source.channels))


def refuse_other_views(method: Method, source: Source, views: ViewMaker, names: Any) -> None:
    """Raises InputError where a dataset has what the method does not take, or the augmentation too few views or groups."""
    if method.modality != source.modality:
        raise InputError(
            f"method={names.method} takes {method.modality.dataset}; dataset={names.dataset} has {source.summary()}"
        )
    (least, most), (count, _) = method.global_views, views.sizes()["global"]
    if count < least or count > (most or count):
        number = f"{least} global views" if most == least else f"{least} global views or more"
        raise InputError(
            f"method={names.method} compares {number}, the augmentation makes {count}: augmentation.global.count={least}",
            advice=[f"augmentation.global.count={least}"],
        )
    for group in method.view_groups:
        if group not in views.sizes():
            raise InputError(
                f"method={names.method} needs {group} views, this augmentation makes none: leave augmentation= out for the"
                " method's own"
            )


def refuse_size(backbone: Backbone, image_size: ImageSize, key: str) -> None:
    """Raises InputError where a backbone cannot be judged at another size than the one it was trained at."""
    network = backbone.network
    if getattr(network, "fixed_size", False):
        raise InputError(
            f"{key}.image_size={as_key(image_size)}: this backbone takes images of the size it was trained at only"
        )
    patch = patch_size_of(network)
    if any(side % patch for side in height_width(image_size)):
        near = as_key(image_size_of([max(1, round(side / patch)) * patch for side in height_width(image_size)]))
        raise InputError(
            f"{key}.image_size={as_key(image_size)}: patches of {patch} pixels do not divide it; {near} would do",
            advice=[f"{key}.image_size={near}"],
        )


def refuse_sizes(backbone: Backbone, views: ViewMaker, image_size: ImageSize) -> None:
    """Raises InputError for views of other sizes than the images' where a backbone takes only these."""
    others = [f"{group} views of {in_words(size)}" for group, (_, size) in views.sizes().items() if size != image_size]
    if others and getattr(backbone.network, "fixed_size", False):
        raise InputError(
            f"this backbone takes images of {in_words(image_size)} pixels only, the augmentation makes {' and '.join(others)}:"
            " choose an augmentation with one size, or a convolutional backbone"
        )
