"""sslctl views: what the augmentation does to a dataset's images."""

from typing import Any

import torch

from sslctl.errors import InputError, say
from sslctl.factory.from_config import build_source, build_views
from sslctl.ops.image_size import in_words
from sslctl.visuals.sheets import refuse_among_images, save, sheet_of_views, writable


def views(config: Any) -> None:
    """Draws one row an image: the original, then for each epoch all its views."""
    out = writable(config.out, "views")
    source = build_source(config.dataset, "train")
    if not source.modality.visible:
        raise InputError(f"{source.name} has {source.summary()}: there is nothing to see")
    refuse_among_images(out, source, config.dataset.get("root"))
    maker = build_views(config, source)
    rows = torch.arange(0, len(source), max(1, len(source) // config.images))[: config.images]
    save(sheet_of_views(source, maker, rows, seed=config.seed, draws=config.draws), out)
    sizes = ", ".join(f"{count} {group} of {in_words(size)} px" for group, (count, size) in maker.sizes().items())
    say(f"{source.name}: {sizes}; dropped: {', '.join(maker.dropped) or 'no operation'}")
    say(f"{out}: {len(rows)} images, each with {config.draws} draws; the original is the first of a row")
