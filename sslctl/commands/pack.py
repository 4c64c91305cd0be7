"""sslctl pack: a dataset as one folder that dataset=hf, and Hugging Face datasets, read memory-mapped."""

from typing import Any

from omegaconf import OmegaConf

from sslctl.config.command_line import shell_words
from sslctl.data.layout import NoTestSplit
from sslctl.data.modality import IMAGES
from sslctl.data.packed import refuse_without_datasets
from sslctl.data.packing import new_folder, write_pack
from sslctl.data.source import Source
from sslctl.errors import InputError, Stopped, say, user_path
from sslctl.factory.from_config import build_source
from sslctl.runs.atomic import make_folder_of
from sslctl.runs.directory import total_size
from sslctl.signals import Interrupted, Signals
from sslctl.training.progress import Progress


def pack(config: Any) -> None:
    """Writes all splits of a dataset to out=, whole or not at all."""
    refuse_without_datasets()
    if not config.out:
        raise InputError("out is not set: out=FOLDER for the pack")
    out = user_path(config.out)
    sources = _splits(config.dataset)
    make_folder_of(out)
    total = sum(map(len, sources.values()))
    try:
        with Signals() as handler, new_folder(out) as folder, Progress(total, transient=True) as progress:
            write_pack(folder, sources, lambda done: progress.update(done, f"{done:,} of {total:,} images"))
    except Interrupted:
        raise Stopped(handler.status) from None
    counts = ", ".join(f"{len(source):,} {split}" for split, source in sources.items())
    say(f"{out}: {counts} images, {total_size(out) / 2**20:,.1f} MiB")
    channels = sources["train"].channels
    own = [] if channels == 3 else [f"dataset.channels={channels}"]
    words = ["sslctl", "pretrain", "dataset=hf", f"dataset.root={out}", *own]
    say(f"next        {shell_words(words)}")


def _splits(node: Any) -> dict[str, Source]:
    """Returns the training split and, where there is one, the test split; files are not read into memory."""
    if node.get("tiles"):
        raise InputError("dataset.tiles: sslctl pack takes images whole: leave it away")
    by_file = OmegaConf.merge(node, {"memory_gb": 0}) if "memory_gb" in node else node
    sources = {"train": build_source(by_file, "train")}
    if sources["train"].modality != IMAGES:
        raise InputError(f"sslctl pack takes images; this dataset has {sources['train'].summary()}")
    if sources["train"].classes:
        try:
            sources["test"] = build_source(by_file, "test")
        except NoTestSplit as error:
            say(f"one split alone: {error}")
    return sources
