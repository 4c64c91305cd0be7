"""sslctl pictures: what a method makes of some images, side by side."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from sslctl import checkpoint
from sslctl.build import build_source, build_views
from sslctl.cards import equally_high, plain, written
from sslctl.config import InputError
from sslctl.data.loader import one_batch
from sslctl.data.sources import Source
from sslctl.evaluation.subjects import load_method, resolve_runs, with_tokenizer
from sslctl.methods.base import Method
from sslctl.run_directory import read_config
from sslctl.views import ViewMaker
from sslctl.views.maker import dropped_operations
from sslctl.views.picture import cell, save, writable
from sslctl.vit import patch_size_of

_GAP = 4  # pixels around words


def pictures(config: Any) -> None:
    """Writes one picture a run: a row an image, a column what the method calls it."""
    if not config.ckpt:
        raise InputError("no run to show: sslctl pictures runs/latest")
    for run, path in resolve_runs(config.ckpt):
        out = writable(config.out or run / "pictures.png")
        settings = OmegaConf.create(read_config(run))
        source = build_source(with_tokenizer(settings.dataset, run), "train")
        method = load_method(run)
        step = checkpoint.load(path, method)["step"]
        shown = draw(method, source, views_of(settings, source, method), seed=config.seed, images=config.images)
        if not shown:
            raise InputError(f"{run}: method={settings.names.method} has no pictures to show")
        save(sheet(shown), out)
        what = "texts" if source.gives == "tokens" else "images"
        print(f"{out}: {len(next(iter(shown.values())))} {what} at step {step:,}: {', '.join(shown)}")


def views_of(settings: Any, source: Source, method: Method) -> ViewMaker:
    """What makes the views of a run, as its configuration says."""
    augmentation = OmegaConf.to_container(settings.augmentation, resolve=True)
    dropped = dropped_operations(augmentation, list(settings.dataset.get("drops") or []), source.channels)
    return build_views(settings, source.image_size, tuple(dropped), patch_size_of(method.backbone.network))


@torch.no_grad()
def draw(method: Method, source: Source, views: ViewMaker, *, seed: int, images: int) -> dict[str, Tensor]:
    """A method's pictures of training images spread over the dataset, in eval mode: name -> (n, C, h, w) in [0, 1].

    Of texts, the batch's targets hold "spelt": what each token is written as.
    """
    device = next(method.parameters()).device
    rows = torch.arange(0, len(source), max(1, len(source) // images))[:images]
    batch = one_batch(source, views, rows, seed, device)
    if source.gives == "tokens":
        batch = replace(batch, targets={"spelt": source.spelt()})
    training = method.training
    method.eval()
    try:
        return method.pictures(batch)
    finally:
        method.train(training)


def sheet_of(method: Method, source: Source, views: ViewMaker, *, seed: int, images: int) -> Tensor | None:
    """The picture of `draw` for TensorBoard; None where a method has nothing to show."""
    shown = draw(method, source, views, seed=seed, images=images)
    return sheet(shown) if shown else None


def sheet(shown: dict[str, Tensor]) -> Tensor:
    """name -> (n, C, h, w) in [0, 1]; returns (3, H, W): a row an image, the names above the columns.

    What is not square is words, which are shown as large as they were written.
    """
    columns = [torch.cat([_shown(image.detach().float().cpu()) for image in images], 1) for images in shown.values()]
    words = equally_high([written(plain(name), column.shape[2]) for name, column in zip(shown, columns, strict=True)])
    return torch.cat([torch.cat(words, 2), torch.cat(columns, 2)], 1)


def _shown(image: Tensor) -> Tensor:
    """(C, h, w) -> (3, h', w') with a white margin."""
    return cell(image) if image.shape[1] == image.shape[2] else F.pad(image, (_GAP,) * 4, value=1.0)
