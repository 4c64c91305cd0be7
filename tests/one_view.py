"""A small network, facts and a batch for methods of one view, made by hand."""

import torch

from sslctl.data.batch import Batch
from sslctl.factory.from_config import Preprocess, build_backbone
from sslctl.methods.base import Facts
from sslctl.random import Key


def backbone(channels=1, size=32):
    from omegaconf import OmegaConf

    node = OmegaConf.create(
        {
            "_target_": "sslctl.models.backbones.SmallResNet",
            "widths": [4, 8],
            "blocks": 1,
            "stem_stride": 0,
            "norm": "batch",
        }
    )
    torch.manual_seed(0)
    return build_backbone(node, Preprocess(channels, size, size, [0.4] * channels, [0.3] * channels))


def facts(channels=1, size=32):
    return Facts(channels, size, 100, 0, 8, 10, 100)


def a_batch(channels=1, size=32, start=0, count=8, images=None):
    index = torch.arange(start, start + count)
    if images is None:
        images = torch.rand(start + count, channels, size, size, generator=torch.Generator().manual_seed(1))[start:]
    return Batch({"global": images[None]}, torch.full((count,), -1), index, Key(0, 0, index))
