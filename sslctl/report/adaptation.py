"""Before and after an adaptation, as a drawing: every measure of both, and their difference with its interval."""

from dataclasses import dataclass

from sslctl.evaluation.before_after import PROTOCOL
from sslctl.report.run import Run
from sslctl.runs.adaptation import read_adaptation

WIDTH, ROW = 640, 46  # of the drawing, in its own units
LEFT, RIGHT, TOP = 12, 12, 18  # margins


@dataclass(frozen=True)
class Row:
    """One measure. low, middle, high: of the difference, across the drawing; y: down it. direction: 1 better, -1 worse."""

    measure: str
    before: str
    after: str
    words: str
    y: float
    low: float
    middle: float
    high: float
    direction: int


@dataclass(frozen=True)
class BeforeAfter:
    """kind, sentence: the verdict. zero: across, where no difference stands. ticks: (across, words). level: in percent."""

    kind: str
    sentence: str
    rows: list[Row]
    sizes: str
    zero: float
    ticks: list[tuple[float, str]]
    height: float
    level: str
    alt: str


def before_after(run: Run) -> BeforeAfter | None:
    """Returns what the page says of an adaptation's verdict; None of other runs, and of adaptations without one."""
    adaptation = read_adaptation(run.path)
    if adaptation is None or adaptation.verdict is None:
        return None
    verdict = adaptation.verdict
    latest = {(r.labels, str(r.params)): r for r in run.results if r.protocol == PROTOCOL and r.step == run.step}
    results = list(latest.values())
    sizes = ", ".join(f"{subject} at {size} px" for subject, size in verdict["sizes"].items())
    if not results:
        return BeforeAfter(verdict["kind"], verdict["sentence"], [], sizes, 0, [], 0, "", "")
    ends = [100 * end for r in results for end in (*r.details["interval"], r.value)]
    least, most = min(0.0, *ends), max(0.0, *ends)
    margin = 0.05 * (most - least or 1)
    least, most = least - margin, most + margin

    def across(points: float) -> float:
        return round(LEFT + (points - least) / (most - least) * (WIDTH - LEFT - RIGHT), 1)

    rows = []
    for number, r in enumerate(results):
        low, high = (100 * end for end in r.details["interval"])
        before, after = (f"{100 * r.details[when]:.1f} %" for when in ("before", "after"))
        direction = (low > 0) - (high < 0)
        words = f"{100 * r.value:+.1f} ({low:+.1f} to {high:+.1f})"
        y = TOP + ROW * (number + 0.7)
        rows.append(
            Row(
                r.details["measure"],
                before,
                after,
                words,
                y,
                across(low),
                across(100 * r.value),
                across(high),
                direction,
            )
        )
    step = next(s for s in (1, 2, 5, 10, 20, 50) if (most - least) / s <= 8 or s == 50)
    marks = [step * n for n in range(int(least // step) + 1, int(most // step) + 1)]
    return BeforeAfter(
        verdict["kind"],
        verdict["sentence"],
        rows,
        sizes,
        across(0),
        [(across(mark), f"{mark:+d}" if mark else "0") for mark in marks],
        TOP + ROW * len(rows) + 24,
        f"{100 * results[0].details['level']:.1f}",
        f"Difference of after and before: {'; '.join(f'{row.measure} {row.words}' for row in rows)}",
    )
