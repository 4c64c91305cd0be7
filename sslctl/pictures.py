"""sslctl pictures: what a method makes of some images, side by side."""

from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw
from torch import Tensor

from sslctl import checkpoint
from sslctl.build import build_source, build_views
from sslctl.config import InputError
from sslctl.data.loader import one_batch
from sslctl.data.sources import Source
from sslctl.evaluation.subjects import load_method, resolve_runs
from sslctl.methods.base import Method
from sslctl.run_directory import read_config
from sslctl.views import ViewMaker
from sslctl.views.maker import dropped_operations
from sslctl.views.picture import cell, save, writable
from sslctl.vit import patch_size_of

LINE = 16  # pixels of a line of words


def pictures(config: Any) -> None:
    """Writes one picture a run: a row an image, a column what the method calls it."""
    if not config.ckpt:
        raise InputError("no run to show: sslctl pictures runs/latest")
    for run, path in resolve_runs(config.ckpt):
        out = writable(config.out or run / "pictures.png")
        settings = OmegaConf.create(read_config(run))
        source = build_source(settings.dataset, "train")
        method = load_method(run)
        step = checkpoint.load(path, method)["step"]
        shown = draw(method, source, views_of(settings, source, method), seed=config.seed, images=config.images)
        if not shown:
            raise InputError(f"{run}: method={settings.names.method} has no pictures to show")
        save(sheet(shown), out)
        print(f"{out}: {len(next(iter(shown.values())))} images at step {step:,}: {', '.join(shown)}")


def views_of(settings: Any, source: Source, method: Method) -> ViewMaker:
    """What makes the views of a run, as its configuration says."""
    augmentation = OmegaConf.to_container(settings.augmentation, resolve=True)
    dropped = dropped_operations(augmentation, list(settings.dataset.get("drops") or []), source.channels)
    return build_views(settings, source.image_size, tuple(dropped), patch_size_of(method.backbone.network))


@torch.no_grad()
def draw(method: Method, source: Source, views: ViewMaker, *, seed: int, images: int) -> dict[str, Tensor]:
    """A method's pictures of training images spread over the dataset, in eval mode: name -> (n, C, h, w) in [0, 1]."""
    device = next(method.parameters()).device
    rows = torch.arange(0, len(source), max(1, len(source) // images))[:images]
    training = method.training
    method.eval()
    try:
        return method.pictures(one_batch(source, views, rows, seed, device))
    finally:
        method.train(training)


def sheet_of(method: Method, source: Source, views: ViewMaker, *, seed: int, images: int) -> Tensor | None:
    """The picture of `draw` for TensorBoard; None where a method has nothing to show."""
    shown = draw(method, source, views, seed=seed, images=images)
    return sheet(shown) if shown else None


def sheet(shown: dict[str, Tensor]) -> Tensor:
    """name -> (n, C, h, w) in [0, 1]; returns (3, H, W): a row an image, the names above the columns."""
    columns = [torch.cat([cell(image) for image in images.detach().float().cpu()], 1) for images in shown.values()]
    words = [_words(name, column.shape[2]) for name, column in zip(shown, columns, strict=True)]
    height = max(word.shape[1] for word in words)
    words = [torch.cat([word, word.new_ones(3, height - word.shape[1], word.shape[2])], 1) for word in words]
    return torch.cat([torch.cat(words, 2), torch.cat(columns, 2)], 1)


def _words(text: str, width: int) -> Tensor:
    """(3, h, width): black on white, in as many lines as it takes."""
    probe = ImageDraw.Draw(Image.new("L", (1, 1)))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and probe.textlength(longer) > width - 8:
            lines.append(word)
        else:
            lines[-1] = longer
    image = Image.new("L", (width, LINE * len(lines)), 255)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((4, LINE * number + 2), line, fill=0)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width)
    return (pixels.float() / 255).expand(3, -1, -1)
