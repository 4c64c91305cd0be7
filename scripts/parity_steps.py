"""sslctl's methods beside their authors' own code: the same weights, views and state, whole training steps in float64.

    pip install sslctl[bench]; python scripts/parity_steps.py --official FOLDER [--only NAME …] [--markdown FILE]

FOLDER holds clones of the official repositories (names and commits: scripts/parity_official.py). The largest relative
difference of any tensor in any step is told for the loss, the gradients, the trained parameters after the step, and the
state: teachers, BatchNorm statistics, centres, queues, memories. A row whose repository is missing stays as it was.
"""

import argparse
import contextlib
import io
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from parity_clusters import CLUSTERS
from parity_contrast import CONTRAST
from parity_decorrelation import DECORRELATION
from parity_dinov2 import DINOV2
from parity_distilled import DISTILLED
from parity_features import FEATURES
from parity_harness import Comparison, Difference, compare, in_double
from parity_masked import MASKED
from parity_official import Missing, Official, as_on_one_gpu
from rich.console import Console
from rich.table import Table

HEADER = (
    "method",
    "official code",
    "executed",
    "steps",
    "loss",
    "gradient",
    "parameters",
    "state",
    "verdict",
    "remark",
)
VERSIONS = f"torch {torch.__version__}, torchvision {version('torchvision')}, timm {version('timm')}, float64"
COMPARISONS = [*CONTRAST, *DECORRELATION, *CLUSTERS, *DISTILLED, *DINOV2, *FEATURES, *MASKED]


@dataclass(frozen=True)
class Outcome:
    """What came out of a comparison."""

    comparison: Comparison
    commit: str
    differences: dict[str, Difference]

    @property
    def agrees(self) -> bool:
        return all(d.largest <= self.comparison.tolerance for d in self.differences.values())

    @property
    def verdict(self) -> str:
        if self.comparison.reason:
            return "agrees, although documented to differ" if self.agrees else "differs, as documented"
        return "agrees" if self.agrees else "DIFFERS"

    def row(self) -> tuple[str, ...]:
        c, numbers = self.comparison, []
        for kind in ("loss", "gradient", "parameter", "state"):
            difference = self.differences.get(kind) if c.steps or kind != "parameter" else None
            count = f" of {difference.tensors}" if difference and kind != "loss" else ""
            numbers.append(f"{difference.largest:.0e}{count}" if difference else "-")
        remark = "; ".join(text for text in (c.reason, c.remark) if text)
        return (
            c.method,
            f"{c.repository} {self.commit}",
            c.executed,
            str(c.steps or "-"),
            *numbers,
            self.verdict,
            remark,
        )


def execute(comparison: Comparison, official: Official) -> Outcome:
    """Runs both codes. Raises Missing where the repository is not there."""
    commit = official.commit(comparison.repository)
    with in_double(), as_on_one_gpu(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of functions that are deprecated since
        torch.manual_seed(0)
        return Outcome(comparison, commit, compare(*comparison.build(official), comparison.steps or 1))


def rows_of(text: str) -> dict[str, tuple[str, ...]]:
    """Method -> the cells of its row between the marks of a document."""
    lines = text.partition("<!-- steps -->")[2].partition("<!-- /steps -->")[0].splitlines()
    rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in lines if line.startswith("|")]
    return {row[0]: row for row in rows[2:]}


def with_rows(text: str, rows: Iterable[tuple[str, ...]]) -> str:
    """A document with the table between its marks."""
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *rows))
    before, _, rest = text.partition("<!-- steps -->")
    after = rest.partition("<!-- /steps -->")[2]
    return f"{before}<!-- steps -->\n{VERSIONS}:\n\n{lines}\n<!-- /steps -->{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="the folder with the official repositories")
    parser.add_argument("--markdown", type=Path, help="also write the table between the marks of this file")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose name begins so; the others stay")
    arguments = parser.parse_args()
    earlier = rows_of(arguments.markdown.read_text()) if arguments.markdown else {}
    rows, failed = [], False
    for comparison in COMPARISONS:
        lacking = earlier.get(
            comparison.method, (comparison.method, comparison.repository, *["-"] * 6, "not executed", "")
        )
        if arguments.only and not comparison.method.lower().startswith(tuple(name.lower() for name in arguments.only)):
            rows.append(lacking)
            continue
        try:
            outcome = execute(comparison, Official(arguments.official))
        except Missing as error:
            print(f"{comparison.method}: {error}", file=sys.stderr)
            rows.append(lacking)
            continue
        rows.append(outcome.row())
        failed |= outcome.verdict not in ("agrees", "differs, as documented")
        for kind, difference in outcome.differences.items():
            if difference.largest > comparison.tolerance:
                print(f"{comparison.method}: {kind}, {difference.largest:.1e} in {difference.where}", file=sys.stderr)
    table = Table(*HEADER, title=VERSIONS)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if arguments.markdown:
        arguments.markdown.write_text(with_rows(arguments.markdown.read_text(), rows))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
