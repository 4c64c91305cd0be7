"""Schedules: learning rate, weight decay, momenta and temperatures as pure functions of the step.

A resumed run needs none of their state. The shapes of learning rates take the step, the length of the warm-up and the length
of the run, all in optimizer steps, and give a factor of the peak.
"""

import math
from dataclasses import dataclass


def scaled_lr(base_lr: float, batch_size: int, scaling: str) -> float:
    """Returns the learning rate of a global batch; base_lr is per 256 images, however it is scaled (Goyal et al. 2017).

    sqrt: of SimCLR, appendix B.1, whose 0.075·√N is written as a base_lr of 0.075·√256 = 1.2.
    """
    factors = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size / 256), "none": 1.0}
    return base_lr * factors[scaling]


def constant(step: int, warmup: int, total: int) -> float:
    """Stays at 1."""
    return 1.0


def step(step: int, warmup: int, total: int, every: int, gamma: float) -> float:
    """Multiplies by gamma every so many steps."""
    return gamma ** (step // every)


def multistep(step: int, warmup: int, total: int, milestones: list[int], gamma: float) -> float:
    """Multiplies by gamma at each milestone."""
    return gamma ** sum(step >= milestone for milestone in milestones)


def cosine(step: int, warmup: int, total: int, end: float) -> float:
    """Follows half a cosine from 1 at the end of the warm-up to `end` at the end of the run (Loshchilov & Hutter 2017, eq. 5)."""
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine_restarts(step: int, warmup: int, total: int, end: float, period: int, growth: float) -> float:
    """Follows cosines that begin anew after `period` steps, each `growth` times as long as the one before (SGDR, section 3)."""
    position, length = float(step - warmup), float(period)
    while position >= length:
        position, length = position - length, length * growth
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * position / length))


SHAPES = {f.__name__: f for f in (constant, step, multistep, cosine, cosine_restarts)}


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from peak / warmup_steps to the peak, then one of SHAPES with its arguments (in steps).

    Step t of the warm-up has (t + 1) / warmup_steps of the peak: most official codes take t / warmup_steps, whose first step
    moves nothing.
    stretch: the shape is laid out over so many times the run, which ends before it does (MSN's official code).
    """

    shape: str
    total_steps: int
    warmup_steps: int
    arguments: dict
    stretch: float = 1.0
    asked_warmup: int = 0  # steps, where it is shortened to warmup_steps

    @property
    def length(self) -> int:
        """Steps that the shape is laid out over."""
        return round(self.stretch * self.total_steps)

    def __call__(self, at: int) -> float:
        if at < self.warmup_steps:
            return (at + 1) / self.warmup_steps
        return SHAPES[self.shape](at, self.warmup_steps, self.length, **self.arguments)


def fitted_warmup(asked: int, total: int) -> int:
    """Returns the steps of a warm-up in a run of so many: a tenth of them where the one that is asked for would not end in it."""
    return total // 10 if asked >= total > 1 else asked


def warmed_up(start: float, end: float, step: int, warmup_steps: int) -> float:
    """Goes from start to end in equal steps, then stays: DINO's teacher temperature, which rises once an epoch in the official
    code, here at every step, so that it depends on how much was trained and not on the size of an epoch."""
    return end if step >= warmup_steps else start + (end - start) * step / warmup_steps


def cosine_between(start: float, end: float, step: int, total_steps: int) -> float:
    """Goes from start to end along half a cosine: teacher momenta, weight decays (BYOL, appendix; DINO)."""
    return end + (start - end) * cosine(step, 0, total_steps, 0.0)
