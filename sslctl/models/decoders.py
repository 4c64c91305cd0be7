"""From features back to images."""

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.models.backbones import MLP, Backbone
from sslctl.ops.image_size import ImageSize, height_width

_SIDE = 7  # pixels at most of the map that a decoder begins with
_WIDTH = 32  # channels at full size, twice as many at each half


def image_decoder(backbone: Backbone, in_dim: int, channels: int, image_size: ImageSize) -> nn.Module:
    """(B, in_dim) -> (B, channels, H, W) without a last activation: an MLP's mirror image, or convolutions."""
    if isinstance(backbone.network, MLP):
        return MLPDecoder(backbone.network, in_dim, channels, image_size)
    return ConvDecoder(in_dim, channels, image_size)


class MLPDecoder(nn.Module):
    """Maps features to pixels through the widths of an MLP backbone in reverse."""

    def __init__(self, network: MLP, in_dim: int, channels: int, image_size: ImageSize):
        super().__init__()
        widths = [layer.out_features for layer in network.layers if isinstance(layer, nn.Linear)]
        layers = []
        for d_in, d_out in pairwise([in_dim, *reversed(widths[:-1])]):
            layers += [nn.Linear(d_in, d_out, bias=False), nn.BatchNorm1d(d_out), nn.ReLU(inplace=True)]
        last = widths[0] if len(widths) > 1 else in_dim
        self.layers = nn.Sequential(*layers, nn.Linear(last, channels * math.prod(height_width(image_size))))
        self.shape = (channels, *height_width(image_size))

    def forward(self, code: Tensor) -> Tensor:
        return self.layers(code).unflatten(1, self.shape)


class ConvDecoder(nn.Module):
    """A linear layer to a map of at most 7×7, which doubles and is convolved until it has the image's size."""

    def __init__(self, in_dim: int, channels: int, image_size: ImageSize):
        super().__init__()
        doublings, self.sides = 0, height_width(image_size)
        while -(-max(self.sides) // 2**doublings) > _SIDE:
            doublings += 1
        self.first_map = [-(-side // 2**doublings) for side in self.sides]
        widths = [min(256, _WIDTH << power) for power in range(doublings, -1, -1)]
        self.first = nn.Linear(in_dim, widths[0] * math.prod(self.first_map))
        self.blocks = nn.Sequential(*(Doubling(d_in, d_out) for d_in, d_out in pairwise(widths)))
        self.last = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, code: Tensor) -> Tensor:
        x = F.relu(self.first(code)).unflatten(1, (-1, *self.first_map))  # (B, D, h, w)
        return self.last(self.blocks(x))[..., : self.sides[0], : self.sides[1]]


class Doubling(nn.Sequential):
    """(B, d_in, h, w) -> (B, d_out, 2h, 2w). Nearest neighbours and a convolution leave no chequered pattern."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(d_in, d_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(d_out),
            nn.ReLU(inplace=True),
        )
