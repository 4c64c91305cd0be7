"""Pictures of a method: what it makes of a few images, side by side."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.data.loader import one_batch
from sslctl.data.modality import TEXTS
from sslctl.data.sources import Source
from sslctl.methods.base import Method
from sslctl.ops.text_image import equally_high, plain, written
from sslctl.views import ViewMaker
from sslctl.visuals.sheets import cell

_GAP = 4  # pixels around words


@torch.no_grad()
def draw(method: Method, source: Source, views: ViewMaker, *, seed: int, images: int) -> dict[str, Tensor]:
    """Lets a method draw training images spread over the dataset, in eval mode: name -> (n, C, h, w) in [0, 1].

    Of texts, the batch's targets hold "spelt": what each token is written as.
    """
    device = next(method.parameters()).device
    rows = torch.arange(0, len(source), max(1, len(source) // images))[:images]
    batch = one_batch(source, views, rows, seed, device)
    if source.modality == TEXTS:
        batch = replace(batch, targets={"spelt": source.spelt()})
    training = method.training
    method.eval()
    try:
        return method.pictures(batch)
    finally:
        method.train(training)


def sheet_of(method: Method, source: Source, views: ViewMaker, *, seed: int, images: int) -> Tensor | None:
    """Makes one picture of `draw` for TensorBoard; None where a method has nothing to show."""
    columns = draw(method, source, views, seed=seed, images=images)
    return sheet(columns, words=method.modality == TEXTS) if columns else None


def sheet(pictures: dict[str, Tensor], *, words: bool = False) -> Tensor:
    """Arranges pictures, name -> (n, C, h, w) in [0, 1], as one (3, H, W): a row an image, the names above the columns.

    words: whether they are pictures of words, which are shown as large as they were written.
    """
    show = _as_written if words else cell
    columns = [torch.cat([show(image.detach().float().cpu()) for image in images], 1) for images in pictures.values()]
    heads = equally_high(
        [written(plain(name), column.shape[2]) for name, column in zip(pictures, columns, strict=True)]
    )
    return torch.cat([torch.cat(heads, 2), torch.cat(columns, 2)], 1)


def _as_written(image: Tensor) -> Tensor:
    """(C, h, w) -> (C, h', w') with a white margin."""
    return F.pad(image, (_GAP,) * 4, value=1.0)
