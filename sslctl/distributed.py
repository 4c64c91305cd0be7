"""The processes of one run. In a single process everything here is the identity and costs nothing.

Every process holds the rows [r·B, (r+1)·B) of the global batch, gathers what its loss compares, and calculates the same
full loss. The gradient of a gathered tensor is summed over the processes, so that the mean of the processes' parameter
gradients is exactly the gradient of that loss (`average_gradients`).
"""

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

_PATIENCE = timedelta(minutes=30)  # of a process for another; who starts processes sees deaths at once
_NOTICING = 5  # seconds in which the others notice it too
_TIMED_OUT = re.compile(r"Timed out waiting|timeout caused pair closure|[Ww]ait timeout")  # of messages, of the store

_alone = False  # while the first process works and the others wait
_control: dist.ProcessGroup | None = None  # for numbers that the CPU needs: never waits for a GPU
_store: dist.Store | None = None  # what the processes tell each other where messages no longer come through
_patience = _PATIENCE


class OtherProcessFailed(Exception):
    """Another process has failed and says why."""

    def __init__(self, status: int):
        super().__init__()
        self.status = status


class ProcessSilent(RuntimeError):
    """A process has not come to where the others wait for it, for longer than they may."""


def is_distributed() -> bool:
    """Tells whether this process is one of several that `sslctl` or torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Returns the number of this process; 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def effective_world_size() -> int:
    """Returns how many processes share the batch at hand: in `on_main_process` the main one has it for itself."""
    return 1 if _alone else world_size()


def default_threads() -> int:
    """Counts the CPUs that this process may use, shared among the processes; macOS tells only how many there are."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // world_size())


def join(device: str, patience: timedelta = _PATIENCE) -> None:
    """Enters the group that the environment describes, if it does; all but the first process fall silent.

    device: "cpu" or "cuda"; each process takes the GPU of its local number. patience: how long one waits for another.
    """
    global _control, _store, _patience
    if not is_distributed() or dist.is_initialized():
        return
    method = os.environ.get("SSLCTL_RENDEZVOUS", "env://")
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if device == "cuda" else "gloo"
    store, number, count = next(rendezvous(method, number, count, timeout=patience))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(count):  # torchrun's store keeps the addresses of before a restart
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    _store, _patience = store, patience
    _store.set(f"place {number}", f"pid {os.getpid()} on {socket.gethostname()}")
    # NCCL aborts the process where it has waited too long: the control group, which says who is silent, does so before.
    dist.init_process_group(
        backend, store=store, rank=number, world_size=count, timeout=patience * (2 if backend == "nccl" else 1)
    )
    _control = dist.new_group(backend="gloo", timeout=patience) if backend == "nccl" else dist.group.WORLD
    if number:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it stays for the life of the process


def explain(error: Exception) -> Exception:
    """Returns the error of a process that must end: ProcessSilent in place of a time limit's, with whose silence it was.

    Called where any error ends a process, so that the others see that it was there to notice.
    """
    if _store is None:
        return error
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with contextlib.suppress(RuntimeError):  # the store may be in the process that is silent
        _store.set(f"answers {number}", "")
        if not isinstance(error, RuntimeError) or not _TIMED_OUT.search(str(error)):
            return error
        deadline, silent = time.monotonic() + _NOTICING, [other for other in range(count) if other != number]
        while silent and time.monotonic() < deadline:
            time.sleep(0.1)
            silent = [other for other in silent if not _store.check([f"answers {other}"])]
        if silent:
            return ProcessSilent(_words_for_silence(silent))
    return error


def _words_for_silence(silent: list[int]) -> str:
    place = {n: _store.get(f"place {n}").decode() for n in silent if _store.check([f"place {n}"])}
    names = ", ".join(f"process {n} ({place.get(n, 'which never came')})" for n in silent)
    minutes = _patience / timedelta(minutes=1)
    return f"no answer from {names} for {minutes:.3g} min (trainer.timeout_minutes); the same command continues the run"


def record_first_failure() -> None:
    """Notes down for `sslctl.training.launch`, before the others can notice, that this process is the first to fail."""
    with contextlib.suppress(KeyError, FileExistsError), (_notes() / "failed").open("x") as opened:
        opened.write(str(rank()))


def record_listening() -> None:
    """Notes down for `sslctl.training.launch` that from here on a signal stops this process after its step."""
    with contextlib.suppress(KeyError):
        (_notes() / f"listening-{rank()}").touch()


def _notes() -> Path:
    return Path(os.environ["SSLCTL_NOTES"])


def leave() -> None:
    """Leaves the group when all have come to their end: one that goes earlier may take another down."""
    global _control, _store
    if dist.is_initialized():
        dist.barrier(group=_control)
        _control = _store = (
            None  # while anything holds the group its threads live on, and may abort the process at its end
        )
        dist.destroy_process_group()


def local_rows(count: int) -> slice:
    """Returns which of `count` rows of a global batch are this process's."""
    each = count // world_size()
    return slice(rank() * each, (rank() + 1) * each)


# --- Tensors ---


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)  # it may be another tensor's gradient as well
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """(B, …) of each process -> (G, …) of the global batch, in its order; the gradient comes back to its rows.

    Half precision travels as fp32. In `on_main_process` there is nobody to gather from.
    """
    if effective_world_size() == 1:
        return x
    return _Gather.apply((x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).contiguous())


def gather_on_host(x: Tensor) -> Tensor:
    """As `gather`, of a tensor on the CPU that decides a shape: without gradient, and without waiting for a GPU."""
    if effective_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous(), group=_control)
    return torch.cat(parts)


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by their mean over the processes, all of one kind in one message."""
    if effective_world_size() == 1:
        return
    kinds: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat)
        means = (flat / world_size()).split([tensor.numel() for tensor in same])
        torch._foreach_copy_(same, [mean.view_as(tensor) for mean, tensor in zip(means, same, strict=True)])


def average_gradients(parameters: Iterable[Tensor], others: Iterable[Tensor] = ()) -> None:
    """Makes the gradients, in every process, that of the global loss, and other tensors their mean, in the same message."""
    average([*(p.grad for p in parameters if p.grad is not None), *others])


# --- Agreement ---


def broadcast_from_main(*tensors: Tensor) -> None:
    """Makes tensors, in place, those of the main process."""
    if effective_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def all_reduce_max(value: int) -> int:
    """Returns the largest of the processes' numbers."""
    if effective_world_size() == 1:
        return value
    number = torch.tensor(value)
    dist.all_reduce(number, dist.ReduceOp.MAX, group=_control)
    return int(number)


def all_gather_object(value: Any) -> list[Any]:
    """Returns the processes' values (plain types and tensors), in their order."""
    if effective_world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def on_main_process(function: Callable[[], Any]) -> Any:
    """Returns, in every process, what a function gives in the main one, however long that takes.

    When it raises there, all processes stop.
    """
    if world_size() == 1:
        return function()
    global _alone
    outcome, raised = [None, 0], None
    if rank() == 0:
        try:
            _alone = True
            with _others_waiting():
                outcome[0] = function()
        except BaseException as error:
            from sslctl.errors import InputError

            raised, outcome[1] = error, getattr(error, "status", 2 if isinstance(error, InputError) else 1)
        finally:
            _alone = False
        _send_from_main(working=False)
    else:
        while _send_from_main():
            pass
    dist.broadcast_object_list(outcome, src=0, group=_control)
    if raised is not None:
        raised.add_note("in the first process")
        raise raised
    if outcome[1]:
        raise OtherProcessFailed(outcome[1])
    return outcome[0]


@contextlib.contextmanager
def _others_waiting() -> Iterator[None]:
    """While the main process works the others hear from it, several times within the time that they wait."""
    ended = threading.Event()

    def send() -> None:
        with contextlib.suppress(RuntimeError):  # one is gone or silent: the next message says so
            while not ended.wait(_patience.total_seconds() / 4):
                _send_from_main()

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _send_from_main(*, working: bool = True) -> bool:
    """Returns, in every process, whether the main one is still at work."""
    message = torch.tensor(int(working))
    dist.broadcast(message, src=0, group=_control)
    return bool(message)


def main_process_first(function: Callable[[], Any]) -> Any:
    """Calls a function in the main process, then in the others: what it downloads, they find."""
    results = []
    on_main_process(lambda: results.append(function()))
    return results[0] if results else function()
