"""How the jobs of a sweep ended. Each leaves it in a file of its own, as a launcher may run it in another process."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

# From best to worst: done, bad input found before the first step, failed while running.
_RISING = (0, 2, 1)


@dataclass(frozen=True)
class Outcome:
    """One job: its number in the sweep, its choices, its exit status, and what it said where that is not 0."""

    number: int
    choices: str
    status: int
    message: str = ""


def record(folder: Path, outcome: Outcome) -> None:
    """Leaves how a job ended in the sweep's folder."""
    (folder / f"job-{outcome.number}.json").write_text(json.dumps(asdict(outcome)))


def outcomes_in(folder: Path) -> list[Outcome]:
    """Returns how the jobs ended that have, in their order."""
    outcomes = [Outcome(**json.loads(path.read_text())) for path in folder.glob("job-*.json")]
    return sorted(outcomes, key=lambda outcome: outcome.number)


def worst(outcomes: list[Outcome]) -> int:
    """Returns the worst exit status of some jobs: any other before 1 (failed while running), then 2 (bad input), then 0."""
    statuses = [outcome.status for outcome in outcomes] or [0]
    return max(statuses, key=lambda status: _RISING.index(status) if status in _RISING else len(_RISING))


def summary(outcomes: list[Outcome]) -> list[str]:
    """Says which jobs of a sweep failed, with their status and why; empty where none has."""
    failed = [outcome for outcome in outcomes if outcome.status]
    lines = [
        f"{len(failed)} of the sweep's {len(outcomes)} jobs failed; its status is {worst(outcomes)}, the worst of theirs:"
    ]
    common = set.intersection(*(set(o.choices.split()) for o in outcomes)) if len(outcomes) > 1 else set()
    for o in failed:
        choices = " ".join(word for word in o.choices.split() if word not in common)
        lines.append(f"  job {o.number}, status {o.status} ({choices[:200]}): {o.message[:150]}")
    return lines if failed else []
