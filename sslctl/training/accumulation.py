"""A batch in parts, one after the other: where they add up to the batch, and the output of the whole from theirs."""

from typing import Any

import torch

from sslctl.errors import InputError
from sslctl.methods.base import Method
from sslctl.models.batchnorm import takes_batch_statistics
from sslctl.training.plan import Plan


def accumulation_blockers(method: Method) -> list[str]:
    """Returns the reasons why the parts of a batch, one after the other, are not the batch; empty where they are."""
    batchnorm = "BatchNorm takes its statistics over the batch" if takes_batch_statistics(method) else None
    return [reason for reason in (method.batch_coupling, batchnorm) if reason]


def refuse_inexact_accumulation(plan: Plan, method: Method, approximately: bool) -> None:
    """Raises InputError where a batch is to be taken in parts that do not add up to it."""
    if plan.accumulate_steps == 1 or approximately:
        return
    reasons = accumulation_blockers(method)
    if reasons:
        raise InputError(
            f"trainer.accumulate_steps={plan.accumulate_steps}: {plan.accumulate_steps} parts of a batch are not the batch"
            f" here: {'; '.join(reasons)}. trainer.accumulate_approximately=true trains on the parts all the same",
            advice=["trainer.accumulate_approximately=true"],
        )


def merge_outputs(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Puts together the output of a whole batch from those of its equal parts: losses and metrics averaged, carries joined."""
    if len(parts) == 1:
        return parts[0]
    whole = {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0] if name != "carry"}
    carries = [part.get("carry", {}) for part in parts]
    return whole | {"carry": {name: torch.cat([carry[name] for carry in carries]) for name in carries[0]}}
