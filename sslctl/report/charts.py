"""Curves, maps and confusion matrices as numbers of an SVG drawing; the template draws them."""

import math
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 440, 250  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 34  # margins
MOST_POINTS = 240  # of a curve
TITLES = {
    "loss": ("Loss", "of the training batches"),
    "knn": ("Online kNN, %", "top-1 among training images, which are pretrained on"),
    "feature_std": ("Feature spread", "standard deviation of unit features × √D: near 1 evenly spread, 0 collapsed"),
    "backbone_std": ("Backbone spread", "standard deviation of unit features × √D: near 1 evenly spread, 0 collapsed"),
    "projector_std": ("Projection spread", "standard deviation of unit projections × √D: near 1 spread, 0 collapsed"),
    "predictor_std": ("Prediction spread", "standard deviation of unit predictions × √D: near 1 spread, 0 collapsed"),
    "embedding_std": (
        "Embedding spread",
        "standard deviation of embeddings as they are: 0.2 to 1 healthy, 0 collapsed",
    ),
    "rankme": ("RankMe", "effective number of directions the features use; compare runs of one method only"),
    "given_cosine": (
        "Cosine to the given features",
        "of the same images, once centred: 1 as they were, 0 nothing left of them",
    ),
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", ""),
    "images_per_second": ("Images per second", "speed, not quality"),
}
MAIN = ("loss", "knn", "feature_std", "backbone_std", "rankme", "given_cosine", "lr")
_FROM_ZERO = (
    *("feature_std", "backbone_std", "projector_std", "predictor_std", "embedding_std"),
    *("rankme", "lr", "images_per_second"),
)
_COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One curve. points: (x, y) in the data's units; path: in the drawing's."""

    name: str
    colour: int
    points: list[tuple[float, float]]
    path: str = ""


@dataclass(frozen=True)
class Chart:
    """One drawing of curves over epochs."""

    name: str
    title: str
    note: str
    series: list[Series]
    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: list[tuple[float, str]]  # place in the drawing, words
    y_ticks: list[tuple[float, str]]
    alt: str

    def data(self) -> dict:
        """Returns what the page's script needs to say a value under the pointer."""
        return {
            "x": self.x,
            "y": self.y,
            "series": [{"name": s.name, "colour": s.colour, "points": s.points} for s in self.series],
        }


def curves(name: str, lines: list[tuple[str, int, list[tuple[float, float]]]]) -> Chart | None:
    """Draws a chart of one logged quantity; None where nothing finite was logged.

    lines: (words, number of the colour, points).
    """
    factor = 100 if name == "knn" else 1
    rows = []
    for words, colour, points in lines:
        finite = [(x, factor * y) for x, y in points if math.isfinite(y)]
        if finite:
            rows.append((words, colour % _COLOURS, [(round(x, 3), _rounded(y)) for x, y in thinned(finite)]))
    if not rows:
        return None
    xs = [x for _, _, points in rows for x, _ in points]
    ys = [y for _, _, points in rows for _, y in points]
    x_axis, y_axis = _axis(min(0, *xs), max(xs), tight=True), _axis(*_span(name, min(ys), max(ys)))
    title, note = TITLES.get(name, (name.replace("_", " ").capitalize(), "as the method logs it"))
    first, last = rows[0][2][0][1], rows[0][2][-1][1]
    alt = f"{title} over epochs: " + (
        f"from {first:g} to {last:g}" if len(rows) == 1 else f"{len(rows)} runs, between {min(ys):g} and {max(ys):g}"
    )
    series = [Series(words, colour, points, _path(points, x_axis[:2], y_axis[:2])) for words, colour, points in rows]
    return Chart(
        name,
        title,
        note,
        series,
        x_axis[:2],
        y_axis[:2],
        [(_across(t, x_axis[:2]), f"{t:g}") for t in x_axis[2]],
        [(_down(t, y_axis[:2]), _tick(t, y_axis[2])) for t in y_axis[2]],
        alt,
    )


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns every k-th point and the last, so that at most about MOST_POINTS are drawn."""
    step = max(1, math.ceil(len(points) / MOST_POINTS))
    return points[::step] + ([points[-1]] if (len(points) - 1) % step else [])


def _span(name: str, low: float, high: float) -> tuple[float, float]:
    if name in _FROM_ZERO:
        low = min(0.0, low)
    if name.endswith("_std"):
        high = max(1.0, high)
    return low, high


def _axis(low: float, high: float, tight: bool = False) -> tuple[float, float, list[float]]:
    """Returns (low, high, round ticks) of an axis; tight: it ends where the data does."""
    if high <= low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    raw = (high - low) / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9) if tight else math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if tight else math.ceil(high / step - 1e-9)
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return (low, high, ticks) if tight else (ticks[0], ticks[-1], ticks)


def _tick(value: float, ticks: list[float]) -> str:
    """Formats a tick with as many digits as tell it from the next tick."""
    largest = max(abs(t) for t in ticks)
    if largest and (largest >= 1e5 or largest < 1e-3):
        return f"{value:.2g}" if value else "0"
    digits = next(d for d in range(8) if d == 7 or all(abs(round(t, d) - t) < 1e-9 for t in ticks))
    return f"{value:.{digits}f}"


def _across(value: float, axis: tuple[float, float]) -> float:
    return round(LEFT + (value - axis[0]) / (axis[1] - axis[0]) * (WIDTH - LEFT - RIGHT), 1)


def _down(value: float, axis: tuple[float, float]) -> float:
    return round(HEIGHT - BOTTOM - (value - axis[0]) / (axis[1] - axis[0]) * (HEIGHT - TOP - BOTTOM), 1)


def _path(points: list[tuple[float, float]], x: tuple[float, float], y: tuple[float, float]) -> str:
    places = [f"{_across(px, x):g} {_down(py, y):g}" for px, py in points]
    return f"M{places[0]}h.01" if len(places) == 1 else "M" + "L".join(places)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


# --- The map ---


@dataclass(frozen=True)
class Map:
    """Points of an embedding in two dimensions, 0 … 1000 each. kinds: one a class, or one for all."""

    points: list[list[int]]
    kinds: list[dict]  # name, colour, shape, path
    labels: list[int]
    words: str  # how it was made
    alt: str


_SHAPES = ("round", "plus", "square", "cross")


def embedding_map(places: np.ndarray, labels: list[int], classes: tuple[str, ...], words: str) -> Map:
    """Draws the map of images in two dimensions. places: (n, 2). labels: −1 throughout where there are none."""
    span = max(np.ptp(places, axis=0).max(), 1e-9)
    middle = (places.max(0) + places.min(0)) / 2
    points = ((places - middle) / span * 960 + 500).round().astype(int).tolist()
    labelled = bool(classes) and min(labels) >= 0
    names = classes if labelled else ("images",)
    kinds = []
    for i, name in enumerate(names):
        own = [p for p, label in zip(points, labels, strict=True) if not labelled or label == i]
        shape = _SHAPES[i // _COLOURS % len(_SHAPES)]
        kinds.append(
            {"name": name, "colour": i % _COLOURS, "shape": shape, "count": len(own), "path": _marks(own, shape)}
        )
    alt = f"Map of {len(points):,} images" + (f" in {len(classes)} classes" if labelled else "") + f": {words}"
    return Map(points, kinds, labels if labelled else [0] * len(points), words, alt)


def _marks(points: list[list[int]], shape: str) -> str:
    marks = {"round": "h0", "square": "h0", "plus": "m-7 0h14m-7 -7v14", "cross": "m-5 -5l10 10m-10 0l10 -10"}
    return "".join(f"M{x} {y}{marks[shape]}" for x, y in points)


# --- The confusion matrix ---


@dataclass(frozen=True)
class Confusion:
    """rows: of each true class (name, images, [(share in percent, count) of each predicted class])."""

    classes: tuple[str, ...]
    rows: list[tuple[str, int, list[tuple[float, int]]]]
    pairs: list[str]  # what is mistaken most often
    right: int
    total: int
    words: str


MOST_CLASSES = 40  # that a matrix is drawn for


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: tuple[str, ...], words: str) -> Confusion:
    """Counts which class is taken for which. labels, predicted: (n,) int."""
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (labels, predicted), 1)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None)[::-1][:5]
    pairs = [
        f"{classes[i]} taken for {classes[j]}: {wrong[i, j]} of {counts[i].sum()}"
        for i, j in (divmod(int(place), len(classes)) for place in order)
        if wrong[i, j]
    ]
    rows = [
        (name, int(row.sum()), [(100 * int(c) / max(1, int(row.sum())), int(c)) for c in row])
        for name, row in zip(classes, counts, strict=True)
    ]
    rows_on_page = rows if len(classes) <= MOST_CLASSES else []
    return Confusion(classes, rows_on_page, pairs, int(np.trace(counts)), len(labels), words)
