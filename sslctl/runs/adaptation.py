"""adaptation.json: what an adaptation has chosen, what its trials have scored, and the verdict, in the directory of its run."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sslctl.errors import InputError, Stopped
from sslctl.runs.checksums import check_json
from sslctl.runs.directory import write_json
from sslctl.runs.fingerprint import value_of
from sslctl.runs.reading import Damaged
from sslctl.signals import Interrupted

FILE, TRIALS = "adaptation.json", "trials"
FORMAT = 1


@dataclass
class Adaptation:
    """What an adaptation has decided so far.

    command: that was typed. identity: the keys that make it this adaptation and no other. choices: words that were chosen, each
    with its reason. steps: of each recipe, the seconds of one, how many an epoch has, and the seconds of an online evaluation,
    measured when it began. scores: of trials, by their directories; measures: the names of those that each is the mean of.
    recipe, epochs: of the run itself. verdict: its kind and sentence, and the sizes of images. seconds: that its parts have
    taken, all commands together but for those that were killed.
    """

    command: str
    identity: dict[str, Any]
    choices: dict[str, str]
    steps: dict[str, list[float]]
    scores: dict[str, float] = field(default_factory=dict)
    measures: dict[str, list[str]] = field(default_factory=dict)
    recipe: str | None = None
    epochs: int | None = None
    verdict: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def write(self, run_dir: Path) -> None:
        """Writes adaptation.json, with its checksum."""
        write_json(run_dir / FILE, {"format": FORMAT, **asdict(self)})

    @contextlib.contextmanager
    def timed(self, part: str, run_dir: Path) -> Iterator[None]:
        """Adds the seconds that a block takes to those of a part, and writes what there is, also where a signal cuts it short.

        Of another error nothing is written: it may be that another process has the directory.
        """
        began = time.monotonic()
        try:
            yield
        except (Stopped, Interrupted):
            self._count(part, time.monotonic() - began, run_dir)
            raise
        self._count(part, time.monotonic() - began, run_dir)

    def _count(self, part: str, seconds: float, run_dir: Path) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        self.write(run_dir)

    def lines(self) -> list[str]:
        """Describes what was chosen, a line a key, for the plan."""
        timings = [
            f"recipe     {recipe}: {1000 * seconds:.0f} ms a step, {steps:.0f} steps an epoch"
            for recipe, (seconds, steps, *_) in self.steps.items()
        ]
        return [*timings, *(f"choice     {word}: {reason}" for word, reason in self.choices.items())]


def read_adaptation(run_dir: Path) -> Adaptation | None:
    """Returns what there is of an adaptation in a run directory; None where none has begun. Raises Damaged for another file."""
    path = run_dir / FILE
    if not path.exists():
        return None
    try:
        values = json.loads(check_json(path.read_text()))
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        return Adaptation(**values)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise Damaged(path, f"no adaptation of format {FORMAT}: {error}", repairable=False) from error


def refuse_another(run_dir: Path, there: Adaptation, identity: dict[str, Any]) -> None:
    """Raises InputError with the keys that differ where a directory holds another adaptation than the one asked for."""
    keys = [
        key for key in sorted(there.identity.keys() | identity.keys()) if there.identity.get(key) != identity.get(key)
    ]
    if keys:
        lines = [f"  {key}: {value_of(there.identity, key)} → {value_of(identity, key)}" for key in keys[:10]]
        raise InputError(
            f"{run_dir} holds another adaptation (there → asked for):", *lines, "choose another run_dir= for this one"
        )
