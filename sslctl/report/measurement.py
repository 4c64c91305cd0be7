"""Results as the page compares them: which were measured alike, and their numbers in words."""

from collections.abc import Iterable
from dataclasses import dataclass

from sslctl.evaluation.provenance import flat_words
from sslctl.runs.results import Result

_PREFERRED = ("linear-augmented", "linear-cached", "knn", "finetune")  # protocols, the one that matters most first
_MOST_SETTINGS = 4  # named where results are told apart
GIVEN = "given"  # what a run began with that did not begin with random weights
UNTRAINED = ("random", "scratch")  # what a trained network is compared with: as it began, fine-tuned from there


@dataclass(frozen=True)
class Measurement:
    """What two results must share to stand in one row or column. settings: every one that decides the value, in words."""

    protocol: str
    metric: str
    share: bool
    labels: str
    dataset: str
    split: str
    content: str | None
    classes: str | None
    features: str
    settings: tuple[tuple[str, str], ...]

    @property
    def label_free(self) -> bool:
        return self.protocol == "label-free"

    @property
    def main(self) -> bool:
        """Tells whether it is among what a reader looks at first: top-1 of a classifier."""
        return self.metric in ("top1", "mAP") and self.protocol in _PREFERRED

    @property
    def k(self) -> str:
        """Returns, of nearest neighbours: ', k 20'."""
        return "".join(f", k {value}" for name, value in self.settings if name == "k")

    @property
    def labels_words(self) -> str:
        """Returns 'all labels', '5 labels a class', '10 % of the labels'; '' where none are used."""
        if self.labels in ("all", "none"):
            return {"all": "all labels", "none": ""}[self.labels]
        number, _, per_class = self.labels.partition("/")
        return f"{number} labels a class" if per_class else f"{100 * float(number):g} % of the labels"

    @property
    def compared_settings(self) -> tuple[tuple[str, str], ...]:
        """Returns what tells it from others of its protocol."""
        content = (self.content or "unknown")[:8]
        return (
            ("features", self.features),
            ("images", content),
            ("classes", self.classes or "unknown"),
            *(pair for pair in self.settings if pair[0] != "k"),
        )

    @property
    def kind(self) -> tuple[str, ...]:
        """Returns what measurements share that differ in their settings alone; k is always named."""
        return self.protocol + self.k, self.metric, self.labels, self.dataset, self.split

    def describe(self) -> str:
        """Returns 'knn, k 20, top1, all labels, digits test split'."""
        parts = (self.protocol + self.k, self.metric, self.labels_words, f"{self.dataset} {self.split} split")
        return ", ".join(part for part in parts if part)


def measurement_of(r: Result) -> Measurement:
    """Returns what a result must share with another to be compared with it."""
    settings = tuple(flat_words(r.params))
    return Measurement(r.protocol, r.metric, r.share, r.labels, *r.measured_on, r.features, settings)


def distinguishing_settings(columns: Iterable[Measurement]) -> dict[Measurement, str]:
    """Returns, in words, the settings in which each differs from others of its kind; '' where it is the only one."""
    columns = list(columns)
    settings = {}
    for column in columns:
        others = [dict(c.compared_settings) for c in columns if c.kind == column.kind and c != column]
        mine = dict(column.compared_settings)
        keys = dict.fromkeys(key for other in others for key in (*mine, *other) if mine.get(key) != other.get(key))
        named = [f"{key} {mine.get(key, 'unknown')}" for key in keys]
        more = ", …" if len(named) > _MOST_SETTINGS else ""
        settings[column] = ", ".join(named[:_MOST_SETTINGS]) + more
    return settings


def by_importance(columns: Iterable[Measurement]) -> list[Measurement]:
    """Sorts measurements: all labels before few, the preferred protocols first; those that are not main last, as they came."""

    def rank(column: Measurement) -> tuple:
        if not column.main:
            return 2, 0, 0, 0
        k = int(column.k.rpartition(" ")[2] or 0)
        return column.labels != "all", _PREFERRED.index(column.protocol), _few(column.labels), k

    return sorted(columns, key=rank)


def _few(labels: str) -> tuple[bool, float]:
    number, _, per_class = labels.partition("/")
    return (bool(per_class), float(number)) if labels not in ("all", "none") else (False, 0.0)


# --- Numbers ---


def number(share: bool, value: float | None, spread: float | None = None) -> str:
    """Returns '91.24 %', '91.24 ± 0.31 %' or, of what is no share, '45.3'."""
    if value is None:
        return "–"
    if share:
        return f"{100 * value:.2f}{'' if spread is None else f' ± {100 * spread:.2f}'} %"
    return f"{value:.4g}{'' if spread is None else f' ± {spread:.2g}'}"


def value_in_words(result: Result) -> str:
    """Returns a result's value with its spread over draws of labels, where it has one."""
    return number(result.share, result.value, result.std)


def interval(result: Result) -> str:
    """Returns '88.1–91.9 %': the 95 % interval of a result that has one, over its draws or its test images, else ''."""
    return span(result, result.ci95)


def span(measured: Measurement | Result, ci95: list[float] | None) -> str:
    if not ci95:
        return ""
    low, high = ci95
    if measured.share:  # an interval of few seeds may reach beyond what there is
        low, high = max(low, -1.0 if measured.metric == "ari" else 0.0), min(high, 1.0)
        return f"{100 * low:.1f}–{100 * high:.1f} %"
    return f"{low:.4g}–{high:.4g}"
