"""Crop and resize as two small matrix products per image.

The weights are those of torch's and PIL's antialiased resampling (a triangle or a cubic kernel with a = -0.5, stretched
by the scale when shrinking, cut at the edges of the crop), so a batch in which every image has its own crop equals
torchvision's `resized_crop(..., antialias=True)` image by image, in both directions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.views.random import Key

_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}


def crop_boxes(
    key: Key, name: str, height: Tensor, width: Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Boxes of torchvision's RandomResizedCrop: ten attempts, then the largest central crop of an allowed ratio.

    height, width: (B,) int64, pixels. scale: share of the area. ratio: width / height, drawn log-uniformly.
    Returns (B, 4) int64: top, left, height, width.
    """
    attempts = 10
    area = (height * width)[:, None] * key.between(f"{name}/area", scale[0], scale[1], attempts)  # (B, 10)
    aspect = key.between(f"{name}/aspect", math.log(ratio[0]), math.log(ratio[1]), attempts).exp()  # (B, 10)
    w = (area * aspect).sqrt().round().long()  # (B, 10)
    h = (area / aspect).sqrt().round().long()  # (B, 10)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])  # (B, 10)
    first = fits.long().argmax(dim=1, keepdim=True)  # (B, 1)
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]  # (B,)
    place = key.uniform(f"{name}/place", 2).double()  # (B, 2); doubles, so that no place rounds up to one past the end
    top, left = (place[:, 0] * (height - h + 1)).long(), (place[:, 1] * (width - w + 1)).long()

    image_ratio = width / height
    central_w = torch.where(image_ratio > ratio[1], (height * ratio[1]).round().long(), width)
    central_h = torch.where(image_ratio < ratio[0], (width / ratio[0]).round().long(), height)
    central_top = (height - central_h).div(2, rounding_mode="floor")
    central_left = (width - central_w).div(2, rounding_mode="floor")
    central = torch.stack([central_top, central_left, central_h, central_w], 1)
    return torch.where(fits.any(1, keepdim=True), torch.stack([top, left, h, w], 1), central)


def axis_weights(start: Tensor, length: Tensor, in_size: int, out_size: int, kernel: str) -> Tensor:
    """Resampling weights along one axis: (B, out_size, in_size), rows sum to 1.

    start, length: (B,) int64, the crop's first pixel and size. kernel: "bilinear" or "bicubic".
    """
    taps = min(in_size, 2 * math.ceil(_SUPPORT[kernel] * max(1.0, in_size / out_size)) + 1)  # that any crop can need
    scale = length.float()[:, None] / out_size  # (B, 1)
    stretch = scale.clamp(min=1.0)  # antialiasing: the kernel widens when shrinking
    support = _SUPPORT[kernel] * stretch
    center = scale * (torch.arange(out_size, device=start.device) + 0.5)  # (B, out)
    first = (center - support + 0.5).long().clamp_(min=0)  # (B, out), relative to the crop, as torch truncates
    last = torch.minimum((center + support + 0.5).long(), length[:, None])  # exclusive
    pixel = first[:, :, None] + torch.arange(taps, device=start.device)  # (B, out, taps)
    distance = ((pixel - center[:, :, None] + 0.5) / stretch[:, :, None]).abs_()
    if kernel == "bilinear":
        weights = (1 - distance).clamp_(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = torch.where(pixel < last[:, :, None], weights, 0.0)
    weights = weights / weights.sum(dim=2, keepdim=True)
    places = (pixel + start[:, None, None]).clamp_(max=in_size - 1)  # past the edge: with weight 0
    return weights.new_zeros(len(start), out_size, in_size).scatter_add_(2, places, weights)


def resample(
    images: Tensor, boxes: Tensor, out_size: int, kernel: str, flip: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Cuts one box out of every image and resizes it.

    images: (B, C, H, W) float in [0, 1]. boxes: (B, 4) int64 from `crop_boxes`. flip: (B,) bool, mirrors left-right.
    Returns (B, C, out_size, out_size) float in [0, 1], in `out` when it is given.
    """
    batch, channels, in_height, in_width = images.shape
    top, left, height, width = boxes.unbind(1)
    vertical = axis_weights(top, height, in_height, out_size, kernel)  # (B, out, H)
    horizontal = axis_weights(left, width, in_width, out_size, kernel)  # (B, out, W)
    if flip is not None:
        horizontal = torch.where(flip[:, None, None], horizontal.flip(1), horizontal)
    # Two products for all channels of an image: rows lie together as (H, C, W), no weight is repeated.
    rows = images.transpose(1, 2).reshape(batch, in_height, channels * in_width)
    rows = torch.bmm(vertical, rows).view(batch, out_size * channels, in_width)  # (B, out·C, W)
    crops = torch.bmm(rows, horizontal.transpose(1, 2)).view(batch, out_size, channels, out_size).transpose(1, 2)
    out = torch.empty_like(crops, memory_format=torch.contiguous_format) if out is None else out
    return out.copy_(crops).clamp_(0, 1)  # the cubic kernel overshoots


def crop(image: Tensor, box: list[int], out_size: int, kernel: str, flip: bool) -> Tensor:
    """`resample` of one image with torch's own resampling: (C, H, W) -> (C, out_size, out_size).

    Faster than products with whole rows where images are large. uint8 in, uint8 out, rounded as PIL rounds.
    """
    top, left, height, width = box
    part = image[None, :, top : top + height, left : left + width]
    if image.dtype == torch.uint8:  # its kernel wants the channels of a pixel side by side, as files have them
        part = part.contiguous(memory_format=torch.channels_last)
    part = F.interpolate(part, (out_size, out_size), mode=kernel, antialias=True)[0]
    return part.flip(2) if flip else part
