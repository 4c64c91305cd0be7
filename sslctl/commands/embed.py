"""sslctl embed: features, labels and file names of a dataset to disk, a batch at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslctl.data.sources import Source
from sslctl.data.tiles import Tiles
from sslctl.errors import Stopped, say, user_path
from sslctl.evaluation.feature_files import WRITERS, About, Rows, as_utf8, chosen_format, is_own, refuse_missing
from sslctl.evaluation.features import extract_batches
from sslctl.evaluation.named_networks import NamedNetwork, named_networks
from sslctl.factory.from_config import build_source
from sslctl.runs.atomic import make_folder_of, refuse_others_file, replacing
from sslctl.runs.directory import now, versions
from sslctl.signals import Interrupted, Signals
from sslctl.training.plan import choose_device
from sslctl.training.progress import Progress


def embed(config: Any) -> None:
    """Writes one file a run: a row for each image, in the order of the dataset."""
    # What can be refused by the command alone is refused before a network is read.
    kind = chosen_format(config, WRITERS)
    refuse_missing(kind)
    device = choose_device(config.device)
    for one in named_networks(config, "test" if config.split == "test" else "train"):
        sources = _sources(config, one)
        out = _out(config, one, kind)
        about = _about(one, sources, config.split)
        say(f"{one.title}: {about.rows:,} {one.source.modality.plural} of {one.source.name}, {config.split} split")
        # A batch at a time from images to disk, since features of a large dataset do not fit in memory; a signal leaves no file.
        rows = (rows for source in sources for rows in _rows(one, source, config, device))
        try:
            with Signals() as handler, replacing(out) as temporary:
                odd = _write(rows, kind, temporary, about)
        except Interrupted:
            raise Stopped(handler.status) from None
        size = out.stat().st_size / 2**20
        say(f"  {out}: {about.rows:,} rows × {about.width} {one.subject.features} features, {size:,.1f} MiB")
        if odd:
            say(f"  {odd:,} of these rows have features that are not finite numbers")


def _write(feed: Iterator[Rows], kind: str, path: Path, about: About) -> int:
    """Writes the file and returns how many rows hold features that are not finite."""
    odd = done = 0
    with WRITERS[kind](path, about) as write, Progress(about.rows, transient=True) as progress:
        for rows in feed:
            write(rows)
            odd += int((~np.isfinite(rows.features).all(1)).sum())
            done += len(rows.names)
            progress.update(done, f"{done:,} of {about.rows:,} rows")
    return odd


def _rows(one: NamedNetwork, source: Source, config: Any, device: torch.device) -> Iterator[Rows]:
    """Yields a split's rows, a batch at a time. A signal interrupts it between batches."""
    subject, everything, done = one.subject, torch.arange(len(source)), 0
    subject.module.to(device)
    reading = {"resize": subject.preprocess.resize, "batch_size": config.batch_size, "workers": config.workers}
    for features in extract_batches(subject.function, source, everything, **reading, device=device):
        index = everything[done : done + len(features)]
        done += len(features)
        names = [_name(source, row) for row in index.tolist()]
        places = np.array([source.places[row] for row in index.tolist()]) if isinstance(source, Tiles) else None
        yield Rows(features.numpy(), index.numpy(), source.labels[index].numpy(), names, source.split, places)


def _name(source: Source, row: int) -> str:
    """Names an image by its path, or its number where it has none."""
    return as_utf8(source.describe(row))


def _out(config: Any, one: NamedNetwork, kind: str) -> Path:
    """Returns where the file goes. Raises InputError where none can be written."""
    features = "" if config.features is None else f"-{config.features}"
    name = f"{one.source.name}-{config.split}{features}.{kind}"
    out = user_path(config.out) if config.out else one.folder / "embeddings" / name
    make_folder_of(out)
    refuse_others_file(out, "embed", lambda path: is_own(path, kind))
    if out.exists():
        say(f"{out} was written by sslctl embed before: it is replaced")
    return out


def _sources(config: Any, one: NamedNetwork) -> list[Source]:
    """Returns the splits that are asked for. Of a dataset without labels, the training split is everything."""
    if config.split != "all" or not one.source.classes:
        return [one.source]
    return [one.source, build_source(one.dataset, "test")]


def _about(one: NamedNetwork, sources: list[Source], split: str) -> About:
    subject = one.subject
    origin = {
        "weights": one.title,
        "features": subject.features,
        "weights_sha256": subject.weights_sha256,
        "preprocess": subject.preprocess.summary(),
        "dataset": one.source.name,
        "split": split,
        "versions": versions(),
        "time": now(),
    }
    origin = {key: as_utf8(value) if isinstance(value, str) else value for key, value in origin.items()}
    classes = tuple(map(as_utf8, one.source.classes))
    tiled = isinstance(one.source, Tiles)
    return About(sum(map(len, sources)), subject.width(), classes, json.dumps(origin, ensure_ascii=False), tiled)
