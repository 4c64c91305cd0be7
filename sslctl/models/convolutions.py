"""What residual networks are made of: convolutions, their normalisation, the basic block."""

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def norm_layer(name: str) -> Callable[[int], nn.Module]:
    """Returns a layer's class. batch: BatchNorm. layer: GroupNorm of one group, over one image's channels and places."""
    if name not in ("batch", "layer"):
        raise ValueError(f"backbone.norm={name}: expected batch or layer")
    return nn.BatchNorm2d if name == "batch" else functools.partial(nn.GroupNorm, 1)


def convolution(d_in: int, d_out: int, size: int, stride: int) -> nn.Conv2d:
    """Returns a convolution without bias, of as many places as its input by stride, drawn as He et al. 2015 do."""
    conv = nn.Conv2d(d_in, d_out, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class Block(nn.Module):
    """The basic block of He et al. 2016, figure 2."""

    def __init__(self, d_in: int, d_out: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1, self.bn1 = convolution(d_in, d_out, 3, stride), norm(d_out)
        self.conv2, self.bn2 = convolution(d_out, d_out, 3, 1), norm(d_out)
        self.stride, same = stride, stride == 1 and d_in == d_out
        self.shortcut = nn.Identity() if same else nn.Sequential(convolution(d_in, d_out, 1, 1), norm(d_out))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        # A strided 1×1 convolution, taken apart: the gradient of one with fewer than 8 channels in channels_last writes
        # past its memory on CPUs with AVX2 alone (torch 2.14 and 2.15).
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x), inplace=True)
