"""A method's features, and which backbone gives them by itself: what is kept of a run, loaded again and exported."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sslctl.methods.base import Method
from sslctl.models.backbones import Backbone
from sslctl.models.preprocess import Preprocess, TextPreprocess
from sslctl.models.vit import timm_if_imported

# Of timm.create_model, for vision transformers: the mean of the patches' tokens, normed before.
MEAN = {"global_pool": "avg", "fc_norm": False}


@torch.no_grad()
def feature_names(method: Method, preprocess: Preprocess | TextPreprocess) -> list[str]:
    """The names of a method's features, the one that is evaluated first."""
    return list(method.features(preprocess.example(next(method.parameters()).device)))


@torch.no_grad()
def find_backbone(
    module: nn.Module, features: Callable[[Tensor], Tensor], preprocess: Preprocess | TextPreprocess
) -> tuple[Backbone, dict[str, Any]] | None:
    """The backbone inside `module` (in eval mode) whose own output the features are, and timm's arguments that it takes.

    None where no backbone gives them without more of the method.
    """
    backbones = [m for m in module.modules() if isinstance(m, Backbone)]
    noise = preprocess.noise(4, torch.Generator().manual_seed(0)).to(next(module.parameters()).device)
    wanted = features(noise)
    candidates = [(b, {}) for b in backbones] + [(p, MEAN) for b in backbones if (p := _mean_pooled(b))]
    candidates = [(b, pool, h) for b, pool in candidates if (h := b(noise)).shape == wanted.shape]
    atol = 1e-6 * float(wanted.abs().nan_to_num(0.0).max())  # of a run that has gone wrong, all outputs may be NaN
    close = [c for c in candidates if torch.allclose(c[2], wanted, rtol=1e-5, atol=atol, equal_nan=True)]
    return min(close, key=lambda c: float((c[2] - wanted).abs().max()))[:2] if close else None


def with_pooling(node: dict, pool: dict[str, Any]) -> dict:
    """The configuration of a backbone that `alone` found."""
    return {**node, "kwargs": {**node["kwargs"], **pool}} if pool else node


def _mean_pooled(backbone: Backbone) -> Backbone | None:
    """A copy that gives the mean of the patches' tokens, where timm's model has such a thing under the same weights."""
    model, timm = getattr(backbone.network, "model", None), timm_if_imported()
    if not timm or not isinstance(model, timm.models.VisionTransformer) or not isinstance(model.fc_norm, nn.Identity):
        return None
    copied = copy.deepcopy(backbone)
    copied.network.model.global_pool = MEAN["global_pool"]
    return copied
