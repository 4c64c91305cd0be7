"""BatchNorm over groups of the batch, which MoCo needs (arXiv:1911.05722, section 3.3)."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Grouped(_BatchNorm):
    """Statistics over each of `groups` consecutive parts of the batch; running ones are the groups' mean.

    Stands for the separate BatchNorms of as many devices: with one statistic for the whole batch a query could
    recognise its key by it.
    """

    groups: int = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.groups == 1:
            return super().forward(x)
        if len(x) % self.groups:
            raise ValueError(f"a batch of {len(x)} does not divide into {self.groups} BatchNorm groups")
        self.num_batches_tracked.add_(1)
        parts, means, variances = [], [], []
        for part in x.chunk(self.groups):
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            parts.append(
                nn.functional.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            )
            means.append(mean)
            variances.append(variance)
        with torch.no_grad():
            self.running_mean.copy_(torch.stack(means).mean(0))
            self.running_var.copy_(torch.stack(variances).mean(0))
        return torch.cat(parts)


class GroupedBatchNorm1d(_Grouped, nn.BatchNorm1d):
    """On (B, D)."""


class GroupedBatchNorm2d(_Grouped, nn.BatchNorm2d):
    """On (B, C, H, W)."""


_KINDS = {nn.BatchNorm1d: GroupedBatchNorm1d, nn.BatchNorm2d: GroupedBatchNorm2d}


def group_batchnorm(module: nn.Module, groups: int) -> nn.Module:
    """Makes every BatchNorm inside a module take its statistics in groups. Names and tensors stay as they are.

    Raises ValueError where a BatchNorm is of another library's kind and groups are asked for.
    """
    for child in module.modules():
        if isinstance(child, _Grouped):
            child.groups = groups
        elif isinstance(child, _BatchNorm) and groups > 1:
            if type(child) not in _KINDS:
                raise ValueError(
                    f"BatchNorm groups need torch's own BatchNorm; this backbone has {type(child).__name__}"
                )
            child.__class__, child.groups = _KINDS[type(child)], groups
    return module
