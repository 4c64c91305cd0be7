"""Colour operations on batches of float images in [0, 1], each image with a parameter of its own.

Every operation equals the function of the same name in torchvision.transforms.functional. Images with one channel have
no hue, saturation or colour to lose: asking for those is an error, not a silent identity.
"""

import torch
from torch import Tensor

_LUMA = (0.2989, 0.587, 0.114)


def luma(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W), ITU-R 601-2 as torchvision and PIL; greyscale images are their own."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)


def _blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """factor · images + (1 - factor) · other, cut to [0, 1]; factor: (B,)."""
    factor = factor.view(-1, 1, 1, 1)
    return (images * factor + (1 - factor) * other).clamp_(0, 1)


def _refuse_grey(operation: str, images: Tensor) -> None:
    if images.shape[1] != 3:
        raise ValueError(f"{operation} needs three channels, found {images.shape[1]}")


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """images: (B, C, H, W); factor: (B,), 0 black, 1 unchanged."""
    return (images * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """images: (B, C, H, W); factor: (B,), 0 the mean grey, 1 unchanged."""
    # One axis after the other: a joint mean is split over threads by the batch's shape, and its last bits follow.
    return _blend(images, luma(images).mean(3, keepdim=True).mean(2, keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """images: (B, 3, H, W); factor: (B,), 0 greyscale, 1 unchanged."""
    _refuse_grey("saturation", images)
    return _blend(images, luma(images), factor)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue. images: (B, 3, H, W); shift: (B,) in [-0.5, 0.5], 1 being the whole circle."""
    red, green, blue = images.unbind(1)  # (B, H, W) each
    largest, smallest = images.amax(1), images.amin(1)
    chroma = largest - smallest
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sector = torch.where(
        largest == red,
        (green - blue) / divisor,
        torch.where(largest == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )  # hue in sixths of the circle
    sector = sector + 6 * shift.view(-1, 1, 1)
    # Each channel is the largest value less chroma times a trapezoid of the hue: HSV to RGB without branches.
    channels = []
    for offset in (5, 3, 1):
        k = (sector + offset) % 6
        channels.append(largest - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)


def grayscale(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> the same shape, three equal channels."""
    _refuse_grey("grayscale", images)
    return luma(images).expand_as(images).contiguous()


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Inverts what is at least as bright as the threshold."""
    return torch.where(images >= threshold, 1 - images, images)


def jitter(images: Tensor, factors: dict[str, Tensor], order: Tensor) -> Tensor:
    """Colour jitter in an order of each image's own (Howard 2013; torchvision's ColorJitter).

    images: (B, C, H, W). factors: the operations of JITTER to apply, each with its (B,) parameters, in that order.
    order: (B, len(factors)) int64, row b the sequence in which image b meets them.
    """
    images = images.clone()
    for position in range(order.shape[1]):
        for number, (name, values) in enumerate(factors.items()):
            rows = (order[:, position] == number).nonzero()[:, 0]
            if len(rows):
                images[rows] = JITTER[name](images[rows], values[rows])
    return images


JITTER = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
