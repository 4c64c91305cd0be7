"""From the values that a protocol measured to a result, with the spread of the values or the interval of their mean."""

import json
import statistics

import numpy as np
import torch
from torch import Tensor

from sslctl.data.sources import Source
from sslctl.errors import InputError
from sslctl.evaluation.provenance import measured_by
from sslctl.evaluation.subjects import Subject
from sslctl.runs.directory import now, versions
from sslctl.runs.intervals import wilson
from sslctl.runs.results import Result

RESAMPLES = 1000  # of the test images, for an interval


def make_result(
    subject: Subject,
    source: Source,
    *,
    protocol: str,
    metric: str,
    values: list[float],
    share: bool = True,
    labels: str,
    params: dict,
    seed: int | None = None,
    epoch_rule: str = "no training",
    details: dict | None = None,
    each: Tensor | None = None,
    ci95: list[float] | None = None,
) -> Result:
    """Returns the result of a protocol on a subject and the images of a source.

    values: one a draw of labels. Their mean is the value; of several, their standard deviation is kept and a 95 % interval
    of their mean. share: whether they are parts of 1, to be shown in percent. each: (N,) what the single value is the mean
    of, one a test image that counts: gives their number and the 95 % interval. ci95: the interval itself. seed: of the
    evaluation; None where it draws nothing. params and details: see `Result`. Raises InputError for what cannot be read
    again, such as a value that is not a finite number.
    """
    if len(values) > 1:
        spread = {"std": statistics.stdev(values), "draws": len(values), "ci95": interval_of_mean(values)}
    else:
        spread = {"ci95": interval(each) if each is not None else ci95}
    result = Result(
        protocol=protocol,
        metric=metric,
        value=statistics.fmean(values),
        share=share,
        **spread,
        subject=subject.name,
        **vars(subject.origin),
        labels=labels,
        dataset=source.name,
        split=source.split,
        content=source.content_hash,
        classes=source.classes_hash,
        images=len(source) if each is None else len(each),
        seed=seed,
        step=subject.step,
        epoch=subject.epoch,
        epoch_rule=epoch_rule,
        features=subject.features,
        preprocess=subject.preprocess.summary(),
        params=params,
        backbone_parameters=subject.params,
        weights_sha256=subject.weights_sha256,
        details=details or {},
        **measured_by(),
        versions=versions(),
        time=now(),
    )
    try:
        Result.from_line(json.loads(result.to_json()))
    except ValueError as error:
        raise InputError(f"{protocol} {metric} of {subject.name} weights is not recorded: {error}") from error
    return result


def interval(each: Tensor, seed: int = 0) -> list[float]:
    """Returns [low, high]: 95 % of the means of resampled images lie there (percentile bootstrap, Efron 1979). each: (N,).

    Where all images are right, or none is, it is Wilson's.
    """
    if each.dtype == torch.bool and bool((each == each[0]).all()):
        return list(wilson(float(each[0]), len(each)))  # resampling finds no other value
    values, counts = np.unique(each.double().numpy(), return_counts=True)
    generator = np.random.default_rng(seed)
    if len(values) <= 64:  # drawing images is drawing how often each value comes
        means = generator.multinomial(len(each), counts / len(each), RESAMPLES) @ values / len(each)
    else:
        each = each.double().numpy()
        means = [each[generator.integers(0, len(each), len(each))].mean() for _ in range(RESAMPLES)]
    return np.quantile(means, [0.025, 0.975]).tolist()


def interval_of_mean(values: list[float]) -> list[float]:
    """Returns [low, high]: the 95 % interval of the mean of a few values, by Student's t with one degree of freedom less."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return [statistics.fmean(values) - half, statistics.fmean(values) + half]
