"""Running out of memory, said in one line with what would fit, and what is known beforehand not to fit."""

import contextlib
from collections.abc import Iterator
from typing import Any

from sslctl.errors import InputError
from sslctl.methods.base import Method
from sslctl.ops.memory import in_gib, total_memory
from sslctl.training.accumulation import accumulation_blockers
from sslctl.training.plan import Plan


class OutOfMemory(RuntimeError):
    """The machine's or the GPU's memory does not hold a step."""


@contextlib.contextmanager
def explain_out_of_memory(plan: Plan, method: Method) -> Iterator[None]:
    """Turns, while it lasts, torch's errors about memory into one line that says what would fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        message = str(error)
        if (
            not isinstance(error, MemoryError)
            and "out of memory" not in message
            and "can't allocate memory" not in message
        ):
            raise
        each = plan.batch_size // plan.processes
        parts = [n for n in range(2 * plan.accumulate_steps, each + 1) if each % n == 0][:1]
        way = "".join(f"trainer.accumulate_steps={n}, " for n in parts)
        if parts and accumulation_blockers(method):
            way = (
                way[:-2] + " trainer.accumulate_approximately=true (its batches are then other ones for this method), "
            )
        if not (plan.recomputed or plan.compiled):
            way += "trainer.activation_checkpointing=true, "
        first_line = (message.splitlines() or [type(error).__name__])[0][:120]  # Python's own error has no words
        raise OutOfMemory(
            f"out of memory with trainer.batch_size={plan.batch_size}: try {way}a smaller trainer.batch_size, or"
            f" trainer.precision=bf16. The checkpoints are whole. ({first_line})"
        ) from error


def refuse_beyond_memory(plan: Plan, method: Method, optimizer: Any) -> None:
    """Raises InputError where weights, gradients and the optimizer's state alone are more than the device has.

    optimizer: its configuration. Processes on a CPU share the machine's memory.
    """
    moments = 2 if "betas" in optimizer else 1 if optimizer.get("momentum") else 0
    weights = {name: p.nbytes for name, p in method.named_parameters() if p.requires_grad}
    needed = sum(t.nbytes for t in method.state_dict().values()) + (1 + moments) * sum(weights.values())
    needed *= plan.processes if plan.device.type == "cpu" else 1
    available = total_memory(plan.device)
    if needed > available:
        largest = max(weights, key=weights.get)
        raise InputError(
            f"weights, gradients and the optimizer's state take {in_gib(needed)}, {plan.device} has {in_gib(available)};"
            f" {largest} alone has weights of {in_gib(weights[largest])}"
        )
