"""Local crops for both sides: two sizes of views, and positions for the smaller ones."""

from functools import partial
from types import ModuleType
from typing import Any

from parity_networks import PATCH, SIDE, batch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from sslctl.data.batch import Batch
from sslctl.models.backbones import Backbone

CROPS = {"global": (2, SIDE), "local": (3, SIDE // 2)}
crops = partial(batch, sizes=CROPS)


def images(data: Batch, backbone: Backbone) -> list[Tensor]:
    """All views as an official loader gives them: a list, normalised, the global ones first."""
    return [backbone.normalize(x) for views in data.views.values() for x in views]


def resampling_as_timm(network: nn.Module) -> nn.Module:
    """Their network with positions for small crops as timm makes them."""
    network.interpolate_pos_encoding = lambda x, *size: resample_abs_pos_embed(
        network.pos_embed, [round((x.shape[1] - 1) ** 0.5)] * 2, num_prefix_tokens=1
    )
    return network


def their_transformer(module: ModuleType, **keywords: Any) -> nn.Module:
    size = {
        "img_size": [SIDE],
        "patch_size": PATCH,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 4,
        "qkv_bias": True,
    }
    return resampling_as_timm(module.VisionTransformer(**size, norm_layer=partial(nn.LayerNorm, eps=1e-6), **keywords))
