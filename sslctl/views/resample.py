"""Crop and resize as weighted sums of a few rows, then of a few columns.

The weights are those of torch's and PIL's antialiased resampling (a triangle or a cubic kernel with a = -0.5, stretched
by the scale when shrinking, cut at the edges of the crop), so a batch in which every image has its own crop equals
torchvision's `resized_crop(..., antialias=True)` image by image, in both directions.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.ops.image_size import ImageSize, height_width
from sslctl.random import Draws

ATTEMPTS = 10  # at a crop that fits
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}


def crop_boxes(
    key: Draws,
    name: str,
    height: Tensor,
    width: Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    shape: float = 1.0,
) -> Tensor:
    """Boxes of torchvision's RandomResizedCrop: ten attempts, then the largest central crop of an allowed ratio.

    height, width: (B,) int64, pixels. scale: share of the area. ratio: width / height, drawn log-uniformly, in parts of
    `shape`, that of the views, so that a crop is stretched as much where these are no squares.
    Returns (B, 4) int64: top, left, height, width.
    """
    ratio = ratio[0] * shape, ratio[1] * shape
    area = (height * width)[:, None] * key.between(f"{name}/area", scale[0], scale[1], ATTEMPTS)  # (B, 10)
    aspect = key.between(f"{name}/aspect", math.log(ratio[0]), math.log(ratio[1]), ATTEMPTS).exp()  # (B, 10)
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


@dataclass(frozen=True)
class Taps:
    """Along one axis: which places of an image make up each place of its crop, and with which weights."""

    places: Tensor  # (B, out, taps) int64
    weights: Tensor  # (B, out, taps), rows sum to 1

    def mirrored(self, where: Tensor) -> "Taps":
        """The other way round for some images. where: (B,) bool."""
        where = where[:, None, None]
        return Taps(
            torch.where(where, self.places.flip(1), self.places), torch.where(where, self.weights.flip(1), self.weights)
        )

    def __getitem__(self, rows: slice) -> "Taps":
        return Taps(self.places[rows], self.weights[rows])

    def of_channels(self, channels: int) -> "Taps":
        """(B, …) -> (B·channels, …), every channel as its image."""
        return Taps(self.places.repeat_interleave(channels, 0), self.weights.repeat_interleave(channels, 0))

    def sums(self, lines: Tensor, source: Tensor | None = None) -> Tensor:
        """lines: (S, in, n), the rows of images, or their columns. source: (B,) int64, which image each of the taps is of;
        without, each is of its own. Returns (B, out, n)."""
        images, length, width = lines.shape
        if source is None:
            source = torch.arange(images, device=lines.device)
        first = source * length  # (B,)
        table, places = lines.reshape(images * length, width), (self.places + first[:, None, None]).flatten(0, 1)
        sums = F.embedding_bag(places, table, per_sample_weights=self.weights.flatten(0, 1), mode="sum")
        return sums.view(len(first), -1, width)


def axis_taps(start: Tensor, length: Tensor, in_size: int, out_size: int, kernel: str) -> Taps:
    """The resampling along one axis. start, length: (B,) int64, the crop's first pixel and size.

    kernel: "bilinear" or "bicubic".
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
    return Taps((pixel + start[:, None, None]).clamp_(max=in_size - 1), weights)  # past the edge: with weight 0


def box_taps(
    boxes: Tensor, height: int, width: int, out_size: ImageSize, kernel: str, flip: Tensor | None = None
) -> tuple[Taps, Taps]:
    """(vertical, horizontal) for boxes (B, 4) of images of height × width. flip: (B,) bool, mirrors left-right."""
    (top, left, h, w), (out_height, out_width) = boxes.unbind(1), height_width(out_size)
    if height == width and out_height == out_width:  # both axes in one go
        both = axis_taps(torch.cat([top, left]), torch.cat([h, w]), height, out_height, kernel)
        vertical, horizontal = both[: len(boxes)], both[len(boxes) :]
    else:
        vertical = axis_taps(top, h, height, out_height, kernel)
        horizontal = axis_taps(left, w, width, out_width, kernel)
    return vertical, horizontal if flip is None else horizontal.mirrored(flip)


def resample_(out: Tensor, columns: Tensor, vertical: Taps, horizontal: Taps, source: Tensor | None = None) -> None:
    """Cuts B boxes out of S images and resizes them.

    columns: (S, W, C·H) float in [0, 1] from `by_columns`. source: (B,) int64, which image each box is of; without, one is
    cut out of every image. out: (B, C, h, w), is overwritten.
    """
    batch, channels, _, width = out.shape
    rows = _transposed(horizontal.sums(columns, source))  # (B, C·H, w)
    x = vertical.of_channels(channels).sums(rows.view(batch * channels, -1, width))  # (B·C, h, w)
    out.copy_(x.view(out.shape)).clamp_(0, 1)  # the cubic kernel overshoots


def by_columns(images: Tensor) -> Tensor:
    """(B, C, H, W) uint8 or float -> (B, W, C·H) float, the values as they are."""
    batch, channels, height, width = images.shape
    return _transposed(images.reshape(batch, channels * height, width).float())


def _transposed(x: Tensor) -> Tensor:
    """(B, m, n) -> (B, n, m), contiguous."""
    if len(x) == 1:  # torch transposes one matrix in blocks, several of them value by value
        return x[0].t().contiguous()[None]
    return x.transpose(1, 2).contiguous()


def resample(images: Tensor, boxes: Tensor, out_size: ImageSize, kernel: str, flip: Tensor | None = None) -> Tensor:
    """`resample_` of a batch (B, C, H, W) in [0, 1] with boxes (B, 4). Returns (B, C, h, w) of a size."""
    batch, channels, height, width = images.shape
    out = images.new_empty(batch, channels, *height_width(out_size))
    resample_(out, by_columns(images), *box_taps(boxes, height, width, out_size, kernel, flip))
    return out


def cut_image(image: Tensor, box: list[int], out_size: ImageSize, kernel: str, flip: bool) -> Tensor:
    """The same for one image: (C, H, W) -> (C, h, w), of uint8 rounded as PIL does, else in [0, 1] again."""
    top, left, height, width = box
    part = image[None, :, top : top + height, left : left + width]
    part = part.contiguous(memory_format=torch.channels_last)  # the layout of files, and of torch's fastest kernel
    part = F.interpolate(part, height_width(out_size), mode=kernel, antialias=True)[0]
    part = part if image.dtype == torch.uint8 else part.clamp_(0, 1)
    return part.flip(2) if flip else part
