"""plan_only=true: what a run will take, from a few timed steps."""

import contextlib
import itertools
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sslctl.errors import say
from sslctl.methods.base import Method
from sslctl.ops.image_size import height_width
from sslctl.ops.timing import format_shares
from sslctl.training.memory import explain_out_of_memory
from sslctl.training.progress import duration
from sslctl.training.setup import Setup
from sslctl.training.train import train_step

WARMING, TIMED = 3, 10  # steps of plan_only=true


@dataclass(frozen=True)
class _SameForAll:
    """Stands for sslctl.methods.base.Embed in a plan, without looking at an image: the rows of all are alike."""

    method: Method
    device: torch.device

    @torch.no_grad()
    def __call__(self, function: Callable[[Tensor], Tensor], *, calibrate: bool = False) -> Tensor:
        facts = self.method.facts
        self.method.eval()
        row = function(torch.zeros(1, facts.channels, *height_width(facts.image_size), device=self.device))
        self.method.train()
        return row.float().cpu().expand(facts.num_images, -1)


def measure_steps(setup: Setup, first: int = 0) -> tuple[float, dict[str, float]]:
    """Takes a few real steps in memory, from `first` on; returns the seconds that one takes, and where they went, by part.

    What a method does before an epoch is not timed.
    """
    plan, method, clock = setup.plan, setup.method, setup.clock
    with contextlib.closing(setup.batches(first)) as feed, explain_out_of_memory(plan, method):
        method.start_epoch(0, _SameForAll(method, plan.device))
        clock.split()
        for step, batch in enumerate(itertools.islice(feed, WARMING + TIMED)):
            train_step(setup, first + step, batch)
            if step == min(WARMING, plan.total_steps - 1) - 1:
                clock.split()
    split = clock.split()
    return sum(split.values()) / max(1, min(TIMED, step + 1 - WARMING)), split


def time_steps(setup: Setup, measure: Callable[[Method], Any]) -> None:
    """Takes a few real steps, and prints what the run will take and where the time goes; nothing is written.

    measure: the online evaluation's figures, timed as well.
    """
    plan, method = setup.plan, setup.method
    seconds, split = measure_steps(setup)
    tensors = [*method.state_dict().values()]
    tensors += [v for state in setup.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    size = sum(t.numel() * t.element_size() for t in tensors)
    if plan.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB on the GPU"
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes
        memory = f"{peak / 2 ** (20 if sys.platform == 'darwin' else 10):,.0f} MiB"
    measured = ""
    if plan.knn_every_steps:
        began = time.monotonic()
        method.eval()
        measure(method)
        each, times = time.monotonic() - began, -(-plan.total_steps // plan.knn_every_steps) + 1
        measured = f" and {duration(each * times)} for the online figures ({each:.1f} s, {times} times)"
    say(
        f"time       {1000 * seconds:.0f} ms a step, {plan.batch_size / seconds:,.0f} images/s:"
        f" about {duration(seconds * plan.total_steps)} of training{measured}"
    )
    say(f"spent on   {format_shares(split)}")
    say(f"memory     {memory}; a checkpoint takes {size / 2**20:,.1f} MiB")
    say("plan_only=true: nothing was trained or written")
