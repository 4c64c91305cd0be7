"""sslctl finetune: the whole network on labels, beside the same network from scratch."""

import functools
from typing import Any

from sslctl.evaluation.finetune import finetune_records, planned
from sslctl.evaluation.runner import evaluate_all, label_amount
from sslctl.evaluation.trained_classifier import (
    refuse_processes,
)


def finetune(config: Any) -> None:
    """sslctl finetune: end-to-end fine-tuning of a run's backbone or of foreign weights."""
    refuse_processes(config, "finetune")
    amount = label_amount(config.labels)
    evaluate_all(
        config,
        functools.partial(finetune_records, amount=amount),
        offered=("trained", "scratch"),
        title="fine-tuned",
        planned=functools.partial(planned, amount=amount),
    )
