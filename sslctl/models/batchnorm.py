"""BatchNorm over groups of the global batch: MoCo's separate devices, or all processes as one."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslctl import distributed


class _Grouped(_BatchNorm):
    """Statistics over each of `groups` consecutive parts of the global batch; running ones are the groups' mean.

    Several groups stand for the separate BatchNorms of as many devices (MoCo, arXiv:1911.05722, section 3.3): with one
    statistic for the whole batch a query could recognise its key by it. One group is the plain BatchNorm, over all
    processes. A process holds whole groups, or a group is shared by some of them.
    """

    groups: int = 1

    def forward(self, x: Tensor) -> Tensor:
        processes = distributed.effective_world_size()
        if not self.training or (self.groups == 1 and processes == 1):
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        if self.groups % processes == 0:
            return self._finish(self._apart(x, self.groups // processes))
        if processes % self.groups:
            raise ValueError(
                f"{self.groups} BatchNorm groups do not divide among {processes} processes, nor they into these"
            )
        return self._finish(self._together(x, processes // self.groups))

    def _finish(self, x: Tensor) -> Tensor:
        """Does what the same layer does after normalising: nothing in torch's own."""
        return x

    def _factor(self) -> float:
        """Returns the share of the running statistics that a batch replaces."""
        return 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum

    def _apart(self, x: Tensor, groups: int) -> Tensor:
        """Normalises so many whole groups that this process holds."""
        if len(x) % groups:
            raise ValueError(f"a batch of {len(x)} does not divide into {groups} BatchNorm groups")
        channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        # The groups stand side by side as the channels of one BatchNorm: as many operations for any number of groups.
        mean, variance = torch.cat([self.running_mean] * groups + [self.running_var] * groups).chunk(2)
        weight, bias = (None if p is None else p.repeat(groups) for p in (self.weight, self.bias))
        y = nn.functional.batch_norm(
            _side_by_side(x, groups, channels_last), mean, variance, weight, bias, True, self._factor(), self.eps
        )
        torch.mean(mean.view(groups, -1), 0, out=self.running_mean)
        torch.mean(variance.view(groups, -1), 0, out=self.running_var)
        return _below_each_other(y, groups, channels_last)

    def _together(self, x: Tensor, processes: int) -> Tensor:
        """Normalises this process's part of a group that so many processes share."""
        first = distributed.rank() // processes * processes
        y, mean, variance = _Synchronized.apply(x, self.eps, slice(first, first + processes))
        count = x.numel() // x.shape[1] * processes
        self.running_mean.lerp_(mean, self._factor())
        self.running_var.lerp_(variance * (count / (count - 1)), self._factor())
        if self.affine:
            shape = [1, -1] + [1] * (x.ndim - 2)
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class _Synchronized(torch.autograd.Function):
    """x -> (x - mean) / √(variance + eps) over the rows that some processes hold, one message each way.

    torch's own SyncBatchNorm refuses tensors on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, eps: float, members: slice) -> tuple[Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        x = x.float()
        variance, mean = torch.var_mean(x, dims, correction=0)  # (C,)
        each_process = distributed.gather(torch.stack([mean, variance])[None])[members]  # (processes, 2, C)
        mean = each_process[:, 0].mean(0)
        variance = (each_process[:, 1] + (each_process[:, 0] - mean) ** 2).mean(0)
        scale = torch.rsqrt(variance + eps)
        y = (x - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(y, scale)
        ctx.members, ctx.dims, ctx.shape = members, dims, shape
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor, None, None]:
        y, scale = ctx.saved_tensors
        sums = torch.stack([gradient.mean(ctx.dims), (gradient * y).mean(ctx.dims)])[None]  # (1, 2, C)
        means = distributed.gather(sums)[ctx.members].mean(0)  # (2, C)
        mean, slope = (m.view(ctx.shape) for m in means)
        return (gradient - mean - y * slope) * scale.view(ctx.shape), None, None


def _side_by_side(x: Tensor, groups: int, channels_last: bool) -> Tensor:
    """(groups · n, C, …) -> (n, groups · C, …) in a memory format."""
    if not channels_last:
        return x.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
    x = x.permute(0, 2, 3, 1).unflatten(0, (groups, -1))  # (groups, n, H, W, C)
    return x.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)


def _below_each_other(x: Tensor, groups: int, channels_last: bool) -> Tensor:
    """Undoes `_side_by_side`."""
    if not channels_last:
        return x.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    x = x.permute(0, 2, 3, 1).unflatten(3, (groups, -1))  # (n, H, W, groups, C)
    x = x.permute(3, 0, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)  # groups of one image come in another order


class GroupedBatchNorm1d(_Grouped, nn.BatchNorm1d):
    """On (B, D)."""


class GroupedBatchNorm2d(_Grouped, nn.BatchNorm2d):
    """On (B, C, H, W)."""


_KINDS = {nn.BatchNorm1d: GroupedBatchNorm1d, nn.BatchNorm2d: GroupedBatchNorm2d}


@functools.cache
def _grouped_kind(kind: type[nn.Module]) -> type[_Grouped] | None:
    """Returns the class that takes a BatchNorm's place: of torch's own ones and of timm's with an activation in it; else None."""
    if not kind.__module__.startswith("timm."):
        return _KINDS.get(kind)
    from timm.layers import BatchNormAct2d  # a network that has one has imported timm

    class GroupedBatchNormAct2d(_Grouped, BatchNormAct2d):
        """On (B, C, H, W), then timm's dropping and activation."""

        def _finish(self, x: Tensor) -> Tensor:
            return self.act(self.drop(x))

    return GroupedBatchNormAct2d if kind is BatchNormAct2d else None


def group_batchnorm(module: nn.Module, groups: int) -> nn.Module:
    """Makes every BatchNorm inside a module take its statistics in groups. Names and tensors stay as they are.

    Raises ValueError where a BatchNorm is of another library's kind and plain ones would not do.
    """
    for child in module.modules():
        if isinstance(child, _Grouped):
            child.groups = groups
        elif isinstance(child, _BatchNorm) and (groups > 1 or distributed.world_size() > 1):
            grouped = _grouped_kind(type(child))
            if grouped is None:
                raise ValueError(
                    "BatchNorm groups and several processes need torch's own BatchNorm, or timm's BatchNormAct2d; this"
                    f" backbone has {type(child).__name__}"
                )
            child.__class__, child.groups = grouped, groups
    return module


def synchronize_batchnorm(module: nn.Module) -> None:
    """Makes, with several processes, every BatchNorm that is in no groups yet one over all of them."""
    for child in module.modules():
        if isinstance(child, _BatchNorm) and not isinstance(child, _Grouped):
            group_batchnorm(child, 1)


def names_of_norms(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the BatchNorms inside a module."""
    return tuple(name for name, child in module.named_modules() if isinstance(child, _BatchNorm))


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Returns the running means and variances inside a module."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.running_mean is not None]
    return [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]


def separate_statistics(module: nn.Module) -> list[Tensor]:
    """Returns the running means and variances that a step with several processes leaves different in each."""
    norms = [child for child in module.modules() if isinstance(child, _Grouped) and child.training and child.groups > 1]
    return [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]


@contextlib.contextmanager
def without_updates(module: nn.Module) -> Iterator[None]:
    """Lets the BatchNorms inside a module count in copies, while it normalises by its batches as ever: what they hold stays."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.training]
    held = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in held:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in held:
            setattr(norm, name, buffer)


@contextlib.contextmanager
def calibrating(module: nn.Module) -> Iterator[None]:
    """Begins running means and variances anew: they become the mean of the batches that pass meanwhile; where none do they stay.

    Those of untrained weights are 0 and 1 until then, which are the statistics of no images. Those of a backbone's frozen
    parts stay.
    """
    frozen = {
        id(child)
        for part in module.modules()
        for name in getattr(part, "frozen_modules", ())
        for child in part.network.get_submodule(name).modules()
    }
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.running_mean is not None]
    norms = [norm for norm in norms if id(norm) not in frozen]
    before = [(norm.momentum, norm.training, [buffer.clone() for buffer in norm.buffers()]) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain mean
        norm.train()
    try:
        yield
    finally:
        for norm, (momentum, training, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)
            if not norm.num_batches_tracked:
                torch._foreach_copy_(list(norm.buffers()), buffers)


def takes_batch_statistics(module: nn.Module) -> bool:
    """Says whether a BatchNorm inside normalises by the batch it is given, and not by its running statistics."""
    return any(isinstance(child, _BatchNorm) and child.training for child in module.modules())
