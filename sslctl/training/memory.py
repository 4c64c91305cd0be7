"""Running out of memory, said in one line with what would fit."""

import contextlib
from collections.abc import Iterator


class OutOfMemory(RuntimeError):
    """The machine's or the GPU's memory does not hold a step."""


@contextlib.contextmanager
def out_of_memory_message(batch_size: int, processes: int, accumulate_steps: int, adds_up: bool) -> Iterator[None]:
    """Turns torch's errors about memory into one line that says what would fit.

    adds_up: whether the parts of a batch, one after the other, are the batch for the method that is trained.
    """
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
        each = batch_size // processes
        parts = [n for n in range(2 * accumulate_steps, each + 1) if each % n == 0][:1]
        way = "".join(f"trainer.accumulate_steps={n}, " for n in parts)
        if parts and not adds_up:
            way = (
                way[:-2] + " trainer.accumulate_approximately=true (its batches are then other ones for this method), "
            )
        first_line = (message.splitlines() or [type(error).__name__])[0][:120]  # Python's own error has no words
        raise OutOfMemory(
            f"out of memory with trainer.batch_size={batch_size}: try {way}a smaller trainer.batch_size, or"
            f" trainer.precision=bf16. The checkpoints are whole. ({first_line})"
        ) from error
