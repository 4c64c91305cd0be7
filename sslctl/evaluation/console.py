"""The tables of results on the terminal."""

import sys

from rich.console import Console
from rich.table import Table

from sslctl.data.sources import Source
from sslctl.errors import say
from sslctl.evaluation.paired import Comparison
from sslctl.runs.results import Result

FIGURES = {
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "alpha_req": "α-ReQ",
    "feature_std": "feature std",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "teacher_entropy": "teacher entropy",
}


def show_protocols(results: list[Result], title: str) -> None:
    """Prints a row for each protocol, label budget and metric, a column for each subject, in percent."""
    measured = [r for r in results if r.protocol != "label-free"]
    if not measured:
        return
    subjects = list(dict.fromkeys(r.subject for r in measured))
    table = Table(caption=SPREAD, caption_justify="left")
    for name in ("protocol", "labels", "metric", *subjects):
        table.add_column(name, justify="right" if name in subjects else "left")
    # A section a protocol, so that its rows stay together in whatever order the subjects were measured.
    for section in dict.fromkeys(r.protocol for r in measured):
        cells: dict[tuple, dict[str, str]] = {}
        for r in (r for r in measured if r.protocol == section):
            cells.setdefault((describe(r), r.labels, r.metric), {})[r.subject] = _value(r)
        for row, values in cells.items():
            table.add_row(*row, *(values.get(subject, "") for subject in subjects))
        table.add_section()
    say("", f"{title} {measured[0].features} features, %")
    console().print(table)
    show_notes(measured)


def show_figures(results: list[Result]) -> None:
    """Prints a row for each label-free figure, a column for each subject, and one of what is healthy."""
    figures = [r for r in results if r.protocol == "label-free"]
    if not figures:
        return
    subjects = list(dict.fromkeys(r.subject for r in figures))
    table = Table()
    for name in ("figure", *subjects, "healthy"):
        table.add_column(name, justify="right" if name in subjects else "left")
    # Those with a name of their own in its order, then what else was measured without labels.
    metrics = {**FIGURES, **{r.metric: r.metric for r in figures if r.metric not in FIGURES}}
    for metric, name in metrics.items():
        own = {r.subject: r for r in figures if r.metric == metric}
        if own:
            values = (f"{own[s].value:.4g}" if s in own else "" for s in subjects)
            table.add_row(name, *values, next(iter(own.values())).details.get("healthy", ""))
    say("", f"without labels, of {figures[0].dataset}'s {figures[0].split} split")
    console().print(table)


SPREAD = (
    "±: half of a 95 % interval over the test images; of several draws of labels, their standard deviation, with a 95 %"
    " interval of their mean in brackets"
)


def _value(result: Result) -> str:
    """Returns a cell of a table: in percent what is a share, else as it is."""
    return percent(result.value, result.std, result.ci95) if result.share else f"{result.value:.4g}"


def percent(value: float, std: float | None = None, ci95: list[float] | None = None) -> str:
    """Returns '91.24', '91.24 ± 0.31' or, of several draws, '91.24 ± 0.31 (90.9–91.6)', in percent."""
    number = f"{100 * value:.2f}"
    low, high = ci95 or (0, 0)
    if std is not None:
        mean = f" ({100 * max(low, 0):.1f}–{100 * min(high, 1):.1f})" if high > low else ""  # few draws: t is wide
        return f"{number} ± {100 * std:.2f}{mean}"
    return f"{number} ± {50 * (high - low):.2f}" if high > low else number


def describe(result: Result) -> str:
    """Returns 'linear-cached', or 'knn, k = 20'."""
    return f"{result.protocol}, k = {result.params['k']}" if "k" in result.params else result.protocol


def tested_on(test: Source) -> str:
    """Returns 'digits, test split (359 images)'."""
    return f"{test.name}, {test.split} split ({len(test):,} images)"


def show(results: list[Result], title: str) -> None:
    """Prints a table: a row for each subject, a column for each protocol, label budget and metric."""
    # A result of each subject in the order in which they were measured; what one of them lacks stays empty.
    columns = list(dict.fromkeys((describe(r), r.labels, r.metric) for r in results))
    rows = list(dict.fromkeys(r.subject for r in results))
    cells = {(r.subject, describe(r), r.labels, r.metric): _value(r) for r in results}
    table = Table(caption=SPREAD, caption_justify="left")
    table.add_column("weights")
    for protocol, labels, metric in columns:
        table.add_column(f"{protocol}\n{labels} labels\n{metric} %", justify="right")
    for row in rows:
        table.add_row(row, *(cells.get((row, *column), "") for column in columns))
    say("", title)
    console().print(table)
    show_notes(results)


def show_notes(results: list[Result]) -> None:
    """Says below a table what a constant answer scores, and which of its probes' settings no held-out labels have chosen."""
    for majority in dict.fromkeys(r.details["majority"] for r in results if "majority" in r.details):
        say(f"classes are uneven: who always names the largest is right in {majority:.2%}")
    for constant in dict.fromkeys(r.details["constant"] for r in results if "constant" in r.details):
        say(f"several labels an image: who answers alike for all has a mAP of {constant:.2%}")
    fixed = [(r.labels, r.params["regularisation"]) for r in results if "regularisation" in r.params]
    for labels, regularisation in dict.fromkeys(fixed):
        say(f"linear-cached, {labels} labels: {regularisation}")


def show_comparisons(comparisons: list[Comparison], sizes: dict[str, int]) -> None:
    """Prints a row for each measure of the weights before and after, with the interval of the difference.

    sizes: of the images that each was judged at, in pixels.
    """
    table = Table(caption=TOGETHER.format(level=100 * comparisons[0].level), caption_justify="left")
    for name in ("measure", *(f"{subject}\n{size} px" for subject, size in sizes.items()), "difference", "interval"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for c in comparisons:
        low, high = c.interval
        values = (f"{100 * value:.2f}" for value in (c.before, c.after))
        table.add_row(c.measure, *values, f"{100 * c.difference:+.2f}", f"{100 * low:+.2f} to {100 * high:+.2f}")
    say("", "before and after, the same images and labels, %")
    console().print(table)


TOGETHER = (
    "interval: of the difference, over test images and draws of labels; of {level:.1f} %, so that all of these hold together in"
    " 95 of 100 cases"
)


def console() -> Console:
    """Returns the terminal, or 140 columns where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=140)
