"""What can be wrong with a run, and how it shows in its metrics: one rule a symptom, all thresholds in one place."""

import math
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import fmean, median

# --- Thresholds, such that default runs of every method on digits raise no false alarm ---

SETTLING_STEPS = 100  # before that nothing is judged: weights, statistics and queues find their level
SETTLING_EPOCHS = 3  # after the warm-up
SURE = 0.2  # share of the run after which a loss that does not move is no longer a slow start
ENOUGH = 5  # values, to be sure of their mean
SPREADS = {  # metric -> what it is of; bad below, warn below. Of 1, spread evenly; MAE's mean tokens have 0.1
    "feature_std": ("features", 0.02, 0.05),
    "backbone_std": ("features", 0.02, 0.05),
    "projector_std": ("projections", 0.05, 0.1),  # 0.7 and more in healthy runs
    "predictor_std": ("predictions", 0.05, 0.1),
}
RANK_BAD, RANK_WARN = 1.1, 1.5  # directions; I-JEPA's mean tokens, of which a constant is the most, have 2.2
BLIND = 0.005  # of the blind value: MoCo after 100 steps is 0.013 below it, DINO and SwAV that stay there 0.001
TREND, BLOCKS = 2.0, 60  # standard deviations; parts of a long series
UNMOVED, CHANCE = 0.003, 3.0  # of the loss, and standard errors: by what it may differ from its start without moving
RISING = 0.5  # of what the loss had fallen by; schedules of temperatures and queues raise it by less
DIVERGED = 2.0  # times the first loss
KNN_LOST = 0.5  # of what untrained features had over chance
KNN_NOISE = 0.02  # of accuracies on a few hundred images
KNN_FALLEN = 0.2  # of what the best had over chance
EXTREME = 0.005  # of the greatest entropy, from either end
SKIPPED_STEPS, SKIPPED = 15, 0.02  # fp16's scale takes some 10 steps to be found; then one in 2,000 is skipped
VANISHED = 1e-5  # of the gradient's norm in the beginning


@dataclass(frozen=True)
class Finding:
    """level: ok, warn or bad. rule: a short name. sentence: what was found, with figures, and what it may come from."""

    level: str
    rule: str
    sentence: str


@dataclass(frozen=True)
class Known:
    """What is known of a run before its first step. blind_loss: of outputs that say nothing; feature_dim: D of features."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int = 0
    num_classes: int = 0
    blind_loss: float | None = None
    feature_dim: int | None = None
    prototypes: int | None = None


class Logged:
    """The records of a run, by what they hold."""

    def __init__(self, records: list[dict], known: Known):
        self.records, self.known = records, known
        self.step = max((r["step"] for r in records), default=0)
        self.needed = max(SETTLING_STEPS, known.warmup_steps + SETTLING_EPOCHS * known.steps_per_epoch)  # steps
        self.settled = self.step >= self.needed

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of everything logged under a name."""
        return [(r["step"], r[name]) for r in self.records if name in r]

    def last(self, name: str, count: int) -> list[float]:
        """The last values, `count` of them or fewer."""
        return [value for _, value in self.series(name)[-count:]]

    def epochs(self, name: str) -> list[tuple[float, float]]:
        """(epoch, mean) of each epoch that has a record; the unfinished last one is left out."""
        length, values = self.known.steps_per_epoch, {}
        for step, value in self.series(name):
            values.setdefault(math.ceil(step / length), []).append(value)
        return [(epoch, fmean(v)) for epoch, v in values.items() if epoch * length <= self.step]

    @property
    def share(self) -> float:
        return self.step / self.known.total_steps


# --- Rules: each a function of what is logged ---


def _collapse(logged: Logged) -> Finding | None:
    """All features, or projections, in one place (SimSiam, arXiv:2011.10566, section 4.1)."""
    if not logged.settled:
        return None
    for name, (what, bad, near) in SPREADS.items():
        spread = max(logged.last(name, 3), default=1.0)
        if spread < near:
            words = f"{name} {spread:.2g}, 1 is spread evenly"
            if what == "features" and logged.known.feature_dim:
                dim = logged.known.feature_dim
                words = f"std {spread / dim**0.5:.2g}, spread evenly is {dim**-0.5:.2g} (1/√{dim})"
            if spread < bad:
                return Finding("bad", "collapse", f"{what} have collapsed: {words}")
            return Finding("warn", "collapse", f"{what} lie close together: {words}")
    return None


def _rank(logged: Logged) -> Finding | None:
    """Features along very few directions (RankMe, arXiv:2210.02885)."""
    ranks = logged.last("rankme", 2)
    if not logged.settled or len(ranks) < 2 or max(ranks) >= RANK_WARN:
        return None
    most = f" of {logged.known.feature_dim}" if logged.known.feature_dim else ""
    level = "bad" if max(ranks) < RANK_BAD else "warn"
    return Finding(level, "rank", f"features use {ranks[-1]:.1f}{most} directions (RankMe)")


def _stuck(logged: Logged) -> Finding | None:
    """A loss at the value of outputs that say nothing, or where it began."""
    losses, length = logged.series("loss"), logged.known.steps_per_epoch
    recent = sum(step > logged.step - SETTLING_EPOCHS * length for step, _ in losses)
    count = min(max(ENOUGH, recent), len(losses) // 3)  # of a window: the first, one in the middle, the latest
    if not logged.settled or count < 3:
        return None
    values = [loss for _, loss in losses]
    start = (len(values) - count) // 2
    first, middle, latest = values[:count], values[start : start + count], values[-count:]
    levels = [median(first), median(middle), median(latest)]
    now, blind = fmean(latest), logged.known.blind_loss
    if blind is not None and abs(now - blind) <= BLIND * max(1.0, abs(blind)):
        where = f"is {now:.4g}, at its blind value {blind:.4g}, that of outputs which say nothing about an image"
    elif _alike(levels, count, _noise(values)) and abs(_trend(values)) < TREND:
        where = f"is {now:.4g} and has not moved from {levels[0]:.4g}, where it began"
    else:
        return None
    level = "bad" if logged.share >= SURE and len(values) >= 4 * ENOUGH else "warn"
    epochs = (logged.step - losses[-count][0]) / length
    sentence = f"the loss {where}, over {max(1, epochs):.0f} epochs now: learning rate, augmentation or temperature"
    return Finding(level, "stuck", sentence)


def _alike(levels: list[float], count: int, noise: float) -> bool:
    """Whether levels of `count` values each differ by no more than chance."""
    return max(levels) - min(levels) <= max(UNMOVED * abs(levels[0]), CHANCE * noise * (2 / count) ** 0.5)


def _trend(values: list[float]) -> float:
    """How surely a series rises (above 0) or falls, in standard deviations of the Mann-Kendall test."""
    size = -(-len(values) // BLOCKS)
    means = [fmean(values[start : start + size]) for start in range(0, len(values), size)]
    signs = sum((after > before) - (after < before) for before, after in combinations(means, 2))
    n = len(means)
    return signs / (n * (n - 1) * (2 * n + 5) / 18) ** 0.5


def _noise(values: list[float]) -> float:
    """The standard deviation of values around a slow course, from the median step between neighbours."""
    return median(abs(after - before) for before, after in pairwise(values)) / (0.6745 * 2**0.5)


def _rising(logged: Logged) -> Finding | None:
    """A loss that has left its range, or had fallen and rises again: from where it has settled, queues are full by then."""
    losses = logged.epochs("loss")
    settled = [loss for epoch, loss in losses if epoch * logged.known.steps_per_epoch >= logged.needed]
    if len(settled) < 2 * SETTLING_EPOCHS:
        return None
    now, least = median(settled[-SETTLING_EPOCHS:]), min(settled)
    first, before = fmean(settled[:SETTLING_EPOCHS]), fmean([loss for _, loss in losses[:SETTLING_EPOCHS]])
    highest = max(before, logged.known.blind_loss or before)
    if now > highest + (DIVERGED - 1) * max(1.0, abs(highest)):
        words = f"the loss has risen from {before:.4g} to {now:.4g}: lower optimizer.base_lr"
        return Finding("bad", "diverging", words)
    first = max(first, before)
    sure = max(UNMOVED * max(1.0, abs(first)), CHANCE * _noise(settled))
    if now - least > max(sure, RISING * (first - least)):
        words = f"the loss rises: {now:.4g} now, it had fallen from {first:.4g} to {least:.4g}"
        return Finding("warn", "rising", words)
    return None


def _neighbours(logged: Logged) -> Finding | None:
    """kNN below that of untrained features, or well below its best."""
    values = logged.series("knn")
    if not logged.settled or len(values) < 3 or not logged.known.num_classes:
        return None
    chance, now = 1 / logged.known.num_classes, max(value for _, value in values[-2:])  # one alone may be chance
    best = max(value for _, value in values)
    if values[0][0] == 0:
        untrained = values[0][1]
        if now - chance < KNN_LOST * (untrained - chance):
            words = f"kNN has fallen to {now:.1%}; untrained features had {untrained:.1%}, chance is {chance:.1%}"
            return Finding("bad", "knn", words)
        trained = max(value for _, value in values[1:])
        if trained < untrained - KNN_NOISE and logged.share >= SURE:
            words = f"kNN was never better than {trained:.1%}, untrained features had {untrained:.1%}"
            return Finding("warn", "knn", words)
    if best - now > KNN_FALLEN * (best - chance):
        return Finding("warn", "knn", f"kNN has fallen to {now:.1%} from {best:.1%}")
    return None


def _entropy(logged: Logged) -> Finding | None:
    """A teacher that says the same of all images, or one prototype each (DINO, arXiv:2104.14294, section 5.3)."""
    values, known = logged.last("teacher_entropy", 3), logged.known
    if not logged.settled or not values or not known.prototypes:
        return None
    most, now = math.log(known.prototypes), fmean(values)
    level = "bad" if logged.share >= SURE else "warn"
    if now > (1 - EXTREME) * most:
        words = f"the teacher's outputs are uniform: entropy {now:.4g} of {most:.4g} (ln {known.prototypes})"
        return Finding(level, "teacher entropy", f"{words}: sharpen them with a lower teacher temperature")
    if now < EXTREME * most:
        words = f"the teacher is sure of everything: entropy {now:.2g} of {most:.4g} (ln {known.prototypes})"
        return Finding("warn", "teacher entropy", words)
    return None


def _skipped(logged: Logged) -> Finding | None:
    """fp16 steps that overflowed."""
    skipped = (logged.last("skipped_steps", 1) or [0])[0]
    if skipped <= SKIPPED_STEPS + SKIPPED * logged.step:
        return None
    words = f"{skipped:.0f} of {logged.step:,} steps overflowed in fp16 and were skipped"
    return Finding("warn", "skipped steps", f"{words}: trainer.precision=bf16")


def _vanished(logged: Logged) -> Finding | None:
    """A gradient that is nothing beside what it was."""
    norms = [norm for _, norm in logged.series("grad_norm")]
    if not logged.settled or len(norms) < 6:
        return None
    first, now = median(norms[: len(norms) // 3]), max(norms[-3:])
    if now > VANISHED * first:
        return None
    return Finding("bad", "gradient", f"the gradient has vanished: norm {now:.2g}, it was {first:.2g}")


RULES = (_collapse, _rank, _stuck, _rising, _neighbours, _entropy, _skipped, _vanished)
