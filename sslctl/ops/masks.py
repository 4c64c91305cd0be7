"""Which patches a method hides: keyed, (B, L) bool with True where a patch is hidden."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.random import Key
from sslctl.transfer import to_device


def random_order(key: Key, name: str, length: int, kept: int) -> tuple[Tensor, Tensor]:
    """Positions (B, kept) that stay visible, in ascending order, and the mask (B, length) of the others."""
    keep = key.permutation(name, length)[:, :kept].sort(dim=1).values
    mask = torch.ones(len(keep), length, dtype=torch.bool, device=keep.device).scatter_(1, keep, False)
    return keep, mask


def block_masks(key: Key, names: list[str], rows: int, columns: int, hidden: Tensor, aspect: float = 0.3) -> Tensor:
    """Rectangles laid over one another until `hidden` patches are covered, exactly (BEiT, arXiv:2106.08254, algorithm 1).

    names: of the masks of every image. hidden: (names, B) int64. Returns (names, B, L) bool, all of them drawn together.
    Each rectangle has a share of what is still to hide, at least a ninth of the smaller side squared, and a ratio of sides
    log-uniform in (aspect, 1 / aspect). The last one is cut off, row by row, where it would hide too many: BEiT's and iBOT's
    official codes stop there after ten attempts, about one patch short of what was asked for (17.7 of 19.6, 97.6 of 98).
    """
    turns, length = range(8), rows * columns
    numbers = dict.fromkeys([f"{turn}/{part}" for turn in turns for part in ("area", "ratio", "top", "left")], 1)
    drawn = key.stacked({"": names}, numbers | {"rest": length})[""]
    ratios = torch.stack([drawn.uniform(f"{turn}/ratio") for turn in turns])  # (turns, N), N masks
    low, high = math.log(aspect), -math.log(aspect)
    ratios = torch.exp(low + (high - low) * ratios)
    corners = torch.stack([drawn.uniform(f"{turn}/{part}") for turn in turns for part in ("top", "left")])
    corners = corners.unflatten(0, (-1, 2))  # (turns, 2, N)

    # Of vertical and horizontal together, in this order: how far they go, and every place there is on either.
    sides = to_device(torch.tensor([[rows], [columns]], dtype=torch.float32), hidden.device)  # (2, 1)
    least_side, room, places = torch.ones_like(sides), sides + 1, torch.arange(max(rows, columns), device=hidden.device)
    least = (min(rows, columns) // 3) ** 2
    missing = hidden.flatten()  # (N,), below 0 where a rectangle was cut off
    covered = torch.zeros(len(missing), length, dtype=torch.bool, device=hidden.device)
    for turn in turns:
        area = least + drawn.uniform(f"{turn}/area") * (missing - least).clamp(min=0)
        size = torch.stack([area * ratios[turn], area / ratios[turn]]).sqrt().round().clamp(least_side, sides)  # (2, N)
        first = (corners[turn] * (room - size)).floor()
        behind = places - first[..., None]  # (2, N, longer side), how far a place lies behind the first one
        within = (behind >= 0) & (behind < size[..., None])
        inside = within[0, :, :rows, None] & within[1, :, None, :columns]  # (N, rows, columns)
        fresh = inside.flatten(1) > covered
        count = fresh.cumsum(1)
        covered |= fresh & (count <= missing[:, None])
        missing = missing - count[:, -1]

    # What eight rectangles left over, one patch here and there.
    order = drawn.permutation("rest", length)
    free = ~covered.gather(1, order)
    extra = free & (free.cumsum(1) <= missing[:, None])
    covered |= torch.zeros_like(covered).scatter_(1, order, extra)
    return covered.unflatten(0, hidden.shape)


def some_blocks(
    key: Key, host_key: Key, names: list[str], rows: int, columns: int, chance: float, low: float, high: float
) -> tuple[Tensor, int]:
    """Which patches of views are hidden from the student (iBOT, arXiv:2111.07832, section 4.1): (names, B, L) bool.

    None of a view with 1 - chance, else blocks of a share of them that is drawn between low and high. host_key: the key on
    the CPU. Returned besides is how many are hidden in all, which no GPU needs to be asked.
    """
    drawn = host_key.stacked({"": names}, {"ratio": 1, "chance": 1})[""]
    share = drawn.between("ratio", low, high) * drawn.chance("chance", chance)  # (names · B,)
    hidden = (share * rows * columns).long().unflatten(0, (len(names), -1))
    return block_masks(key, names, rows, columns, to_device(hidden, key.index.device)), int(hidden.sum())


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
