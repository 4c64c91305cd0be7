"""sslctl linear-eval: a linear classifier on frozen features."""

from typing import Any

from omegaconf import OmegaConf

from sslctl.errors import InputError
from sslctl.evaluation.linear import LinearProbe, ProbeGrid
from sslctl.evaluation.linear_augmented import LinearAugmented
from sslctl.evaluation.runner import evaluate_all
from sslctl.evaluation.task import label_amount


def linear_eval(config: Any) -> None:
    """Trains linear classifiers on cached features, or one on augmented views, beside those of random weights."""
    amount = label_amount(config.labels)
    if config.protocol == "cached":
        grid = ProbeGrid(**OmegaConf.to_container(config.probe, resolve=True))
        evaluate_all(config, LinearProbe(grid, amount, config.draws))
        return
    if amount is not None:
        raise InputError(
            "protocol=augmented trains on all labels; few labels go with protocol=cached", advice=["protocol=cached"]
        )
    evaluate_all(config, LinearAugmented())
