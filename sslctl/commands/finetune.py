"""sslctl finetune: the whole network learns from labels, beside the same network from random weights."""

from typing import Any

from sslctl.evaluation.finetune import Finetune
from sslctl.evaluation.runner import evaluate_all
from sslctl.evaluation.task import label_amount
from sslctl.evaluation.trained_classifier import refuse_processes


def finetune(config: Any) -> None:
    """Fine-tunes a run's backbone or given weights end to end."""
    refuse_processes(config, "finetune")
    evaluate_all(config, Finetune(label_amount(config.labels)))
