"""Gaussian blur of a batch, each image with a width of its own."""

import math

import torch
from torch import Tensor

from sslctl.views import waiting
from sslctl.views.resample import Taps, by_columns, resample_

_REACH = 5.5  # in sigmas; what lies further out weighs less than 3e-7 of the middle


def kernel_size(image_size: int) -> int:
    """An odd size of about a tenth of the side, at least 3 pixels (SimCLR, appendix A)."""
    return max(3, int(image_size * 0.1) // 2 * 2 + 1)


def gaussian_blur(images: Tensor, sigma: Tensor, size: int) -> Tensor:
    """torchvision's gaussian_blur (reflected edges) with one sigma per image.

    images: (B, C, H, W). sigma: (B,), pixels. size: odd, pixels, the same for the batch.
    """
    out = torch.empty_like(images)
    taps = {side: _taps(sigma, size, side) for side in set(images.shape[2:])}
    resample_(out, by_columns(images), *(taps[side] for side in images.shape[2:]))
    return out


def _taps(sigma: Tensor, size: int, side: int) -> Taps:
    """The weights of a kernel of `size` pixels at each of `side` places: a resampling of the image to its own size."""
    offset = torch.arange(size, device=sigma.device) - size // 2  # (size,)
    weights = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)  # (B, size)
    weights = torch.where(offset.abs() <= _REACH * sigma[:, None], weights, 0.0)  # zeros add nothing in any batch
    if waiting.may_look(sigma):
        half = min(size // 2, math.ceil(_REACH * sigma.max().item()))
        kept = slice(size // 2 - half, size // 2 + half + 1)
        offset, weights = offset[kept], weights[:, kept]
    places = (torch.arange(side, device=sigma.device)[:, None] + offset).abs()  # (side, taps), reflected on the left …
    places = side - 1 - (side - 1 - places).abs()  # … and on the right
    return Taps(places.expand(len(sigma), -1, -1), weights[:, None, :].expand(-1, side, -1))
