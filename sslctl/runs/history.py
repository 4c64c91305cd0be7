"""What a run has logged, by what it holds; and what is known of it before its first step."""

import math
from dataclasses import dataclass
from statistics import fmean

SETTLING_STEPS = 100  # before that nothing is judged: weights, statistics and queues find their level
SETTLING_EPOCHS = 3  # after the warm-up: for whatever is no collapse


@dataclass(frozen=True)
class Finding:
    """level: ok, early, warn or bad. rule: a short name. sentence: what was found, with figures, and what it may come from."""

    level: str
    rule: str
    sentence: str


@dataclass(frozen=True)
class RunFacts:
    """Holds what is known of a run before its first step.

    uninformative_loss: of outputs that say nothing of an image; feature_dim: D of features. num_classes: of the images that
    kNN is asked about; majority: the share of the largest class among them; knn_images: how many they are.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int = 0
    num_classes: int = 0
    majority: float = 0.0
    knn_images: int | None = None
    uninformative_loss: float | None = None
    feature_dim: int | None = None
    prototypes: int | None = None
    given: bool = False  # it did not begin with random weights

    @property
    def first_features(self) -> str:
        """Returns what the page calls the features before the first step."""
        return "features of the weights it was given" if self.given else "untrained features"

    @property
    def chance(self) -> float:
        """Returns the accuracy of whoever sees no image."""
        return max(1 / self.num_classes, self.majority)


class History:
    """Gives access to the records of a run.

    past_settling: whether it is old enough for a collapse to be one. past_warmup: whether it is for everything else.
    """

    def __init__(self, records: list[dict], facts: RunFacts):
        self.records, self.facts = records, facts
        self.step = max((r["step"] for r in records), default=0)
        self.earliest = max(SETTLING_STEPS, facts.steps_per_epoch)  # steps, of what tells a collapse
        self.needed = max(SETTLING_STEPS, facts.warmup_steps + SETTLING_EPOCHS * facts.steps_per_epoch)  # of the rest
        self.past_settling, self.past_warmup = self.step >= self.earliest, self.step >= self.needed

    def series(self, name: str) -> list[tuple[int, float]]:
        """Returns (step, value) of everything logged under a name."""
        return [(r["step"], r[name]) for r in self.records if name in r]

    def last(self, name: str, count: int) -> list[float]:
        """Returns the last values, `count` of them or fewer."""
        return [value for _, value in self.series(name)[-count:]]

    def latest(self, name: str, count: int) -> list[float]:
        """Returns the last values of what was logged since the run has settled down."""
        return [value for step, value in self.series(name) if step >= self.earliest][-count:]

    def confirmed(self, evaluated: list[float]) -> bool:
        """Tells whether figures of the online evaluation are no passing state: two in a row, or the run's last."""
        return len(evaluated) > 1 or (len(evaluated) == 1 and self.progress >= 1)

    def untrained(self, name: str) -> float | None:
        """Returns the value of the weights that the run began with, where it was measured."""
        return next((value for step, value in self.series(name) if step == 0), None)

    def epochs(self, name: str) -> list[tuple[float, float]]:
        """Returns (epoch, mean) of each epoch that has a record; the unfinished last one is left out."""
        length, values = self.facts.steps_per_epoch, {}
        for step, value in self.series(name):
            values.setdefault(math.ceil(step / length), []).append(value)
        return [(epoch, fmean(v)) for epoch, v in values.items() if epoch * length <= self.step]

    @property
    def progress(self) -> float:
        return self.step / self.facts.total_steps
