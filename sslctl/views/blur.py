"""Gaussian blur of a batch, each image with a width of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    half = size // 2
    padded = F.pad(images, (half, half, half, half), mode="reflect")
    height, width = images.shape[2:]
    rows = sum(weights[:, k, None, None, None] * padded[:, :, k : k + height] for k in range(size))
    blurred = sum(weights[:, k, None, None, None] * rows[:, :, :, k : k + width] for k in range(size))
    return blurred.clamp(0, 1)  # weights sum to 1 only to rounding
