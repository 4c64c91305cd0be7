"""The figures of `sslctl evaluate` that need no labels, and the tables in which everything is shown."""

import sys

from rich.console import Console
from rich.table import Table

from sslctl.data.sources import Source

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


SPREAD = (
    "±: half of a 95 % interval over the test images; of several draws of labels, their standard deviation, with a 95 %"
    " interval of their mean in brackets"
)


def percent(entry: dict) -> str:
    """'91.24', '91.24 ± 0.31' or, of several draws, '91.24 ± 0.31 (90.9–91.6)', in percent."""
    value = f"{100 * entry['value']:.2f}"
    low, high = entry.get("ci95") or (0, 0)
    if "std" in entry:
        mean = f" ({100 * max(low, 0):.1f}–{100 * min(high, 1):.1f})" if high > low else ""  # few draws: t is wide
        return f"{value} ± {100 * entry['std']:.2f}{mean}"
    return f"{value} ± {50 * (high - low):.2f}" if high > low else value


def protocol_words(record: dict) -> str:
    """'linear-cached', or 'knn, k = 20'."""
    k = record.get("params", {}).get("k")
    return record["protocol"] if k is None else f"{record['protocol']}, k = {k}"


def tested_on(test: Source) -> str:
    """'digits, test split (359 images)'."""
    return f"{test.name}, {test.split} split ({len(test):,} images)"


def show(records: list[dict], title: str) -> None:
    """A table: a row for each subject, a column for each protocol, label budget and metric."""
    columns = list(dict.fromkeys((protocol_words(r), r["labels"], r["metric"]) for r in records))
    rows = list(dict.fromkeys(r["subject"] for r in records))
    cells = {(r["subject"], protocol_words(r), r["labels"], r["metric"]): percent(r) for r in records}
    table = Table(caption=SPREAD, caption_justify="left")
    table.add_column("weights")
    for protocol, labels, metric in columns:
        table.add_column(f"{protocol}\n{labels} labels\n{metric} %", justify="right")
    for row in rows:
        table.add_row(row, *(cells.get((row, *column), "") for column in columns))
    print(f"\n{title}", flush=True)
    console().print(table)
    show_fixed(records)


def show_fixed(records: list[dict]) -> None:
    """Below a table: which of its probes' settings no held-out labels have chosen."""
    found = [(r["labels"], r["params"]["regularisation"]) for r in records if "regularisation" in r["params"]]
    for labels, words in dict.fromkeys(found):
        print(f"linear-cached, {labels} labels: {words}", flush=True)


def console() -> Console:
    """The terminal, or 140 columns where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=140)
