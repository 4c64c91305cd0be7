"""The figures of `sslctl evaluate` that need no labels, and the tables in which everything is shown."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.table import Table
from torch import Tensor

from sslctl.build import build_source
from sslctl.config import InputError
from sslctl.data.loader import drawn_views
from sslctl.data.sampler import permuted
from sslctl.data.sources import Source
from sslctl.evaluation import label_free
from sslctl.evaluation import subjects as who
from sslctl.evaluation.features import Features, cached
from sslctl.evaluation.origin import settings as settings_of
from sslctl.evaluation.protocols import Reader, Task, key_of
from sslctl.evaluation.results import SPREAD, console, percent, protocol_words, record, show_fixed
from sslctl.evaluation.subjects import Subject
from sslctl.pictures import views_of
from sslctl.plan import choose_device
from sslctl.run_directory import ENVIRONMENT, METRICS, read_config, read_json, read_lines
from sslctl.views import ViewMaker


def pretrained_on(task: Task, tell: Callable[[str], None]) -> Source:
    """The training images that label-free figures are of: a run's own, wherever it is judged; else the task's."""
    if task.run is None:
        return task.train
    node = who.dataset_of(task.run)
    source = task.train
    if node != task.dataset:
        try:
            source = build_source(OmegaConf.merge(node, {"memory_gb": 0}) if "memory_gb" in node else node, "train")
        except InputError as error:
            tell(
                f"figures without labels are of {task.train.name}, those pretrained on are not there any more: {error}"
            )
            return task.train
    trained_on = read_json(task.run / ENVIRONMENT).get("hashes", {}).get("data")
    if trained_on and source.content_hash != trained_on:
        tell(f"figures without labels: {source.name} has changed since the run was trained on it")
    return task.train if source.as_of == task.train.as_of else source


def sampled(subject: Subject, task: Task, source: Source, held: dict[str, Features], read: Reader) -> Tensor:
    """(n, D): the features that label-free figures are of, of some of a source's images. held: the task's own, by split."""
    rows = _some(task.config.label_free.images, len(source))
    if source is task.train:
        return held[source.split].features[rows]
    if len(rows) == len(source):  # all of them, under the same key as other evaluations
        return read(subject, source).features[rows]
    return read(subject, source.subset(rows)).features


def label_free_records(subject: Subject, task: Task, z: Tensor, leave_out: Callable[[str], None]) -> list[dict]:
    """RankMe, α-ReQ, the spread of features; LiDAR and alignment where the run's own views can be made; entropies.

    z: (n, D) of images of task.train, in any order.
    """
    config, train = task.config, task.train
    settings, dim = config.label_free, z.shape[1]
    pairs = z[: settings.pairs]
    make, all_of = partial(_figure, subject, train), {"images": len(z)}
    spread = f"1/√D = {dim**-0.5:.3g}; 0: collapsed"
    records = [
        make("rankme", label_free.rankme(z), f"of at most {min(z.shape):,}; more is better, within one method", all_of),
        make("feature_std", label_free.feature_std(z), spread, all_of, {"dim": dim}),
        make("uniformity", label_free.uniformity(pairs), "towards -4; 0: collapsed", {"images": len(pairs)}),
    ]
    alpha = label_free.alpha_req(z)
    if alpha is None:
        leave_out(f"α-ReQ of {subject.name}: too few directions vary for a slope from rank 11 on ({dim} dimensions)")
    else:
        records.append(make("alpha_req", alpha, "near 1; far above: few directions carry everything", all_of))
    seen, reason = views_of_run(subject, task)
    if seen is None:
        leave_out(f"LiDAR and alignment of {subject.name}: {reason}")
        return records
    views = view_features(subject, task, seen)  # (n, q, D)
    count, apart = len(views), f"of at most {min(dim, len(views) - 1):,}; more is better, within one method"
    half = views.shape[1] // 2
    x, y = (part.flatten(0, 1) for part in (views[:, :half], views[:, half : 2 * half]))
    pipeline = {"images": count, "views": views.shape[1], "augmentation": settings_of(seen.augmentation)}
    pipeline["dropped"] = list(seen.dropped)
    lidar = pipeline | {"delta": label_free.DELTA}
    make = partial(make, seed=config.seed)
    records.append(make("lidar", label_free.lidar(views), apart, lidar))
    records.append(make("alignment", label_free.alignment(x, y), "near 0 while uniformity is low", pipeline))
    return records + _logged_entropy(subject, task, make)


def _figure(
    subject: Subject,
    source: Any,
    metric: str,
    value: float,
    healthy: str,
    params: dict,
    more: dict | None = None,
    seed: int | None = None,
) -> dict:
    """seed: None for what is drawn from no seed."""
    return record(
        subject,
        source,
        protocol="label-free",
        metric=metric,
        values=[value],
        labels="none",
        seed=seed,
        epoch_rule="no training",
        params=params,
        details={"images": params["images"], "healthy": healthy, **(more or {})},
    )


def _logged_entropy(subject: Subject, task: Task, make: Any) -> list[dict]:
    """The entropy of the teacher's prototypes, as training logged it last before these weights; empty where it has none."""
    if subject.name != "trained":
        return []
    logged = [m for m in read_lines(task.run / METRICS) if "teacher_entropy" in m and m["step"] <= subject.step]
    if not logged:
        return []
    step, value, config = logged[-1]["step"], logged[-1]["teacher_entropy"], read_config(task.run)
    prototypes = config["method"].get("prototypes")
    most = f"ln {prototypes} = {np.log(prototypes):.3g}" if prototypes else "its most"
    more = {"logged_at_step": step}
    images = {"images": config["trainer"]["batch_size"]}
    return [make("teacher_entropy", value, f"0: collapsed; {most}: uniform", images, more, seed=None)]


def _some(count: int, size: int) -> Tensor:
    """At most so many rows, the same for every subject."""
    return torch.from_numpy(permuted(np.arange(min(count, size)), size, seed=0, epoch=-5))


def views_of_run(subject: Subject, task: Task) -> tuple[ViewMaker | None, str]:
    """What makes the views that the subject's run was trained on; else None and the reason."""
    if task.run is None:
        return None, "foreign weights have no views of their own"
    if subject.backbone is None:
        return None, "they were trained on no views"
    if task.train.gives != "global":
        return None, f"{task.train.name} has {task.train.words()}, not images"
    views = views_of(OmegaConf.create(read_config(task.run)), task.train, subject.method)
    return dataclasses.replace(views, augmentation={"global": views.augmentation["global"]}), ""


def view_features(subject: Subject, task: Task, views: ViewMaker) -> Tensor:
    """(n, q, D): q views of each of n training images as the run would make them, through the cache."""
    config, train = task.config, task.train
    rows = _some(config.label_free.lidar_images, len(train))
    wanted, device = config.label_free.lidar_views, choose_device(config.device)
    epochs = -(-wanted // views.augmentation["global"]["count"])
    pipeline = json.dumps([vars(views), len(rows), wanted, config.seed], sort_keys=True)

    @torch.no_grad()
    def compute() -> Tensor:
        subject.module.to(device)
        parts = []
        for images in drawn_views(train, views, rows, epochs, config.seed):
            images = images[:, :wanted]  # (b, q, C, h, w)
            made = subject.function(images.flatten(0, 1).to(device)).float().cpu()
            parts.append(made.unflatten(0, images.shape[:2]))
        return torch.cat(parts)

    return cached((*key_of(subject, train), "views", pipeline), compute, config.cache_gb if config.cache else 0)


# --- Tables ---

_SECTIONS = ("linear-cached", "knn", "cluster", "retrieval")
_FIGURES = {
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "alpha_req": "α-ReQ",
    "feature_std": "feature std",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "teacher_entropy": "teacher entropy",
}


def show_protocols(records: list[dict], title: str) -> None:
    """A row for each protocol, label budget and metric, a column for each subject, in percent."""
    found = [r for r in records if r["protocol"] in _SECTIONS]
    subjects = list(dict.fromkeys(r["subject"] for r in found))
    table = Table(caption=SPREAD, caption_justify="left")
    for name in ("protocol", "labels", "metric", *subjects):
        table.add_column(name, justify="right" if name in subjects else "left")
    for section in _SECTIONS:
        cells: dict[tuple, dict[str, str]] = {}
        for r in (r for r in found if r["protocol"] == section):
            cells.setdefault((protocol_words(r), r["labels"], r["metric"]), {})[r["subject"]] = percent(r)
        for row, values in cells.items():
            table.add_row(*row, *(values.get(subject, "") for subject in subjects))
        table.add_section()
    print(f"\n{title} {found[0]['features']} features, %", flush=True)
    console().print(table)
    show_fixed(found)


def show_figures(records: list[dict], title: str) -> None:
    """A row for each label-free figure, a column for each subject, and one of what is healthy."""
    found = [r for r in records if r["protocol"] == "label-free"]
    subjects = list(dict.fromkeys(r["subject"] for r in found))
    table = Table()
    for name in ("figure", *subjects, "healthy"):
        table.add_column(name, justify="right" if name in subjects else "left")
    for metric, words in _FIGURES.items():
        own = {r["subject"]: r for r in found if r["metric"] == metric}
        if own:
            values = (f"{own[s]['value']:.4g}" if s in own else "" for s in subjects)
            table.add_row(words, *values, next(iter(own.values()))["details"]["healthy"])
    print(f"\n{title}", flush=True)
    console().print(table)
