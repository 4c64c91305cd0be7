"""Colour operations on batches of float images in [0, 1], each image with a parameter of its own.

Every operation equals the function of the same name in torchvision.transforms.functional. Images with one channel have
no hue, saturation or colour to lose: asking for those is an error, not a silent identity.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sslctl.views import waiting

_LUMA = (0.2989, 0.587, 0.114)


def luma(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W), ITU-R 601-2 as torchvision and PIL; greyscale images are their own, other bands' the mean."""
    if images.shape[1] == 1:
        return images
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.unbind(1)
    return (_LUMA[0] * red).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).unsqueeze(1)


def mean_luma(grey: Tensor) -> Tensor:
    """The mean of each image of `luma`: (B, 1, H, W) -> (B, 1, 1, 1)."""
    # One axis after the other: a joint mean is split over threads by the batch's shape, and its last bits follow.
    return grey.mean(3, keepdim=True).mean(2, keepdim=True)


def _each(values: Tensor) -> Tensor:
    """One value an image: (B,) -> (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _refuse_grey(operation: str, images: Tensor) -> None:
    if images.shape[1] != 3:
        raise ValueError(f"{operation} needs three channels, found {images.shape[1]}")


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """images: (B, C, H, W); factor: (B,), 0 black, 1 unchanged."""
    return (images * _each(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """images: (B, C, H, W); factor: (B,), 0 the mean grey, 1 unchanged."""
    return (images * _each(factor)).add_(mean_luma(luma(images)) * _each(1 - factor)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """images: (B, 3, H, W); factor: (B,), 0 greyscale, 1 unchanged."""
    _refuse_grey("saturation", images)
    return (images * _each(factor)).add_(luma(images) * _each(1 - factor)).clamp_(0, 1)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue. images: (B, 3, H, W); shift: (B,) in [-0.5, 0.5], 1 being the whole circle.

    HSV and back in about thirty passes over one channel, all of them arithmetic: comparisons and selections take ten
    times as long on a CPU.
    """
    _refuse_grey("hue", images)
    red, green, blue = images.unbind(1)  # (B, H, W) each
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = largest - smallest
    # Scaled so that the largest channel is 1 and the smallest 0; floor() then tells the largest from the others.
    scaled = (images - smallest.unsqueeze(1)).div_(chroma.clamp(min=1e-30).unsqueeze(1))  # (B, 3, H, W)
    r, g, b = scaled.unbind(1)
    sixth = (r - g).add_(4).lerp_((b - r).add_(2), torch.floor(g)).lerp_(g - b, torch.floor(r))  # of the circle
    sixth.add_(6 * shift.view(-1, 1, 1))
    sixth.sub_(torch.floor(sixth * (1 / 6)), alpha=6)  # (B, H, W) in [0, 6]
    # Each channel is a trapezoid of the hue: red smallest + chroma·t(3), green and blue largest - chroma·t(2), t(4).
    for channel, center in ((r, 3), (g, 2), (b, 4)):
        torch.sub(sixth, center, out=channel).abs_().sub_(1).clamp_(0, 1).mul_(chroma)
    r.add_(smallest)
    torch.sub(largest, g, out=g)
    torch.sub(largest, b, out=b)
    return scaled


def grayscale(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> the same shape, three equal channels."""
    _refuse_grey("grayscale", images)
    return luma(images).expand_as(images).contiguous()


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Inverts what is at least as bright as the threshold."""
    return torch.where(images >= threshold, 1 - images, images)


def change_(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *values: Tensor) -> None:
    """images[b] = operation(images[b], values[b]) where chosen[b], in place.

    On a CPU only the chosen rows are calculated. Elsewhere all are: to learn how many are chosen would stop the device.
    """
    if not waiting.may_look(images):
        images.copy_(torch.where(_each(chosen), operation(images, *values), images))
        return
    rows = chosen.nonzero()[:, 0]
    if len(rows) == len(images):
        images.copy_(operation(images, *values))
    elif len(rows):
        images.index_copy_(0, rows, operation(images[rows], *(value[rows] for value in values)))


class Jitter:
    """Colour jitter in an order of each image's own (Howard 2013; torchvision's ColorJitter), for a whole batch.

    factors: the operations of JITTER to apply, each with its (B,) parameters. order: (B, len(factors)) int64, row b the
    sequence in which image b meets them. chosen: (B,) bool, the images that are jittered at all.

    Brightness, contrast and saturation are one formula, factor·x + shares of the mean and of the pixel's own grey, so
    that at each place of the order one pass serves all images, whichever of the three they meet there. Hue takes three times
    as many operations: where all images go through each of them, it has a place of its own amid those of the others.
    """

    def __init__(self, factors: dict[str, Tensor], order: Tensor, chosen: Tensor):
        met = torch.where(chosen, order.T, -1)  # (places, B): the number of the operation each image meets there
        numbers = {name: number for number, name in enumerate(factors)}
        self.hue_shift = factors.get("hue")
        self.hue = {}  # place -> (B,), the images that meet hue there, after the others' pass
        if "hue" in factors and (waiting.may_look(met) or len(factors) == 1):
            self.hue = dict(enumerate(met == numbers["hue"]))
        elif "hue" in factors:
            met, self.hue = _places_around(numbers["hue"], met), {len(factors) - 2: chosen}
        self.factor = torch.ones(met.shape, device=met.device)  # (places, B)
        self.share = {}  # contrast: of the mean grey; saturation: of the pixel's
        for name, values in factors.items():
            if name == "hue":
                continue
            here = met == numbers[name]
            self.factor = torch.where(here, values, self.factor)
            if name != "brightness":
                self.share[name] = torch.where(here, 1 - values, 0.0)  # (places, B)
        self.places = range(len(met))

    def apply_(self, images: Tensor, rows: slice) -> None:
        """Jitters, in place, the part of the batch that lies at `rows`. images: (b, C, H, W)."""
        for place in self.places:
            factor = self.factor[place, rows]
            if _any_other_than(1, factor):
                shares = {name: share[place, rows] for name, share in self.share.items()}
                added = [(name, share) for name, share in shares.items() if _any_other_than(0, share)]
                grey = luma(images) if added else None
                means = mean_luma(grey) if "contrast" in dict(added) else None
                other = None
                for name, share in added:
                    part = (means if name == "contrast" else grey) * _each(share)
                    other = part if other is None else other + part
                images.mul_(_each(factor))
                if other is not None:
                    images.add_(other)
                images.clamp_(0, 1)
            if place in self.hue:
                change_(images, self.hue[place][rows], hue, self.hue_shift[rows])


def _places_around(number: int, met: Tensor) -> Tensor:
    """The places before an operation that each image meets once, then those after it: (places, B) -> (2·places - 2, B)."""
    reached = (met == number).cumsum(0).bool()  # (places, B)
    return torch.cat([met.masked_fill(reached, -1)[:-1], met.masked_fill(~reached, -1)[1:]])


def _any_other_than(value: float, values: Tensor) -> bool:
    """Whether something is there to do; always so where looking would stop the device."""
    return not waiting.may_look(values) or bool((values != value).any())


JITTER = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
