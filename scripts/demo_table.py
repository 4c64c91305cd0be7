"""The demo's last table, from what the run's results.jsonl says of its latest evaluations."""

import sys
from pathlib import Path

from sslctl.evaluation.console import show
from sslctl.runs.directory import RESULTS
from sslctl.runs.results import read_results

results = [r for r in read_results(Path(sys.argv[1]) / RESULTS) if r.metric == "top1"]
latest = {(r.subject, r.labels): r for r in results if r.protocol == "linear-cached"}
rows = [latest[subject, labels] for labels in ("5/class", "all") for subject in ("trained", "random", "pixels")]
show(rows, "one linear probe, three kinds of features (digits, test split; 5 labels a class: mean ± std of 5 draws)")
