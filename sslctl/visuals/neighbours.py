"""Which images a backbone takes for alike: a picture of nearest neighbours."""

import torch
from torch import Tensor

from sslctl.visuals.sheets import cell

NEIGHBOURS = 5


def sheet_of_neighbours(images: Tensor) -> Tensor:
    """images: (N, 1 + k, C, H, W) uint8, an image and those nearest to it. Returns (3, H, W) in [0, 1]: a row a query,
    which stands apart from the rest."""
    lines = []
    for row in images.float() / 255:
        query, *others = [cell(image) for image in row]
        lines.append(torch.cat([query, torch.ones_like(query)[:, :, : query.shape[2] // 4], *others], 2))
    return torch.cat(lines, 1)
