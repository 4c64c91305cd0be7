"""Square pieces of images."""

import torch
from torch import Tensor


def cut_tiles(images: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """(B, C, H, W), corners (B, n) int64 -> (B, n, C, size, size)."""
    span = torch.arange(size, device=images.device)
    rows, columns = top[..., None] + span, left[..., None] + span  # (B, n, size)
    each = torch.arange(len(images), device=images.device)[:, None, None, None]
    tiles = images.permute(0, 2, 3, 1)[each, rows[..., :, None], columns[..., None, :]]  # (B, n, size, size, C)
    return tiles.permute(0, 1, 4, 2, 3)


def mosaic(tiles: Tensor, columns: int) -> Tensor:
    """(B, n, C, size, size) -> (B, C, rows · size, columns · size), row by row."""
    x = tiles.unflatten(1, (-1, columns))  # (B, rows, columns, C, size, size)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def refuse_small_tiles(network: torch.nn.Module, size: int, side: int) -> None:
    """Raises ValueError where a backbone cannot take tiles of so many pixels, cut from views of `side` pixels."""
    if getattr(network, "fixed_size", False):
        raise ValueError(
            "this method feeds tiles to the backbone, this one takes whole images only: backbone=small_resnet"
        )
    if size < 8:
        raise ValueError(
            f"tiles of {size} pixels, from views of {side}, are too small: enlarge dataset.image_size or"
            " augmentation.global.size"
        )
