"""Two codes that take the same training steps, compared tensor by tensor: loss, gradients, parameters, teacher and buffers."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from parity_official import Official
from torch import Tensor, nn

TOLERANCE = 1e-9  # relative, of float64
FLOOR = 1e-3  # a tensor's norm counts as at least this part of the largest one of its kind
Tensors = dict[str, Tensor]


class ParityError(Exception):
    """Two codes that cannot be compared: they hold other tensors."""


@dataclass(frozen=True)
class Side:
    """One of the two codes.

    step: takes a whole step of the given number, the optimizer's and the teacher's with it, leaves the gradients where they
    are and returns the loss (). trained: what the optimizer trains, in an order that both sides share. slow: teachers.
    state: other tensors that a later step depends on.
    """

    step: Callable[[int], Tensor]
    trained: Sequence[nn.Module | nn.Parameter]
    slow: Sequence[nn.Module] = ()
    state: Callable[[], Tensors] = dict


Sides = tuple[Side, Side]


@dataclass(frozen=True)
class Comparison:
    """A row of the table: a method beside official code.

    repository: its folder. executed: what of it ran. build: makes both sides. steps: how many they take; 0 for what is
    calculated once, without an optimizer. reason: why they differ, where they do by more than the tolerance; remark: what
    else a reader should know.
    """

    method: str
    repository: str
    executed: str
    build: Callable[[Official], Sides]
    steps: int = 5
    tolerance: float = TOLERANCE
    remark: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one kind of tensors, where it was, and how many tensors a step has."""

    largest: float
    where: str
    tensors: int


def compare(ours: Side, theirs: Side, steps: int) -> dict[str, Difference]:
    """Differences of loss, gradient, parameter and state over so many steps of both sides. Raises ParityError."""
    results: dict[str, Difference] = {}
    for step in range(steps):
        mine, other = (_record(side, side.step(step)) for side in (ours, theirs))
        for kind, tensors in mine.items():
            now = _difference(kind, step, tensors, other[kind])
            if now.tensors and (kind not in results or now.largest > results[kind].largest):
                results[kind] = now
    return results


def _record(side: Side, loss: Tensor) -> dict[str, list[tuple[str, Tensor]]]:
    """Kind -> named tensors as they are after a step."""
    trained = [(name, p) for name, p in parameters_of(side.trained) if p.requires_grad]
    modules = [m for m in (*side.trained, *side.slow) if isinstance(m, nn.Module)]
    statistics = [
        (f"BatchNorm {number}'s {name}", getattr(part, name))
        for number, part in enumerate(
            part for m in modules for part in m.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)
        )
        for name in ("running_mean", "running_var")
        if getattr(part, name) is not None
    ]
    state = [*parameters_of(side.slow), *statistics, *side.state().items()]
    record = {
        "loss": [("loss", loss)],
        "gradient": [(name, torch.zeros_like(p) if p.grad is None else p.grad) for name, p in trained],
        "parameter": trained,
        "state": state,
    }
    return {kind: [(name, t.detach().flatten().clone()) for name, t in tensors] for kind, tensors in record.items()}


def parameters_of(parts: Iterable[nn.Module | nn.Parameter]) -> Iterator[tuple[str, nn.Parameter]]:
    for number, part in enumerate(parts):
        for name, p in part.named_parameters() if isinstance(part, nn.Module) else [("itself", part)]:
            yield f"{number}.{name}", p


def _difference(kind: str, step: int, ours: list, theirs: list) -> Difference:
    """Of one step. A tensor's norm counts as at least FLOOR of the largest: gradients that are 0 but for rounding are none."""
    shapes = [[tuple(t.shape) for _, t in tensors] for tensors in (ours, theirs)]
    if shapes[0] != shapes[1]:
        unlike = next((i for i, (a, b) in enumerate(zip(*shapes, strict=False)) if a != b), min(map(len, shapes)))
        one, two = (
            f"{side[unlike][0]} {s[unlike]}" if unlike < len(s) else "nothing"
            for side, s in zip((ours, theirs), shapes, strict=True)
        )
        raise ParityError(f"{kind} {unlike} of step {step}: {one} here, {two} there")
    if not theirs:
        return Difference(0.0, "", 0)
    norms = [float(t.double().norm().nan_to_num(0.0)) for _, t in theirs]
    least = FLOOR * max(norms) or 1.0
    each = [
        (float((a.double() - b.double()).norm().nan_to_num(math.inf)) / max(norm, least), name)
        for (name, a), (_, b), norm in zip(ours, theirs, norms, strict=True)
    ]
    largest, name = max(each)
    return Difference(largest, f"{name} of step {step}", len(theirs))


# --- The same weights on both sides ---


@torch.no_grad()
def copy_weights(source: Iterable[nn.Module | nn.Parameter], target: Iterable[nn.Module | nn.Parameter]) -> None:
    """Copies parameters in their order. Raises ParityError where the other side holds others."""
    pairs = list(parameters_of(source)), list(parameters_of(target))
    if [p.numel() for _, p in pairs[0]] != [p.numel() for _, p in pairs[1]]:
        lists = ("\n".join(f"{name} {tuple(p.shape)}" for name, p in side) for side in pairs)
        raise ParityError("other parameters\nhere:\n{}\nthere:\n{}".format(*lists))
    for (_, a), (_, b) in zip(*pairs, strict=True):
        b.copy_(a.view_as(b))


@torch.no_grad()
def shake(*modules: nn.Module, seed: int = 7, scale: float = 0.1) -> None:
    """Moves parameters by noise, so that a teacher is not its student and no bias is 0."""
    generator = torch.Generator().manual_seed(seed)
    for _, p in parameters_of(modules):
        p.add_(
            torch.randn(p.shape, generator=generator, dtype=p.dtype),
            alpha=scale * float(p.std()) + 0.01 if p.numel() > 1 else 0.01,
        )


@contextmanager
def in_double() -> Iterator[None]:
    """New tensors are doubles, and .float(), by which both codes leave half precision, leaves doubles as they are."""
    original, default = torch.Tensor.float, torch.get_default_dtype()
    torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else original(x)
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = original
        torch.set_default_dtype(default)
