"""Results: one JSON line each with the protocol it was measured by, and a table for the reader."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sslctl.data.sources import Source
from sslctl.evaluation.origin import measured_by
from sslctl.evaluation.subjects import Subject
from sslctl.run_directory import now, versions

RESAMPLES = 1000  # of the test images, for an interval
SPREAD = (
    "±: half of a 95 % interval over the test images; of several draws of labels, their standard deviation, with a 95 %"
    " interval of their mean in brackets"
)


def record(
    subject: Subject,
    source: Source,
    *,
    protocol: str,
    metric: str,
    values: list[float],
    labels: str,
    seed: int | None,
    epoch_rule: str,
    params: dict,
    details: dict | None = None,
    each: Tensor | None = None,
    ci95: list[float] | None = None,
) -> dict:
    """One result. values: one a draw; their mean is the value and, with several, their standard deviation is kept and a
    95 % interval of their mean.

    each: (N,) what the single value is the mean of, one a test image: gives its 95 % interval. ci95: the interval itself.
    seed: of the evaluation; None where it draws nothing. params: every setting of the protocol that decides the value,
    so that results with equal params can be compared; details: what came out beside the value.
    """
    if len(values) > 1:
        spread = {"std": statistics.stdev(values), "draws": len(values), "ci95": interval_of_mean(values)}
    else:
        spread = {"ci95": interval(each) if each is not None else ci95}
    return {
        "protocol": protocol,
        "metric": metric,
        "value": statistics.fmean(values),
        **spread,
        "subject": subject.name,
        **vars(subject.origin),
        "labels": labels,
        "dataset": source.name,
        "split": source.split,
        "images": len(source),
        "seed": seed,
        "step": subject.step,
        "epoch": subject.epoch,
        "epoch_rule": epoch_rule,
        "features": subject.features,
        "preprocess": subject.preprocess.words(),
        "params": params,
        "backbone_parameters": subject.params,
        "weights_sha256": subject.weights_sha256,
        "details": details or {},
        **measured_by(),
        "versions": versions(),
        "time": now(),
    }


def interval(each: Tensor, seed: int = 0) -> list[float]:
    """[low, high]: 95 % of the means of resampled images lie there (percentile bootstrap, Efron 1979). each: (N,)."""
    values, counts = np.unique(each.double().numpy(), return_counts=True)
    generator = np.random.default_rng(seed)
    if len(values) <= 64:  # drawing images is drawing how often each value comes
        means = generator.multinomial(len(each), counts / len(each), RESAMPLES) @ values / len(each)
    else:
        each = each.double().numpy()
        means = [each[generator.integers(0, len(each), len(each))].mean() for _ in range(RESAMPLES)]
    return np.quantile(means, [0.025, 0.975]).tolist()


def interval_of_mean(values: list[float]) -> list[float]:
    """[low, high]: the 95 % interval of the mean of a few values, by Student's t with one degree of freedom less."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return [statistics.fmean(values) - half, statistics.fmean(values) + half]


def append(path: Path, records: list[dict]) -> None:
    """All records in one write, behind the last whole line: a kill may have cut one off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    with path.open("a") as opened:
        opened.truncate(len(whole[0]) + len(whole[1]))
        opened.write("".join(json.dumps(r) + "\n" for r in records))


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
