"""Pictures of views: what the augmentation makes of a few images, in one sheet."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sslctl.data.files import UNREADABLE
from sslctl.data.sources import Source
from sslctl.errors import InputError, user_path
from sslctl.ops.color_space import visible
from sslctl.random import Key
from sslctl.runs.atomic import make_folder_of, refuse_others_file, replacing
from sslctl.views.maker import ViewMaker, clean

_CELL, _GAP = 96, 4  # pixels
_SOFTWARE = "sslctl"  # written into a picture: such a one may be replaced


def sheet_of_views(source: Source, maker: ViewMaker, rows: Tensor, *, seed: int, draws: int) -> Tensor:
    """(3, H, W) in [0, 1]: for each of the images at `rows` a line, as `lines_of_views` gives it."""
    lines = lines_of_views(source, maker, rows, seed=seed, draws=draws)
    return torch.cat([torch.cat([cell(image) for image in line], 2) for line in lines], 1)


def lines_of_views(source: Source, maker: ViewMaker, rows: Tensor, *, seed: int, draws: int) -> list[list[Tensor]]:
    """Yields for each of the images at `rows` the original, then for each epoch all its views, (C, h, w) in [0, 1]."""
    lines = []
    for row in rows.tolist():
        image = source.read(row)
        line = [clean(image)]
        for epoch in range(draws):
            key = Key(seed, epoch, torch.tensor([row]))
            crops = maker.cut([image], key)  # group -> (V, 1, C, h, w)
            line += [view[0] for group in maker.finish(crops, key).values() for view in group]
        lines.append(line)
    return lines


def writable(out: str | Path, verb: str) -> Path:
    """Returns where a verb's picture goes.

    Raises InputError for a name that is none of a picture, another file that is there, or a folder that cannot be made.
    """
    path = user_path(out)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"out={path}: expected a .png or .jpg file")
    make_folder_of(path)
    refuse_others_file(path, verb, _is_own)
    return path


def _is_own(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == _SOFTWARE or image.info.get("comment") == _SOFTWARE.encode()
    except UNREADABLE:
        return False


def refuse_among_images(out: Path, source: Source, root: str | None) -> None:
    """Raises InputError for a picture that would count as one of the images of dataset.root."""
    if not (source.paths and root):
        return
    folder = user_path(root).resolve()
    if out.resolve().is_relative_to(folder):
        elsewhere = os.path.relpath(folder.parent / out.name)
        message = f"out={out} would lie among the images of dataset.root={root}: out={elsewhere}"
        raise InputError(message, advice=[f"out={elsewhere}"])


def save(picture: Tensor, out: Path) -> None:
    """picture: (3, H, W) in [0, 1]."""
    mark = PngInfo()
    mark.add_text("Software", _SOFTWARE)
    with replacing(out) as temporary:
        as_image(picture).save(
            temporary, "PNG" if out.suffix.lower() == ".png" else "JPEG", pnginfo=mark, comment=_SOFTWARE
        )


def as_image(picture: Tensor) -> Image.Image:
    """picture: (3, H, W) in [0, 1]."""
    return Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def cell(image: Tensor) -> Tensor:
    """(C, h, w) in [0, 1] -> (3, cell, cell) with a white margin, nearest neighbours so that pixels stay visible."""
    image = visible(image)
    height, width = image.shape[1:]
    scale = _CELL / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    mode = "nearest" if scale >= 1 else "area"
    image = F.interpolate(image[None], size, mode=mode)[0].expand(3, -1, -1)
    pad = (_GAP, _CELL - size[1] + _GAP, _GAP, _CELL - size[0] + _GAP)
    return F.pad(image, pad, value=1.0)
