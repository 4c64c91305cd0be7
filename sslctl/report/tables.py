"""The tables of results: of one run, over seeds, run by run, and of what is measured without labels."""

import statistics
from dataclasses import dataclass

from sslctl.evaluation.console import FIGURES
from sslctl.report.groups import Group, Mean, given_mean, group_mean, mean_of, random_mean
from sslctl.report.measurement import GIVEN, UNTRAINED, Measurement, by_importance, distinguishing_settings, number
from sslctl.report.run import Run
from sslctl.runs.results import Result

_FIGURES = FIGURES | {"feature_std": "feature spread: std × √D, as in the curves"}


@dataclass(frozen=True)
class Head:
    """Of a column, in lines: the protocol, what is measured on which labels, and where, with the settings that matter."""

    column: Measurement
    first: str
    second: str
    quiet: str


def heads_of(columns: list[Measurement]) -> list[Head]:
    apart = distinguishing_settings(columns)
    return [
        Head(
            c,
            c.protocol + c.k,
            ", ".join(part for part in (c.metric, c.labels_words) if part),
            ", ".join(part for part in (f"{c.dataset} {c.split}", apart[c]) if part),
        )
        for c in columns
    ]


@dataclass(frozen=True)
class Columns:
    """Columns that are shown together. folded: behind a line that says how many there are."""

    heads: list[Head]
    folded: bool

    @property
    def description(self) -> str:
        """Returns 'linear-cached top5; cluster accuracy, nmi, ari'."""
        metrics: dict[str, dict[str, None]] = {}
        for head in self.heads:
            metrics.setdefault(head.column.protocol, {})[head.column.metric] = None
        return "; ".join(f"{protocol} {', '.join(names)}" for protocol, names in metrics.items())


def parts_of(columns: list[Measurement]) -> list[Columns]:
    """Returns the main columns, and those behind them. What needs no labels has a table of its own."""
    ordered = by_importance(c for c in columns if not c.label_free)
    parts = [Columns(heads_of([c for c in ordered if c.main is main]), not main) for main in (True, False)]
    parts = [part for part in parts if part.heads]
    return parts if len(parts) > 1 else [Columns(part.heads, False) for part in parts]


# --- One run ---


def results_of(run: Run) -> dict:
    """Returns the rows of a run's own table: one a measurement, a column for each kind of weights."""
    measured = dict.fromkeys(r.subject for r in run.results if r.protocol != "label-free")
    others = [s for s in measured if s not in ("trained", GIVEN, *UNTRAINED)]
    latest = {"trained": run.latest("trained"), GIVEN: run.latest(GIVEN), "random": run.untrained()}
    latest |= {s: run.latest(s) for s in others}
    subjects = [subject for subject, own in latest.items() if own]
    rows = by_importance(dict.fromkeys(m for subject in subjects for m in latest[subject] if not m.label_free))
    table = []
    for row in rows:
        results = [latest[subject].get(row) for subject in subjects]
        table.append({"row": row, "results": results, "first": next(r for r in results if r)})
    main = [entry for entry in table if entry["row"].main] or table
    return {
        "subjects": subjects,
        "scratch": "scratch" in measured,
        "given": run.began_with() if latest[GIVEN] else "",
        "parts": [part for part in (main, [e for e in table if e not in main]) if part],
    }


# --- Over seeds ---


def means_of(groups: list[Group], runs: list[Run], part: Columns) -> dict:
    """Returns a row for each setting, one of given and one of random weights: (words, interval, how many where not all) a
    column."""
    columns = [head.column for head in part.heads]
    rows = [(group, [_cell(group_mean(group, c), c, len(group.runs)) for c in columns]) for group in groups]
    baselines = {
        f"{name} weights": [_cell(mean(runs, c), c, None) for c in columns]
        for name, mean in ((GIVEN, given_mean), ("random", random_mean))
    }
    measured = {name: cells for name, cells in baselines.items() if any(cell["words"] for cell in cells)}
    return {"part": part, "rows": rows, "baselines": measured}


def _cell(mean: Mean | None, column: Measurement, expected: int | None) -> dict:
    if mean is None:
        return {"words": "", "interval": "", "count": None}
    count = mean.count if expected is not None and mean.count != expected else None
    return {"words": mean.describe(column), "interval": mean.interval(column), "count": count}


def speed_of(group: Group) -> str:
    """Returns images a second while training, the median of what was logged."""
    speeds = [value for run in group.runs for _, value in run.series("images_per_second")]
    return f"{statistics.median(speeds):,.0f}" if speeds else ""


# --- Without labels ---

_BEGUN = ("trained", GIVEN, "random")  # as it is, as it was given, as it would have begun without


def label_free_of(groups: list[Group]) -> dict | None:
    """Returns a row for each figure: its values in each setting as trained, as it began, and what is healthy.

    Means over seeds, of finished runs where there are several; a lone run as it is.
    """
    alone = len(groups) == 1 and len(groups[0].runs) == 1
    chosen = [group.runs if alone else group.finished for group in groups]
    runs = [run for own in chosen for run in own]
    columns = dict.fromkeys(m for run in runs for s in _BEGUN for m in run.latest(s) if m.label_free)
    apart = distinguishing_settings(columns)
    rows = []
    for column in sorted(columns, key=_place):
        cells = [_figure([run.latest("trained").get(column) for run in own]) for own in chosen]
        given, random = (_figure([run.latest(s).get(column) for run in runs]) for s in _BEGUN[1:])
        results = [r for run in runs for s in _BEGUN if (r := run.latest(s).get(column))]
        rows.append(
            {
                "name": _FIGURES.get(column.metric, column.metric.replace("_", " ")),
                "cells": cells,
                "given": given,
                "random": random,
                "healthy": " / ".join(dict.fromkeys(_healthy(r) for r in results)),
                "of": ", ".join(part for part in (_images_of(column), apart[column]) if part),
            }
        )
    given = any(row["given"] for row in rows)
    return {"groups": groups, "alone": alone, "rows": rows, "given": given} if rows else None


def _place(column: Measurement) -> int:
    names = list(_FIGURES)
    return names.index(column.metric) if column.metric in names else len(names)


def _in_unit(result: Result) -> float:
    """Returns a figure in the unit of the page's curves."""
    return result.value * (result.details["dim"] ** 0.5 if result.metric == "feature_std" else 1.0)


def _healthy(result: Result) -> str:
    """Returns which values are healthy, in the unit of the page's curves."""
    if result.metric == "feature_std":
        return "near 1: evenly spread; 0: collapsed"
    return result.details.get("healthy", "")


def _figure(results: list[Result | None]) -> str:
    """Returns the mean over seeds, with its deviation."""
    mean = mean_of([_in_unit(r) for r in results if r])
    return number(False, mean.value, mean.std) if mean else ""


def _images_of(column: Measurement) -> str:
    """Returns '1,438 images of digits, train'."""
    settings = dict(column.settings)
    count = f"{int(settings['images']):,} images of " if "images" in settings else ""
    views = f", {settings['views']} views each" if "views" in settings else ""
    return f"{count}{column.dataset}, {column.split}{views}"
