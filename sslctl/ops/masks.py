"""Which patches a method hides: keyed, (B, L) bool with True where a patch is hidden."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.random import Key


def random_order(key: Key, name: str, length: int, kept: int) -> tuple[Tensor, Tensor]:
    """Positions (B, kept) that stay visible, in ascending order, and the mask (B, length) of the others."""
    keep = key.permutation(name, length)[:, :kept].sort(dim=1).values
    mask = torch.ones(len(keep), length, dtype=torch.bool, device=keep.device).scatter_(1, keep, False)
    return keep, mask


def block_mask(key: Key, name: str, rows: int, columns: int, hidden: Tensor, aspect: float = 0.3) -> Tensor:
    """Rectangles laid over one another until `hidden` (B,) patches are covered, exactly (BEiT, arXiv:2106.08254, algorithm 1).

    Each rectangle has a share of what is still to hide, at least a ninth of the smaller side squared, and a ratio of sides
    log-uniform in (aspect, 1 / aspect). The last one is cut off, row by row, where it would hide too many: BEiT's and iBOT's
    official codes stop there after ten attempts, about one patch short of what was asked for (17.7 of 19.6, 97.6 of 98).
    """
    rounds, length = 8, rows * columns
    device = hidden.device
    covered = torch.zeros(len(hidden), length, dtype=torch.bool, device=device)
    least = (min(rows, columns) // 3) ** 2
    row = torch.arange(rows, device=device).repeat_interleave(columns)  # (L,)
    column = torch.arange(columns, device=device).repeat(rows)
    for turn in range(rounds):
        missing = hidden - covered.sum(1)  # (B,)
        area = least + key.uniform(f"{name}/{turn}/area") * (missing - least).clamp(min=0)
        ratio = torch.exp(key.between(f"{name}/{turn}/ratio", math.log(aspect), -math.log(aspect)))
        height = (area * ratio).sqrt().round().clamp(1, rows)
        width = (area / ratio).sqrt().round().clamp(1, columns)
        top = (key.uniform(f"{name}/{turn}/top") * (rows - height + 1)).floor()
        left = (key.uniform(f"{name}/{turn}/left") * (columns - width + 1)).floor()
        inside = (row >= top[:, None]) & (row < (top + height)[:, None])
        inside &= (column >= left[:, None]) & (column < (left + width)[:, None])
        fresh = inside & ~covered
        covered |= fresh & (fresh.cumsum(1) <= missing[:, None])
    missing = hidden - covered.sum(1)  # what eight rectangles left over, one patch here and there
    order = key.permutation(f"{name}/rest", length)
    free = ~covered.gather(1, order)
    extra = free & (free.cumsum(1) <= missing[:, None])
    return covered | torch.zeros_like(covered).scatter_(1, order, extra)


def some_blocks(key: Key, name: str, rows: int, columns: int, chance: float, low: float, high: float) -> Tensor:
    """Which patches of a view are hidden from the student (iBOT, arXiv:2111.07832, section 4.1): (B, L) bool.

    None of an image with 1 - chance, else blocks of a share of them that is drawn between low and high.
    """
    share = key.between(f"{name}/ratio", low, high) * key.chance(f"{name}/chance", chance)
    return block_mask(key, name, rows, columns, (share * rows * columns).long())


def greyed(images: Tensor, mask: Tensor, rows: int, columns: int) -> Tensor:
    """Images (B, C, H, W) in [0, 1] whose patches are grey where mask (B, L) is True: a picture of what is hidden."""
    hidden = F.interpolate(mask.view(-1, 1, rows, columns).float(), images.shape[-2:], mode="nearest")
    return images * (1 - hidden) + 0.5 * hidden


def rectangles(key: Key, name: str, count: int, rows: int, columns: int, height: int, width: int) -> Tensor:
    """Places (B, count, height · width) int64 of blocks of one size anywhere in a grid, row by row; they may overlap."""
    top = (key.uniform(f"{name}/top", count) * (rows - height + 1)).long()  # (B, count)
    left = (key.uniform(f"{name}/left", count) * (columns - width + 1)).long()
    row = torch.arange(height, device=top.device).repeat_interleave(width)  # (height · width,)
    column = torch.arange(width, device=top.device).repeat(height)
    return (top[..., None] + row) * columns + left[..., None] + column
