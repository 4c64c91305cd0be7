"""The network with its dataset that ckpt=, or backbone= with weights, names: for the verbs that write files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sslctl.config.literal import as_config
from sslctl.data.sources import Source
from sslctl.errors import InputError, say, user_path
from sslctl.evaluation import subjects as who
from sslctl.evaluation.subjects import Subject
from sslctl.factory.expectation import as_expected, has_weights
from sslctl.factory.from_config import build_source
from sslctl.factory.from_run import as_in_run, as_in_weights, dataset_of, resolve_runs, run_preprocess
from sslctl.models.preprocess import preprocess_of
from sslctl.runs.reading import read_config


@dataclass(frozen=True)
class NamedNetwork:
    """One network. name: of its backbone; node: that backbone's configuration. run: None for given weights."""

    subject: Subject
    run: Path | None
    name: str
    node: dict
    dataset: Any
    source: Source
    folder: Path  # where files go unless out= names one
    title: str


def named_networks(config: Any, split: str, *, few: bool = False) -> Iterator[NamedNetwork]:
    """Yields the networks that a configuration names by ckpt, or by backbone and dataset, each with a split of its dataset.

    few: of a run's dataset only some images will be looked at, and none is kept in memory.
    Raises InputError where nothing is named, and for images that a network does not take.
    """
    if not config.ckpt:
        yield _given_network(config, split)
        return
    if config.backbone is not None:
        raise InputError("a run brings its own backbone: ckpt=RUN, or backbone=… backbone.weights=FILE, not both")
    runs = resolve_runs(config.ckpt)
    if config.out and len(runs) > 1:
        raise InputError(f"out={config.out} is one file, ckpt names {len(runs)} runs: leave out= away")
    for run, path in runs:
        saved = as_config(read_config(run))
        node = as_in_run(config.dataset, run) if config.dataset else dataset_of(run)
        if few and "memory_gb" in node:
            node = OmegaConf.merge(node, {"memory_gb": 0})
        source = build_source(node, split)
        run_preprocess(run).refuse_other(str(run), source, "dataset", judges=not few)
        subject = who.judged_at(who.trained(run, path, config.features), source)
        name, backbone = saved.names.backbone, {**OmegaConf.to_container(saved.backbone, resolve=True), "weights": None}
        title = f"{run} at {path.name}"
        yield NamedNetwork(subject, run, name, backbone, node, source, run, title)


def _given_network(config: Any, split: str) -> NamedNetwork:
    """Builds the network of backbone=… backbone.weights=FILE."""
    if config.backbone is None:
        raise InputError("nothing named: name a run (runs/latest), or backbone=… backbone.weights=FILE dataset=…")
    if not has_weights(config.backbone):
        raise InputError("backbone.weights=FILE is missing: without weights there is nothing but a random network")
    if config.backbone.get("partial"):
        raise InputError(who.PARTLY)
    if config.dataset is None:
        raise InputError("given weights need a dataset, whose size they take: dataset=…")
    if config.features not in (None, "backbone"):
        raise InputError(f"features={config.features}: given weights offer backbone")
    dataset = as_in_weights(config.dataset, config.backbone.get("weights"))
    source = build_source(dataset, split)
    preprocess, normalization = as_expected(
        preprocess_of(dataset, source, lambda: build_source(dataset, "train")), config.backbone
    )
    if normalization:
        say(f"input      {normalization}")
    subject = who.given(config.backbone, preprocess, with_weights=True)
    weights = user_path(config.backbone.get("weights") or config.backbone.model)
    node = OmegaConf.to_container(OmegaConf.merge(config.backbone, {"weights": None}), resolve=True) | {
        "pretrained": False
    }
    folder = Path("runs") / source.name / "given"
    return NamedNetwork(subject, None, weights.stem, node, dataset, source, folder, str(weights))
