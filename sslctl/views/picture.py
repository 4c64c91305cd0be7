"""sslctl views: a picture of what the augmentation does to the dataset's images."""

from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from sslctl.build import build_source
from sslctl.config import InputError, user_path
from sslctl.views.maker import ViewMaker, dropped_operations
from sslctl.views.random import Key

_CELL, _GAP = 96, 4  # pixels


def views(config: Any) -> None:
    """One row an image: the original, then for each epoch all its views."""
    out = user_path(config.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"out={out}: expected a .png or .jpg file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out} cannot be written: {error.strerror}") from error
    source = build_source(config.dataset, "train")
    augmentation = OmegaConf.to_container(config.augmentation, resolve=True)
    dropped = dropped_operations(augmentation, list(config.dataset.get("drops") or []), source.channels)
    maker = ViewMaker(augmentation, source.image_size, tuple(dropped))
    rows = torch.arange(0, len(source), max(1, len(source) // config.images))[: config.images]
    lines = []
    for row in rows.tolist():
        image = source.read(row)
        cells = [image.float() / 255]
        for epoch in range(config.draws):
            key = Key(config.seed, epoch, torch.tensor([row]))
            crops = maker.cut([image], key)  # group -> (V, 1, C, h, w)
            cells += [view[0] for group in maker.finish(crops, key).values() for view in group]
        lines.append(torch.cat([_cell(cell) for cell in cells], 2))
    picture = torch.cat(lines, 1)  # (3, H, W)
    Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(out)
    sizes = ", ".join(f"{count} {group} of {size} px" for group, (count, size) in maker.sizes().items())
    print(f"{source.name}: {sizes}; dropped: {', '.join(dropped) or 'no operation'}")
    print(f"{out}: {len(rows)} images, each with {config.draws} draws; the original is the first of a row")


def _cell(image: Tensor) -> Tensor:
    """(C, h, w) in [0, 1] -> (3, cell, cell) with a white margin, nearest neighbours so that pixels stay visible."""
    height, width = image.shape[1:]
    scale = _CELL / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    mode = "nearest" if scale >= 1 else "area"
    image = F.interpolate(image[None], size, mode=mode)[0].expand(3, -1, -1)
    pad = (_GAP, _CELL - size[1] + _GAP, _GAP, _CELL - size[0] + _GAP)
    return F.pad(image, pad, value=1.0)
