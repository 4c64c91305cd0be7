"""Memory: an allocator that keeps what tensors free, and a plain word when there is not enough."""

import contextlib
import ctypes
import functools
import platform
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # glibc's malloc.h
_KEPT = 1 << 30  # free bytes at the heap's end


@functools.cache
def keep_freed_memory() -> None:
    """Freed blocks are used again instead of being returned to the system.

    A step frees and asks for the same blocks over and over. Each time they come back from the system, every page of them
    faults: without this, views take twice as long and a training step on a CPU up to a third longer. The cost is that
    the process keeps the most it ever used, up to a gibibyte. Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes; setting it also stops its own adjustments
    libc.mallopt(_MMAP_MAX, 0)  # larger blocks come from the heap as well
    libc.mallopt(_TRIM_THRESHOLD, _KEPT)


class OutOfMemory(RuntimeError):
    """The machine's or the GPU's memory does not hold a step."""


@contextlib.contextmanager
def explained_memory(batch_size: int, processes: int, accumulate_steps: int, adds_up: bool) -> Iterator[None]:
    """Turns torch's errors about memory into one line that says what would fit.

    adds_up: whether the parts of a batch, one after the other, are the batch for the method that is trained.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = str(error)
        if not isinstance(error, MemoryError) and "out of memory" not in words and "can't allocate memory" not in words:
            raise
        each = batch_size // processes
        parts = [n for n in range(2 * accumulate_steps, each + 1) if each % n == 0][:1]
        way = "".join(f"trainer.accumulate_steps={n}, " for n in parts)
        if parts and not adds_up:
            way = (
                way[:-2] + " trainer.accumulate_approximately=true (its batches are then other ones for this method), "
            )
        said = (words.splitlines() or [type(error).__name__])[0][:120]  # Python's own error has no words
        raise OutOfMemory(
            f"out of memory with trainer.batch_size={batch_size}: try {way}a smaller trainer.batch_size, or"
            f" trainer.precision=bf16. The checkpoints are whole. ({said})"
        ) from error
