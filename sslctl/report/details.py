"""The parts of the page that look at images and features: views, reconstructions, neighbours, map, confusion matrix."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslctl.config.literal import as_config
from sslctl.data.sources import Source
from sslctl.errors import InputError
from sslctl.evaluation import subjects as who
from sslctl.evaluation.task import Reader
from sslctl.factory.exportable import feature_names
from sslctl.factory.from_config import build_source
from sslctl.factory.from_run import dataset_of, open_run, run_preprocess, views_of
from sslctl.methods.base import Method
from sslctl.report import charts as figures
from sslctl.report import features
from sslctl.report.groups import Group
from sslctl.report.images import (
    LARGE_SIDE,
    MAP_SIDE,
    ImageGrid,
    Sheet,
    address,
    grid,
    sheet,
    side_for,
    spread,
    thumbnails,
)
from sslctl.report.run import Run
from sslctl.runs.segments import current_hashes
from sslctl.visuals import method_pictures as pictured
from sslctl.visuals.sheets import as_image, lines_of_views

_VIEW_EPOCHS = 3  # whose views are shown


@dataclass(frozen=True)
class Data:
    """What the page shows images of. source: labelled training images where there are any, else those trained on; rows:
    which of them; names: how they are called; thumbs: (n, C, side, side) uint8 of them, None for texts."""

    trained: Source
    source: Source
    test: Source | None
    rows: np.ndarray
    names: list[str]
    thumbs: Tensor | None
    notes: list[str]


@dataclass(frozen=True)
class Neighbours:
    """sheet: query, its nearest by features, its nearest by pixels, and the next query. blocks: what each tile is."""

    sheet: Sheet
    blocks: list[dict]
    words: list[str]


@dataclass
class Detail:
    """What is shown of one setting, by the run of its first seed. features: which of the method's; feature_names: all of them."""

    group: Group
    run: Run
    number: int
    features: str = ""
    feature_names: tuple[str, ...] = ()
    views: ImageGrid | None = None
    written: str = ""  # data address of what a method makes of texts
    pictures: ImageGrid | None = None
    neighbours: Neighbours | None = None
    map: figures.Map | None = None
    confusion: figures.Confusion | None = None
    notes: list[str] = field(default_factory=list)


def data_of(run: Run, config: Any) -> Data | str:
    """Returns the images of a run, or in words why they cannot be read any more."""
    node = dataset_of(run.path, "dataset")
    try:
        trained = build_source(node, "train")
        labelled = dataset_of(run.path, "eval_dataset") if run.config.get("eval_dataset") else None
        source = build_source(labelled, "train") if labelled is not None else trained
        test = build_source(labelled if labelled is not None else node, "test") if source.labelled else None
    except InputError as error:
        return f"The images are not where they were, so none are shown: {error}."
    notes = []
    if trained.content_hash != current_hashes(run.environment).get("data"):
        notes.append("The images there now are not those the run was trained on: files were added, removed or changed.")
    rows = spread(len(source), config.rows, seed=0)
    names = [_short_name(source.describe(int(row))) for row in rows]
    thumbs = None
    if source.modality.visible:
        resize = run_preprocess(run.path).at(source.image_size).resize
        side = side_for(source.image_size, MAP_SIDE)
        thumbs = thumbnails(source, torch.from_numpy(rows), resize=resize, side=side, workers=config.workers)
    return Data(trained, source, test, rows, names, thumbs, notes)


def _short_name(described: str) -> str:
    """Returns the last two parts of a path, or what else an image is called."""
    return "/".join(described.split("/")[-2:])


def detail_of(group: Group, number: int, data: Data, config: Any, read: Reader, device: torch.device) -> Detail:
    """Makes everything that takes a setting's weights or its augmentation."""
    run = next((run for run in group.runs if run.finished), group.runs[0])
    detail = Detail(group, run, number)
    opened = open_run(run.path, run.checkpoint)
    method, preprocess = opened.method.to(device), opened.preprocess
    subject = who.method_subject("trained", method, preprocess, config.features, opened.step)
    subject = who.judged_at(subject, data.source)
    detail.feature_names = tuple(feature_names(method, preprocess))
    detail.features = subject.features
    _draw(detail, run, method, data, config)
    chosen = features.features_at(subject, data.source, data.rows, read)
    if data.thumbs is not None and len(data.rows) > 2:
        detail.neighbours = _neighbours(number, chosen.features, data, subject.preprocess.resize, config)
    _map(detail, chosen.features, data, config)
    if data.test is not None:
        knn = run.config["evaluation"]["knn"]
        labels, predicted, words = features.knn_predictions(
            subject, data.source, data.test, read, most=config.rows, k=knn["k"], temperature=knn["temperature"]
        )
        detail.confusion = figures.confusion(labels, predicted, data.source.classes, words)
    return detail


def _draw(detail: Detail, run: Run, method: Method, data: Data, config: Any) -> None:
    """Draws views of the training images, and what the method makes of them."""
    settings = as_config(run.config)
    source = data.trained
    maker = views_of(settings, source, method)
    if not source.modality.visible:
        text = pictured.sheet_of(method, source, maker, seed=config.seed, images=config.images)
        if text is None:
            detail.notes.append("This run was trained on texts: there are no images to show.")
        else:
            detail.written = address(as_image(text), quality=80)
        return
    rows = torch.arange(0, len(source), max(1, len(source) // config.images))[: config.images]
    lines = lines_of_views(source, maker, rows, seed=config.seed, draws=_VIEW_EPOCHS)
    each = [name for name, (count, _) in maker.sizes().items() for _ in range(count)]
    heads = ["image", *(f"{name} view, epoch {e}" for e in range(_VIEW_EPOCHS) for name in each)]
    detail.views = grid(
        f"views-{detail.number}", lines, heads, [[f"{head} of image {r}" for head in heads] for r in rows]
    )
    columns = pictured.draw(method, source, maker, seed=config.seed, images=config.images)
    if columns:
        count = len(next(iter(columns.values())))
        lines = [[images[i].detach().float().cpu() for images in columns.values()] for i in range(count)]
        alts = [[f"{name} of image {i + 1}" for name in columns] for i in range(count)]
        detail.pictures = grid(f"made-{detail.number}", lines, list(columns), alts)


def _neighbours(number: int, rows: Tensor, data: Data, resize: int, config: Any) -> Neighbours:
    """Returns the images nearest to some, by the run's features and by their pixels."""
    count = min(config.neighbours, len(rows) - 1)
    queries = torch.arange(0, len(rows), max(1, len(rows) // config.images))[: config.images]
    pixels = features.pixel_rows(data.thumbs)
    by_features = features.nearest_rows(rows, queries, count)
    by_pixels = features.nearest_rows(pixels, queries, count)
    places = torch.cat([queries[:, None], by_features, by_pixels], 1)  # (Q, 1 + 2 count): rows of data.rows
    side = side_for(data.source.image_size, LARGE_SIDE)
    chosen = torch.from_numpy(data.rows)[places.flatten()]
    tiles = thumbnails(data.source, chosen, resize=resize, side=side, workers=config.workers)
    labels = data.source.labels[torch.from_numpy(data.rows)]
    labelled = data.source.labelled

    def describe_tile(index: int, place: int, of: int) -> dict:
        name = data.source.classes[labels[index]] if labelled else data.names[index].rpartition("/")[2]
        return {
            "tile": place,
            "name": name,
            "file": data.names[index],
            "other": labelled and bool(labels[index] != labels[of]),
        }

    blocks = []
    for i, row in enumerate(places.tolist()):
        near = [describe_tile(index, i * len(row) + j, row[0]) for j, index in enumerate(row)]
        blocks.append({"query": near[0], "strips": [("features", near[1 : count + 1]), ("pixels", near[count + 1 :])]})
    words = [f"Nearest by cosine among {len(rows):,} {data.source.split} images of {data.source.name}."]
    if labelled:
        own, other = (features.same_class(r, labels, count) for r in (rows, pixels))
        words.append(
            f"Of the {count} nearest of each of these images, {own:.1%} are of its class by the run's features,"
            f" {other:.1%} by pixels of {min(16, data.thumbs.shape[2])}×{min(16, data.thumbs.shape[2])} (all of them"
            " training images). A dashed frame marks another class."
        )
    return Neighbours(sheet(f"near-{number}", tiles), blocks, words)


def _map(detail: Detail, rows: Tensor, data: Data, config: Any) -> None:
    places = _places(len(rows), config)
    placed = features.in_two_dimensions(rows[torch.from_numpy(places)], config.seed)
    if placed is None:
        detail.notes.append(f"{len(rows)} images are too few for a map.")
        return
    points, words = placed
    labels = data.source.labels[torch.from_numpy(data.rows[places])]
    words = f"{words}: {len(points):,} {data.source.split} images of {data.source.name}, step {detail.run.step:,}"
    detail.map = figures.embedding_map(points, labels.tolist(), data.source.classes, words)


def _places(size: int, config: Any) -> np.ndarray:
    """Returns which of the page's images are on the map."""
    return spread(size, config.map_images, seed=1)


def map_sheet(data: Data, config: Any) -> tuple[Sheet | None, list[str]]:
    """Returns the tiles of the map's points and their names, in the map's order."""
    places = _places(len(data.rows), config)
    names = [data.names[place] for place in places]
    return (None if data.thumbs is None else sheet("map", data.thumbs[torch.from_numpy(places)])), names
