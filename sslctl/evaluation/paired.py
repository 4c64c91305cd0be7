"""Two networks on the same test images and the same draws of labels: their difference with its interval, and the verdict."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslctl import signals
from sslctl.evaluation.multi_label import average_precision, influences, mean_average_precision

ERROR = 0.05  # of all comparisons of a verdict together: how often chance alone is called a difference, at most
_RESAMPLES = 400  # of the test images, for the interval of a difference in mAP


@dataclass(frozen=True)
class Comparison:
    """A measure of test images with the weights before and after, and their difference.

    measure: in words, such as "linear, 5 labels a class". difference: after - before. ci95: its 95 % interval; interval: the
    wider one, at `level`, that holds together with those of the verdict's other comparisons. draws: of labels.
    """

    measure: str
    before: float
    after: float
    difference: float
    ci95: tuple[float, float]
    interval: tuple[float, float]
    level: float
    draws: int

    @property
    def direction(self) -> int:
        """Returns 1 where after is better beyond chance, -1 where it is worse, 0 where the two cannot be told apart."""
        low, high = self.interval
        return (low > 0) - (high < 0)

    def in_words(self) -> str:
        """Returns 'linear, 5 labels a class: 76.1 → 87.7 %, +11.6 (+8.2 to +15.0)'."""
        low, high = self.interval
        return (
            f"{self.measure}: {100 * self.before:.1f} → {100 * self.after:.1f} %,"
            f" {100 * self.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        )


# --- Answers that are right or wrong ---


def compare(
    measure: str, before: Tensor, after: Tensor, comparisons: int = 1, groups: Tensor | None = None
) -> Comparison:
    """Compares which test images are answered rightly before and after, (R, N) bool each: a row for each draw of labels.

    comparisons: of one verdict, whose intervals hold together. groups: (N,) int64, what each image was taken from.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"answers of {tuple(before.shape)} and {tuple(after.shape)} are not of the same draws and images"
        )
    before, after, level = before.double(), after.double(), level_of(comparisons)
    difference = after - before
    values = difference if groups is None else of_groups(difference, groups)
    return Comparison(
        measure,
        before.mean().item(),
        after.mean().item(),
        difference.mean().item(),
        interval_of_mean(values, 0.95),
        interval_of_mean(values, level),
        level,
        len(difference),
    )


def level_of(comparisons: int) -> float:
    """Returns the level of each of several intervals that hold together in all but ERROR of all cases (Bonferroni)."""
    return 1 - ERROR / comparisons


def interval_of_mean(difference: Tensor, level: float) -> tuple[float, float]:
    """Returns (low, high): the interval of the mean of (R, N) differences over R draws of labels and N test images.

    Draws and images are two crossed samples, as readers and cases are in radiology: the analysis of variance of Dorfman, Berbaum
    & Metz (1992), with the degrees of freedom of Hillis (2007). Resampling a handful of draws finds too narrow ones.
    Two images are added, one for either side: with one draw it is the interval of Bonett & Price (2012) of paired shares, which
    holds where next to nothing differs.
    """
    from scipy.stats import norm, t

    sides = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(len(difference), 2)
    d = torch.cat([difference.double(), sides], 1)
    draws, images = d.shape
    mean = d.mean()
    of_draws, of_images = d.mean(1, keepdim=True) - mean, d.mean(0, keepdim=True) - mean
    square_of_images = draws * of_images.square().sum().item() / images  # over n, not n - 1, as theirs
    if draws == 1:
        half = norm.ppf((1 + level) / 2) * (square_of_images / images) ** 0.5
        return float(mean - half), float(mean + half)
    rest = d - mean - of_draws - of_images
    square_of_draws = images * of_draws.square().sum().item() / (draws - 1)
    square_of_rest = rest.square().sum().item() / ((draws - 1) * (images - 1))
    square = square_of_draws + max(square_of_images - square_of_rest, 0.0)
    if square < 1e-9 * square_of_images:  # draws that happen to agree on average, though not on any image
        square = square_of_images
    # Of draws that are all alike nothing is left but the images, of which there are many.
    freedom = (draws - 1) * (square / max(square_of_draws, 1e-9 * square)) ** 2
    half = t.ppf((1 + level) / 2, freedom) * (square / (draws * images)) ** 0.5
    return float(mean - half), float(mean + half)


def of_groups(difference: Tensor, groups: Tensor) -> Tensor:
    """Returns (R, K): a value for each of K groups of images, with the mean of (R, N) differences, whose spread is that of the
    mean where the images of a group are alike (linearised as a ratio, Cochran 1977, section 6.3)."""
    own = groups.unique(return_inverse=True)[1]
    count = int(own.max()) + 1
    mean = difference.mean(1, keepdim=True)
    sums = torch.zeros(len(difference), count, dtype=torch.float64).index_add_(1, own, difference - mean)
    return mean + sums * count / difference.shape[1]


# --- Rankings, of several labels an image ---


def compare_rankings(
    measure: str,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    targets: Tensor,
    comparisons: int = 1,
    groups: Tensor | None = None,
) -> Comparison:
    """Compares the mAP of scores before and after, (N, C) of each draw of labels. targets: (N, C) bool.

    Of one draw the interval is of images, or groups of them, resampled for both at once (percentile bootstrap, Efron 1979); of
    several, that of `interval_of_mean`, of pseudovalues: an mAP is no mean of images, as in Dorfman, Berbaum & Metz (1992), who
    have areas under curves.
    """
    level = level_of(comparisons)
    first, last = (
        torch.tensor([mean_average_precision(own, targets) for own in each], dtype=torch.float64)
        for each in (before, after)
    )
    difference = last - first
    if len(before) == 1:
        ci95, interval = _resampled_intervals(before[0], after[0], targets, groups, (0.95, level))
    else:
        pairs = zip(before, after, strict=True)
        shifts = torch.stack([influences(own_after, targets) - influences(own, targets) for own, own_after in pairs])
        values = difference[:, None] + shifts  # (R, N)
        values = values if groups is None else of_groups(values, groups)
        # Pseudovalues of a rare label are many times what a difference can be.
        ci95, interval = (
            (max(low, -1.0), min(high, 1.0)) for low, high in (interval_of_mean(values, p) for p in (0.95, level))
        )
    means = first.mean().item(), last.mean().item(), difference.mean().item()
    return Comparison(measure, *means, ci95, interval, level, len(before))


def _resampled_intervals(
    before: Tensor, after: Tensor, targets: Tensor, groups: Tensor | None, levels: Sequence[float]
) -> list[tuple[float, float]]:
    """Returns (low, high) of the difference in mAP of resampled images, or groups of them, at each level."""
    generator = np.random.default_rng(0)
    own = torch.arange(len(before)) if groups is None else groups.unique(return_inverse=True)[1]
    count, values = int(own.max()) + 1, []

    def precision(scores: Tensor, weight: Tensor) -> float:
        return average_precision(scores, targets, weight).nanmean().nan_to_num(0).item()

    for _ in range(_RESAMPLES):
        signals.check()
        weight = torch.from_numpy(generator.multinomial(count, np.full(count, 1 / count)))[own]
        values.append(precision(after, weight) - precision(before, weight))
    return [tuple(np.quantile(values, [(1 - p) / 2, (1 + p) / 2]).tolist()) for p in levels]


# --- The verdict ---

BETTER, SAME, WORSE, MIXED = "better", "not distinguishable", "worse", "mixed"
_MEANING = {
    BETTER: "better than the given weights",
    SAME: "not distinguishable from the given weights: keep the frozen ones",
    WORSE: "worse than the given weights: keep the frozen ones",
    MIXED: "better than the given weights in one measure, worse in another: it depends on the use which to take",
}


@dataclass(frozen=True)
class Verdict:
    """kind: better, not distinguishable, worse or mixed. sentence: what that means, with the figures it rests on."""

    kind: str
    sentence: str


def verdict_of(comparisons: Sequence[Comparison]) -> Verdict:
    """Returns the verdict on weights after training beside those before: by all comparisons whose interval leaves 0 out.

    Of trainings that change nothing, at most a share of ERROR is called better or worse.
    """
    better = [c for c in comparisons if c.direction > 0]
    worse = [c for c in comparisons if c.direction < 0]
    kind = MIXED if better and worse else BETTER if better else WORSE if worse else SAME
    telling = [*better, *worse] or comparisons
    return Verdict(kind, f"{_MEANING[kind]}. {'; '.join(c.in_words() for c in telling)}")
