"""sRGB to CIE L*a*b* and back, D65 white: lightness in [0, 100], a and b about -110 to 110. In fp32."""

import torch
from torch import Tensor

from sslctl.transfer import to_device

_XYZ_OF_RGB = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
_EDGE = 6 / 29  # of the cube root's linear part (CIE 15:2004, 8.2.1)


def rgb_to_lab(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, H, W): L*, a*, b*."""
    with torch.autocast(images.device.type, enabled=False):
        rgb = images.float()
        linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)
        matrix = _matrix(images)
        xyz = torch.einsum("ij,bjhw->bihw", matrix / matrix.sum(1, keepdim=True), linear)  # over the white point
        f = torch.where(xyz > _EDGE**3, xyz.clamp(min=_EDGE**3) ** (1 / 3), xyz / (3 * _EDGE**2) + 4 / 29)
        x, y, z = f.unbind(1)
        return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def lightness(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, H, W) in [0, 1]: the lightness three times, for networks that take colour."""
    return (rgb_to_lab(images)[:, :1] / 100).expand(-1, 3, -1, -1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Inverts `rgb_to_lab`; colours that sRGB does not have are clipped."""
    with torch.autocast(lab.device.type, enabled=False):
        lightness, a, b = lab.float().unbind(1)
        y = (lightness + 16) / 116
        f = torch.stack([y + a / 500, y, y - b / 200], 1)
        xyz = torch.where(f > _EDGE, f**3, 3 * _EDGE**2 * (f - 4 / 29))
        matrix = _matrix(lab)
        linear = torch.einsum("ij,bjhw->bihw", (matrix / matrix.sum(1, keepdim=True)).inverse(), xyz).clamp(0, 1)
        return torch.where(
            linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
        )


def _matrix(like: Tensor) -> Tensor:
    return to_device(torch.tensor(_XYZ_OF_RGB), like.device)


def colour_bins(spacing: int) -> Tensor:
    """(Q, 2): the points of a square grid over a and b that are nearest to some colour of sRGB, in order of a, then b.

    sRGB is looked at with 65 levels a channel. A spacing of 10 gives 261, as many as lie at most 5 outside its convex hull. The
    313 of Zhang et al. are a file of theirs; it would take a margin of more than a bin's width, of colours that sRGB has not.
    """
    level = torch.linspace(0, 1, 65)
    cube = torch.cartesian_prod(level, level, level).T.reshape(1, 3, -1, 1)
    return torch.unique((rgb_to_lab(cube)[0, 1:, :, 0].T / spacing).round(), dim=0) * spacing


def visible(images: Tensor) -> Tensor:
    """(..., C, H, W) -> what of it can be shown: grey or three channels as they are, of others the first, or the first three."""
    channels = images.shape[-3]
    return images if channels in (1, 3) else images[..., : 1 if channels == 2 else 3, :, :]
