"""Judging by several labels an image: average precision of each, their mean (mAP), and its interval."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslctl import signals
from sslctl.data.sources import Source
from sslctl.evaluation.results import make_result
from sslctl.evaluation.subjects import Subject
from sslctl.runs.results import Result

METRIC = "mAP"
_RESAMPLES = 200  # of the test images, or groups of them, for an interval


def average_precision(scores: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Returns the average precision of each label, (C,) float64: Σ (Rₙ − Rₙ₋₁) Pₙ over the distinct scores, from the highest on.

    scores: (N, C); targets: (N, C) bool; weight: (N,) of the images. A label that no image has is NaN.
    """
    weight = torch.ones(len(scores), dtype=torch.float64) if weight is None else weight.double()
    order, _, end = _ranked(scores)
    own = weight[order]
    hits = own * targets.gather(0, order)
    precision = hits.cumsum(0).gather(0, end) / own.cumsum(0).gather(0, end).clamp(min=1e-12)
    return (hits * precision).sum(0) / hits.sum(0)  # 0 / 0: no image has it


def _ranked(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rows of (N, C) scores from the highest on, and the places of the first and the last that share a score, (N, C)
    each: images of one score come together, precision and recall are those at the last of them."""
    order = scores.argsort(dim=0, descending=True)
    ordered, n = scores.gather(0, order), len(scores)
    differs = torch.ones(n + 1, scores.shape[1], dtype=torch.bool)  # from the one before
    differs[1:-1] = ordered[1:] != ordered[:-1]
    places = torch.arange(n)[:, None]
    start = torch.where(differs[:-1], places, 0).cummax(0).values
    end = torch.where(differs[1:], places, n).flip(0).cummin(0).values.flip(0)
    return order, start, end


def influences(scores: Tensor, targets: Tensor) -> Tensor:
    """Returns (N,) float64: N times the derivative of the mAP by the weight of each image, 0 on average.

    The mAP plus these are the pseudovalues of the infinitesimal jackknife (Efron 1982, chapter 6): their mean is the mAP, their
    spread that of the mAP over samples of images. scores: (N, C); targets: (N, C) bool.
    """
    order, start, end = _ranked(scores)
    hits = targets.gather(0, order).double()
    count = (end + 1).double()
    precision = hits.cumsum(0).gather(0, end) / count
    total = hits.sum(0)
    # An image counts among those found, and in the precision at each that is found no earlier than itself.
    terms = (hits / count, hits * precision / count)
    gain, loss = (part.flip(0).cumsum(0).flip(0).gather(0, start) for part in terms)
    each = (hits * (precision + gain - (hits * precision).sum(0) / total) - loss) / total
    of_images = torch.empty_like(each).scatter_(0, order, each)
    return len(scores) * of_images[:, total > 0].mean(1).nan_to_num(0)  # as the mAP of no label is 0


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Returns the mean over the labels that an image has; 0 where none has any."""
    return average_precision(scores, targets).nanmean().nan_to_num(0).item()


def interval(scores: Tensor, targets: Tensor, groups: Tensor | None, seed: int = 0) -> list[float]:
    """Returns [low, high]: 95 % of the mAP of resampled images, or groups of images, lie there (percentile bootstrap)."""
    generator = np.random.default_rng(seed)
    own = torch.arange(len(scores)) if groups is None else groups.unique(return_inverse=True)[1]
    count, values = int(own.max()) + 1, []
    for _ in range(_RESAMPLES):
        signals.check()
        times = torch.from_numpy(generator.multinomial(count, np.full(count, 1 / count)))
        values.append(average_precision(scores, targets, times[own]).nanmean().nan_to_num(0).item())
    return np.quantile(values, [0.025, 0.975]).tolist()


def ranking_results(
    subject: Subject, source: Source, scores: list[Tensor], *, details: dict | None = None, **settings: Any
) -> list[Result]:
    """Returns the mAP of scores (N, C), those of each draw of labels, on a source's images.

    details hold each label's figure, of several draws their mean, and its share of the images, which is what a constant answer
    scores. settings: of `make_result`.
    """
    of_draws = torch.stack([average_precision(of_draw, source.targets) for of_draw in scores])  # (draws, C)
    each = of_draws.mean(0)
    shares = source.targets.double().mean(0)
    present = ~each.isnan()
    details = (details or {}) | {
        "of_each_class": {
            c: value for c, value, there in zip(source.classes, each.tolist(), present, strict=True) if there
        },
        "share_of_each_class": dict(zip(source.classes, shares.tolist(), strict=True)),
        "constant": shares[present].mean().nan_to_num(0).item(),
    }
    return [
        make_result(
            subject,
            source,
            metric=METRIC,
            values=of_draws.nanmean(1).nan_to_num(0).tolist(),
            ci95=interval(scores[0], source.targets, source.groups) if len(scores) == 1 else None,
            details=details,
            **settings,
        )
    ]
