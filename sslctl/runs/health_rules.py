"""What can be wrong with a run, and how it shows in its metrics: one rule a symptom, all thresholds in one place."""

import math
from collections.abc import Iterable
from itertools import combinations, pairwise
from statistics import fmean, median

from sslctl.runs.history import SETTLING_EPOCHS, Finding, History
from sslctl.runs.intervals import wilson_noise

# --- Thresholds, such that default runs of every method on digits raise no false alarm ---

SURE = 0.2  # share of the run after which a loss that does not move is no longer a slow start
ENOUGH = 5  # values, to be sure of their mean
FEATURES_BAD, FEATURES_NEAR = 0.04, 0.05  # of 1, spread evenly. "std 0.003, healthy is about 0.088" is 0.034
HEADS = {  # metric -> what it is of; healthy ones keep 0.75, without stopped gradient or predictor 0.2 is left at epoch 20
    "projector_std": ("projections", 0.15, 0.3),
    "predictor_std": ("predictions", 0.15, 0.3),
}
# VICReg's embeddings keep their length. It asks for 1; views as unlike as other images leave μ / 4λ = 0.25, many dimensions 0.2
EMBEDDINGS_BAD, EMBEDDINGS_NEAR = 0.05, 0.1
AS_UNTRAINED = 0.5  # of what untrained features had: mean tokens lie close together from the start, and learn
RANK_BAD, RANK_NEAR = 1.1, 1.5  # directions; I-JEPA's mean tokens, of which a constant is the most, have 2.2
RANK_FEW = 3.0  # or fewer, with less than these shares of what untrained features had beyond the first
RANK_LOST, RANK_FALLEN = 0.15, 0.25  # bad, warn: ResNet-50 begins with 7 of 2,048; MAE falls to 0.3 for two epochs
BLIND = 0.005  # of the blind value: MoCo after 100 steps is 0.013 below it, DINO and SwAV that stay there 0.001
TREND, BLOCKS = 2.0, 60  # standard deviations; parts of a long series
UNMOVED, CHANCE = 0.003, 3.0  # of the loss, and standard errors: by what it may differ from its start without moving
RISING = 0.5  # of what the loss had fallen by; schedules of temperatures and queues raise it by less
DIVERGED = 2.0  # times the first loss
KNN_LOST = 0.5  # of what untrained features had over chance
KNN_FALLEN = 0.2  # of what the best had over chance
KNN_CLEAR, KNN_ERRORS = 0.15, 1 / 3  # a clear rise, or of the errors: BatchNorm that settles alone gives 0.08 on digits
EXTREME = 0.005  # of the greatest entropy, from either end
SKIPPED_STEPS, SKIPPED = 15, 0.02  # fp16's scale takes some 10 steps to be found; then one in 2,000 is skipped
VANISHED = 1e-5  # of the gradient's norm in the beginning
DRIFTED, DRIFTED_RANK = 0.3, 0.5  # of the given weights' features: cosine once centred, and share of their directions
LATE = 0.9  # share of the run: schedules of momenta reach 1 at its last step


# --- Rules on features, wherever they come from ---


def features_collapsed(spread: float, dim: int | None, untrained: float | None = None) -> Finding | None:
    """Finds all features in one place (SimSiam, arXiv:2011.10566, section 4.1). spread: √D times their std."""
    bad, near = FEATURES_BAD, FEATURES_NEAR
    if untrained is not None and untrained < near:
        bad = near = AS_UNTRAINED * untrained
    return _low_spread("features", spread, bad, near, _of_unit_rows(spread, dim))


def _of_unit_rows(spread: float, dim: int | None = None) -> str:
    """Words √D times the std, or the std itself where the number of dimensions is known."""
    if dim:
        return f"std {spread / dim**0.5:.2g}, healthy is about {dim**-0.5:.2g}"
    return f"√D·std {spread:.2g}, healthy is about 1"


def _low_spread(what: str, spread: float, bad: float, near: float, amount: str) -> Finding | None:
    """Finds what is spread less than it should be. amount: how much that is."""
    if spread >= near:
        return None
    if spread < bad:
        return Finding("bad", "collapse", f"{what} have collapsed: {amount}")
    return Finding("warn", "collapse", f"{what} lie close together: {amount}")


def few_directions(rank: float, dim: int | None, untrained: float | None = None) -> Finding | None:
    """Finds features along very few directions (RankMe, arXiv:2210.02885): fewer than any should, or than untrained ones had."""
    bad, near, before = RANK_BAD, RANK_NEAR, ""
    if untrained is not None:
        beyond = max(0.0, untrained - 1)
        bad = max(bad, min(RANK_FEW, 1 + RANK_LOST * beyond))
        near = max(min(near, 1 + AS_UNTRAINED * beyond), min(RANK_FEW, 1 + RANK_FALLEN * beyond), bad)
        before = f", untrained ones {untrained:.1f}"
    if rank >= near:
        return None
    most = f" of {dim:,}" if dim else ""
    level = "bad" if rank < bad else "warn"
    return Finding(level, "rank", f"features use {rank:.1f}{most} directions{before} (RankMe)")


# --- Rules: each a function of what is logged ---


def _collapse(history: History) -> Finding | None:
    """Finds the worst of all spreads: of features as they are trained and as they are evaluated, of projections, predictions,
    embeddings."""
    if not history.past_settling:
        return None
    dim, untrained, candidates = history.facts.feature_dim, history.untrained("backbone_std"), []
    trained, evaluated = history.latest("feature_std", 3), history.latest("backbone_std", 3)
    if trained:
        first = untrained and max(untrained, history.series("feature_std")[0][1])  # batch statistics spread them more
        candidates.append((max(trained) / FEATURES_BAD, features_collapsed(max(trained), dim, first)))
    if history.confirmed(evaluated):  # MAE's lie close together for an epoch or two
        candidates.append((max(evaluated) / FEATURES_BAD, features_collapsed(max(evaluated), dim, untrained)))
    for name, (what, bad, near) in HEADS.items():
        if spreads := history.latest(name, 3):
            most = max(spreads)
            candidates.append((most / bad, _low_spread(what, most, bad, near, _of_unit_rows(most))))
    if spreads := history.latest("embedding_std", 3):
        most, bad = max(spreads), EMBEDDINGS_BAD
        amount = f"std {most:.2g}, healthy is 0.2 to 1"
        candidates.append((most / bad, _low_spread("embeddings", most, bad, EMBEDDINGS_NEAR, amount)))
    return _worst(finding for _, finding in sorted(candidates, key=lambda pair: pair[0]))


def _worst(candidates: Iterable[Finding | None]) -> Finding | None:
    """Returns the first bad one, else the first."""
    candidates = [finding for finding in candidates if finding]
    return next((finding for finding in candidates if finding.level == "bad"), candidates[0] if candidates else None)


def _rank(history: History) -> Finding | None:
    """Applies `few_directions` where two evaluations in a row agree."""
    ranks = history.latest("rankme", 2)
    if not history.past_settling or not history.confirmed(ranks):
        return None
    return few_directions(max(ranks), history.facts.feature_dim, history.untrained("rankme"))


def _frozen_teacher(history: History) -> Finding | None:
    """Finds a teacher that never moves: a random network to imitate (BYOL, arXiv:2006.07733, table 5a: 18.8 % against 72.5 %)."""
    since, total = None, history.facts.total_steps
    for step, momentum in reversed(history.series("teacher_momentum")):
        if momentum < 1:
            break
        since = step
    if since is None or since > LATE * total:
        return None
    sentence = f"the teacher does not move: its momentum is 1 from step {since:,} of {total:,} on"
    return Finding("bad", "teacher", f"{sentence}: lower method.teacher_momentum")


def _loss_plateau(history: History) -> Finding | None:
    """Finds a loss at the value of outputs that say nothing, or where it began."""
    losses, length = history.series("loss"), history.facts.steps_per_epoch
    recent = sum(step > history.step - SETTLING_EPOCHS * length for step, _ in losses)
    count = min(max(ENOUGH, recent), len(losses) // 3)  # of a window: the first, one in the middle, the latest
    if not history.past_warmup or count < 3:
        return None
    values = [loss for _, loss in losses]
    start = (len(values) - count) // 2
    first, middle, latest = values[:count], values[start : start + count], values[-count:]
    levels = [median(first), median(middle), median(latest)]
    now, blind = fmean(latest), history.facts.uninformative_loss
    if blind is not None and abs(now - blind) <= BLIND * max(1.0, abs(blind)):
        where = f"is {now:.4g}, at its blind value {blind:.4g}, that of outputs which say nothing about an image"
    elif _levels_agree(levels, count, _noise(values)) and abs(_trend(values)) < TREND:
        where = f"is {now:.4g} and has not moved from {levels[0]:.4g}, where it began"
    else:
        return None
    level = "bad" if history.progress >= SURE and len(values) >= 4 * ENOUGH and not _learns(history) else "warn"
    epochs = (history.step - losses[-count][0]) / length
    sentence = f"the loss {where}, over {max(1, epochs):.0f} epochs now: learning rate, augmentation or temperature"
    return Finding(level, "stuck", sentence)


def _levels_agree(levels: list[float], count: int, noise: float) -> bool:
    """Tells whether levels of `count` values each differ by no more than chance."""
    return max(levels) - min(levels) <= max(UNMOVED * abs(levels[0]), CHANCE * noise * (2 / count) ** 0.5)


def _trend(values: list[float]) -> float:
    """Measures how surely a series rises (above 0) or falls, in standard deviations of the Mann-Kendall test."""
    size = -(-len(values) // BLOCKS)
    means = [fmean(values[start : start + size]) for start in range(0, len(values), size)]
    signs = sum((after > before) - (after < before) for before, after in combinations(means, 2))
    n = len(means)
    return signs / (n * (n - 1) * (2 * n + 5) / 18) ** 0.5


def _noise(values: list[float]) -> float:
    """Estimates the standard deviation of values around a slow course, from the median step between neighbours."""
    return median(abs(after - before) for before, after in pairwise(values)) / (0.6745 * 2**0.5)


def _rising_loss(history: History) -> Finding | None:
    """Finds a loss that has left its range, or had fallen and rises again: from where it has settled, queues are full by then."""
    losses = history.epochs("loss")
    settled = [loss for epoch, loss in losses if epoch * history.facts.steps_per_epoch >= history.needed]
    if len(settled) < 2 * SETTLING_EPOCHS:
        return None
    now, least = median(settled[-SETTLING_EPOCHS:]), min(settled)
    first, before = fmean(settled[:SETTLING_EPOCHS]), fmean([loss for _, loss in losses[:SETTLING_EPOCHS]])
    highest = max(before, history.facts.uninformative_loss or before)
    if now > highest + (DIVERGED - 1) * max(1.0, abs(highest)):
        sentence = f"the loss has risen from {before:.4g} to {now:.4g}: lower optimizer.base_lr"
        return Finding("warn" if _learns(history) else "bad", "diverging", sentence)
    first = max(first, before)
    sure = max(UNMOVED * max(1.0, abs(first)), CHANCE * _noise(settled))
    if now - least > max(sure, RISING * (first - least)):
        sentence = f"the loss rises: {now:.4g} now, it had fallen from {first:.4g} to {least:.4g}"
        return Finding("warn", "rising", sentence)
    return None


def _neighbours(history: History) -> Finding | None:
    """Finds kNN below that of untrained features, or well below its best."""
    values = history.series("knn")
    if not history.past_warmup or len(values) < 3 or not history.facts.num_classes:
        return None
    chance, now = history.facts.chance, max(value for _, value in values[-2:])  # one alone may be chance
    best = max(value for _, value in values)
    if values[0][0] == 0:
        untrained = values[0][1]
        if now - chance < KNN_LOST * (untrained - chance):
            sentence = f"kNN has fallen to {now:.1%}; {history.facts.first_features} had {untrained:.1%}, chance is {chance:.1%}"
            return Finding("bad", "knn", sentence)
        trained = max(value for _, value in values[1:])
        noise = wilson_noise(trained, untrained, history.facts.knn_images)
        if trained < untrained - noise and history.progress >= SURE:
            sentence = f"kNN was never better than {trained:.1%}, {history.facts.first_features} had {untrained:.1%}"
            return Finding("warn", "knn", sentence)
    if best - now > KNN_FALLEN * (best - chance):
        return Finding("warn", "knn", f"kNN has fallen to {now:.1%} from {best:.1%}")
    return None


def _drift(history: History) -> Finding | None:
    """Finds features that have little in common with those of the given weights, and are the worse for it: fewer directions, or
    neighbours of other classes."""
    cosines, ranks, knn = (history.latest(name, 2) for name in ("given_cosine", "rankme", "knn"))
    if not history.confirmed(cosines) or max(cosines) > DRIFTED:
        return None
    worse, rank, first = [], history.untrained("rankme"), history.untrained("knn")
    if rank and ranks and max(ranks) < DRIFTED_RANK * rank:
        worse.append(f"RankMe {rank:.1f} → {max(ranks):.1f}")
    if first is not None and knn and max(knn) < first - wilson_noise(max(knn), first, history.facts.knn_images):
        worse.append(f"kNN {first:.1%} → {max(knn):.1%}")
    if not worse:
        return None
    sentence = (
        f"features drift off from those of the weights it was given: cosine {max(cosines):.2f}, {', '.join(worse)}"
    )
    return Finding("warn", "drift", f"{sentence}; lower optimizer.base_lr")


def _learns(history: History) -> bool:
    """Tells whether kNN is clearly above that of untrained features: then no figure of the loss is bad beyond doubt."""
    values, untrained = history.latest("knn", 2), history.untrained("knn")
    return bool(values and untrained is not None) and (
        min(values) - untrained > min(KNN_CLEAR, KNN_ERRORS * (1 - untrained))
    )


def _entropy(history: History) -> Finding | None:
    """Finds a teacher that says the same of all images, or one prototype each (DINO, arXiv:2104.14294, section 5.3)."""
    values, facts = history.last("teacher_entropy", 3), history.facts
    if not history.past_warmup or not values or not facts.prototypes:
        return None
    most, now = math.log(facts.prototypes), fmean(values)
    level = "bad" if history.progress >= SURE and not _learns(history) else "warn"
    if now > (1 - EXTREME) * most:
        sentence = f"the teacher's outputs are uniform: entropy {now:.4g} of {most:.4g} (ln {facts.prototypes})"
        return Finding(level, "teacher entropy", f"{sentence}: sharpen them with a lower teacher temperature")
    if now < EXTREME * most:
        sentence = f"the teacher is sure of everything: entropy {now:.2g} of {most:.4g} (ln {facts.prototypes})"
        return Finding("warn", "teacher entropy", sentence)
    return None


def _skipped(history: History) -> Finding | None:
    """Finds too many fp16 steps that overflowed."""
    skipped = (history.last("skipped_steps", 1) or [0])[0]
    if skipped <= SKIPPED_STEPS + SKIPPED * history.step:
        return None
    sentence = f"{skipped:.0f} of {history.step:,} steps overflowed in fp16 and were skipped"
    return Finding("warn", "skipped steps", f"{sentence}: trainer.precision=bf16")


def _vanished_gradient(history: History) -> Finding | None:
    """Finds a gradient that is nothing beside what it was."""
    norms = [norm for _, norm in history.series("grad_norm")]
    if not history.past_warmup or len(norms) < 6:
        return None
    first, now = median(norms[: len(norms) // 3]), max(norms[-3:])
    if now > VANISHED * first:
        return None
    return Finding("bad", "gradient", f"the gradient has vanished: norm {now:.2g}, it was {first:.2g}")


RULES = (
    _collapse,
    _rank,
    _frozen_teacher,
    _loss_plateau,
    _rising_loss,
    _neighbours,
    _entropy,
    _skipped,
    _vanished_gradient,
    _drift,
)
