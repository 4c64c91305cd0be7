"""A GPU that is not there: what a training step launches on it, and where it would wait for it. For tests and scripts.

On torch's fake tensors, which have a shape, a type and a device but no values, a step goes the way that it goes on CUDA; what
is on the CPU is calculated for real. No clock is read: what is counted is the same on every machine. The autograd engine
needs CUDA's driver, so a step's gradients are made up, and the backward pass is looked at on the CPU.
"""

import collections
import contextlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import sslctl

CUDA = torch.device("cuda", 0)
PACKAGE = Path(sslctl.__file__).parent

_cpu_attention = torch.nn.functional.scaled_dot_product_attention
_LAUNCH_NOTHING = {  # other ways to look at the same memory, and memory that is not written to
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach",
    "diagonal", "empty", "empty_like", "empty_strided", "expand", "expand_as", "flatten", "is_pinned",
    "lift_fresh", "narrow", "new_empty", "new_empty_strided", "permute", "record_stream", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unfold", "unsqueeze",
    "view", "view_as",
}  # fmt: skip
_WAIT = {  # what has a shape that only values tell, or looks at them
    "_linalg_check_errors", "_local_scalar_dense", "_unique2", "bincount", "equal", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Counts the operations of a phase, and the places that wait, on a GPU; everywhere: on the CPU too.

    operations: (phase, name) -> how many launch something. waits: (what, "file:line") -> how many.
    """

    def __init__(self, everywhere: bool = False):
        super().__init__()
        self.everywhere, self.phase = everywhere, ""
        self.operations, self.waits = collections.Counter(), collections.Counter()

    def counted(self, phase: str) -> int:
        """Returns the number of a phase's operations."""
        return sum(count for (its, _), count in self.operations.items() if its == phase)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Counts meanwhile for a phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        devices = {tensor.device.type for tensor in _tensors((*args, *kwargs.values()))}
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        on_gpu = "cuda" in devices or target == "cuda"
        if on_gpu or self.everywhere:
            self._note(name, args, kwargs, target)
        if not on_gpu:
            with _disable_current_modes():
                return func(*args, **kwargs)
        return _made_up(func, name, args, kwargs, target)

    def _note(self, name: str, args: tuple, kwargs: dict, target: str | None) -> None:
        if name not in _LAUNCH_NOTHING and not name.startswith("prim::"):
            self.operations[self.phase, name] += _launches(name, args)
        if name in _WAIT or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.waits[name, _place()] += 1
        if name in ("_to_copy", "copy_"):
            source, device = (args[0], target) if name == "_to_copy" else (args[1], args[0].device.type)
            blocks = not kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
            if device and device != source.device.type and (blocks or device == "cpu" or not source.is_pinned()):
                self.waits[f"copy to {device}", _place()] += 1
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            filled = (
                name.startswith("index_put") and args[2].numel() == 1 and len(args[1]) == 1
            )  # no index is made of it
            for index in (index for index in args[1] if index is not None):
                if index.dtype == torch.bool and not filled:
                    self.waits["index by a mask", _place()] += 1
                elif index.device != args[0].device:
                    self.waits["index on the CPU", _place()] += 1


def _launches(name: str, args: tuple) -> int:
    """Returns one; of operations on lists (`_foreach_…`) one for each tensor, unless those beside each other are alike in shape,
    strides and type, which CUDA asks of what it does in one launch."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    kinds = [[(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors] for tensors in lists]
    return len(args[0]) if name.startswith("_foreach_") and any(kind != kinds[0] for kind in kinds) else 1


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _place() -> str:
    """Returns the line of sslctl that is being executed."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
    return f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno}" if frames else "elsewhere"


def _made_up(func, name: str, args: tuple, kwargs: dict, target: str | None) -> Any:
    """Returns what an operation gives on fake tensors; what would be read from the GPU is 1, and every mask is full."""
    if name == "_local_scalar_dense":
        return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
    if name == "equal":
        return False
    if name == "_to_copy" and target == "cpu":
        with _disable_current_modes():
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    if name == "copy_" and args[0].device.type == "cpu":
        return args[0]
    if name in ("_fused_sgd_", "_fused_adagrad_"):  # torch has them for real tensors only
        return None
    if name == "nonzero":
        return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.long, device=CUDA)
    if name == "bincount":
        return torch.empty(kwargs.get("minlength") or args[2], dtype=torch.long, device=CUDA)
    if name in ("index", "index_put", "index_put_", "_unsafe_index"):
        args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
    return func(*args, **kwargs)


def _places(index: Tensor | None) -> list[Tensor | None]:
    """Returns a mask as indices, and other indices as they are."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.empty(index.numel(), dtype=torch.long, device=CUDA) for _ in range(index.ndim)]


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Watch]:
    """Lets tensors be made on CUDA where there is none, and watches what is done with them."""
    watch, fake = Watch(), FakeTensorMode(allow_non_fake_inputs=True)
    changes = [
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "mem_get_info", lambda *_: (1 << 36, 1 << 36)),
        (torch.cuda, "Event", lambda **_: SimpleNamespace(record=lambda: None)),
        (torch.nn.functional, "scaled_dot_product_attention", _attention),
        (Tensor, "pin_memory", _pin),
        (Tensor, "is_pinned", lambda self: getattr(self, "is_pretended_pinned", False)),
    ]
    for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):  # else torch's optimizers go tensor by tensor
        kinds = sys.modules[name]._foreach_supported_types
        changes.append((sys.modules[name], "_foreach_supported_types", [*kinds, FakeTensor]))
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(fake)
        stack.enter_context(watch)
        yield watch


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, *others, **keywords
) -> Tensor:
    """One operation, as CUDA has it: torch would ask the driver whether it may be that."""
    mask, dropout = keywords.get("attn_mask", mask), keywords.get("dropout_p", dropout)
    if query.device.type != "cuda":
        return _cpu_attention(query, key, value, mask, dropout, *others)
    if mask is None and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, True, dropout)[0]


def _pin(self: Tensor) -> Tensor:
    self.is_pretended_pinned = True
    return self


def on_gpu(tensor: Tensor) -> Tensor:
    """Returns a tensor's like on the pretended GPU, in the same memory format."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)


def move(module: nn.Module) -> None:
    """Puts a module's parameters and buffers on the pretended GPU; shared ones stay shared, gradients are made up."""
    moved: dict[int, Tensor] = {}

    def like(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            new = on_gpu(tensor.detach())
            moved[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return moved[id(tensor)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: like(tensor) for name, tensor in tensors.items() if tensor is not None})
