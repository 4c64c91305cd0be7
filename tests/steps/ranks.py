"""Ranks of one run as threads of one process: what a step does with several processes, at the price of the step."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sslctl import distributed


class ThreadGroup:
    """What `sslctl.distributed` asks of torch.distributed, between threads that hold tensors of one memory."""

    def __init__(self, ranks: int):
        self.ranks, self.values = ranks, [None] * ranks
        self.barrier, self.here = threading.Barrier(ranks, timeout=60), threading.local()

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.ranks

    def get_rank(self) -> int:
        return self.here.rank

    def all_gather(self, parts: list[Tensor], x: Tensor, group: None = None) -> None:
        for part, value in zip(parts, self._exchange(x), strict=True):
            part.copy_(value)

    def all_reduce(self, x: Tensor) -> None:
        x.copy_(torch.stack(self._exchange(x)).sum(0))

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.values[self.here.rank] = x.detach().clone()
        self.barrier.wait()  # all have written
        values = list(self.values)
        self.barrier.wait()  # all have read
        return values


def in_ranks(count: int, function: Callable[[int], Any]) -> list[Any]:
    """What a function of the rank returns in each of so many ranks; what one of them raises is raised."""
    group = ThreadGroup(count)
    results, errors = [None] * count, []

    def work(rank: int) -> None:
        group.here.rank = rank
        try:
            results[rank] = function(rank)
        except Exception as error:
            errors.append(error)
            group.barrier.abort()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "dist", group)
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return results
