"""A method's features, and the backbone that makes them by itself: what is kept of a run, loaded again and exported."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sslctl.errors import InputError
from sslctl.methods.base import Method, mean_of_patches
from sslctl.models.backbones import Backbone
from sslctl.models.preprocess import Preprocess, TextPreprocess

# Of timm.create_model, for vision transformers: the mean of the patches' tokens, normed before.
MEAN = {"global_pool": "avg", "fc_norm": False}


@torch.no_grad()
def feature_names(method: Method, preprocess: Preprocess | TextPreprocess) -> list[str]:
    """Returns the names of a method's features, the one that is evaluated first."""
    names = list(method.features(preprocess.example(next(method.parameters()).device)))
    judged = judged_among(method, names)
    return [judged, *(name for name in names if name != judged)]


def judged_among(method: Method, names: list[str]) -> str:
    """Returns which of a method's features are its result: the first, or the first of the network that `judged` names."""
    if method.judged is None:
        return names[0]
    networks = method.feature_networks()
    chosen = judged_network(method, method.judged)
    return next(name for name in names if name in networks and networks[name][0] is chosen)


def judged_network(method: Method, network: str) -> Backbone:
    """Returns a method's "backbone" or "teacher". Raises InputError for a teacher that it has not, or gives no features of."""
    chosen = method.backbone if network == "backbone" else getattr(method, "teacher_backbone", None)
    if chosen is None or all(its is not chosen for its, _ in method.feature_networks().values()):
        what = "has no teacher of its own" if chosen is None else "declares no features of it (feature_networks)"
        raise InputError(f"network={network}: {type(method).__name__} {what}: network=null", advice=["network=null"])
    return chosen


@torch.no_grad()
def feature_function(
    method: Method, features: str, preprocess: Preprocess | TextPreprocess
) -> Callable[[Tensor], Tensor]:
    """Returns what makes one of a method's features, (B, C, H, W) -> (B, D): the one network whose output they are, where
    `feature_networks` declares it and says the same bits of noise; else all of the method's features are made for it.

    method: in eval mode, on any device, to which it may move on with its networks.
    """

    def among_all(images: Tensor) -> Tensor:
        return method.features(images)[features]

    network, pooling = method.feature_networks().get(features, (None, ""))
    if network is None:
        return among_all
    alone = partial(mean_of_patches, network) if pooling == "mean" else network
    noise = preprocess.noise(4, torch.Generator().manual_seed(0)).to(next(method.parameters()).device)
    output, expected = alone(noise), among_all(noise)  # (4, D) each
    return alone if torch.equal(output, expected) else among_all


@torch.no_grad()
def find_backbone(
    method: Method, features: str, preprocess: Preprocess | TextPreprocess
) -> tuple[Backbone, dict[str, Any]] | None:
    """Returns the backbone whose own output a method's features are, and timm's arguments that it takes.

    method: in eval mode. None where the method declares no network for them, where timm's model has no such pooling under the
    same weights, and where the declaration is not true: then nothing is kept under a wrong name.
    """
    backbone, pooling = method.feature_networks().get(features, (None, ""))
    backbone, arguments = _pool_by_mean(backbone) if pooling == "mean" else (backbone, {})
    if backbone is None:
        return None
    # The check: on noise, which no two networks treat alike, both say the same.
    noise = preprocess.noise(4, torch.Generator().manual_seed(0)).to(next(method.parameters()).device)
    output, expected = backbone(noise), method.features(noise)[features]  # (4, D) each
    atol = 1e-6 * float(expected.abs().nan_to_num(0.0).max())  # of a run that has gone wrong, all outputs may be NaN
    same = output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-5, atol=atol, equal_nan=True)
    return (backbone, arguments) if same else None


def with_pooling(node: dict, arguments: dict[str, Any]) -> dict:
    """Returns the configuration of a backbone with the arguments that `find_backbone` gives."""
    return {**node, "kwargs": {**node["kwargs"], **arguments}} if arguments else node


def _pool_by_mean(backbone: Backbone) -> tuple[Backbone | None, dict[str, Any]]:
    """Returns a copy that pools by the mean of the patches' tokens, and timm's arguments for it; the backbone itself where it
    does so; None where timm's model cannot under the same weights."""
    from timm.models.vision_transformer import VisionTransformer

    model = backbone.vision_transformer()
    if not isinstance(model.fc_norm, nn.Identity):
        return None, {}
    if model.global_pool == MEAN["global_pool"]:
        return backbone, {}
    copied = copy.deepcopy(backbone)
    copied.network.model.global_pool = MEAN["global_pool"]
    return copied, MEAN if isinstance(model, VisionTransformer) else {"global_pool": "avg", "use_fc_norm": False}
