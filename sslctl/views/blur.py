"""Gaussian blur of a batch, each image with a width of its own."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_REACH = 5.5  # in sigmas; what lies further out weighs less than 3e-7 of the middle


def kernel_size(image_size: int) -> int:
    """An odd size of about a tenth of the side, at least 3 pixels (SimCLR, appendix A)."""
    return max(3, int(image_size * 0.1) // 2 * 2 + 1)


def gaussian_blur(images: Tensor, sigma: Tensor, size: int) -> Tensor:
    """torchvision's gaussian_blur (reflected edges) with one sigma per image.

    images: (B, C, H, W). sigma: (B,), pixels. size: odd, pixels, the same for the batch.
    """
    offset = torch.arange(size, device=images.device) - (size - 1) / 2
    weights = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)  # (B, size)
    if images.device.type != "cpu":
        return _convolved(images, weights)
    return torch.cat(
        [_summed(image, row, width) for image, row, width in zip(images.split(1), weights, sigma.tolist())]
    )


def _summed(image: Tensor, weights: Tensor, sigma: float) -> Tensor:
    """(1, C, H, W) -> the same: shifted copies, added up; those too far out to be seen are left out."""
    size, half = len(weights), min(len(weights) // 2, math.ceil(_REACH * sigma))
    taps = weights[size // 2 - half : size // 2 + half + 1].tolist()
    height, width = image.shape[2:]
    result = F.pad(image, (half, half, half, half), mode="reflect")
    for axis, length in ((2, height), (3, width)):
        total = result.narrow(axis, 0, length) * taps[0]
        for shift, tap in enumerate(taps[1:], start=1):
            total.add_(result.narrow(axis, shift, length), alpha=tap)
        result = total
    return result.clamp_(0, 1)  # weights sum to 1 only to rounding


def _convolved(images: Tensor, weights: Tensor) -> Tensor:
    """(B, C, H, W) -> the same: two convolutions in which every channel of every image has a kernel of its own."""
    batch, channels, size = *images.shape[:2], weights.shape[1]
    half = size // 2
    kernels = weights.repeat_interleave(channels, 0)[:, None]  # (B·C, 1, size)
    planes = F.pad(images, (half, half, half, half), mode="reflect").flatten(0, 1)[None]  # (1, B·C, H + …, W + …)
    planes = F.conv2d(planes, kernels[:, :, :, None], groups=batch * channels)
    planes = F.conv2d(planes, kernels[:, :, None, :], groups=batch * channels)
    return planes.view(images.shape).clamp(0, 1)
