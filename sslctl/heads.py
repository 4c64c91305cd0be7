"""Heads: what stands on a backbone during pretraining and is thrown away afterwards."""

from itertools import pairwise

from torch import nn


def mlp(
    in_dim: int, hidden_dim: int, out_dim: int, layers: int, *, norm: bool, last_norm: bool = False
) -> nn.Sequential:
    """Linear (-BatchNorm)-ReLU, repeated, and a last Linear (-BatchNorm). (B, in_dim) -> (B, out_dim).

    layers: number of Linears; 1 is a linear head. norm: BatchNorm after every Linear but the last.
    last_norm: BatchNorm without shift after the last one. A Linear in front of a BatchNorm has no bias.
    """
    dims = [in_dim] + [hidden_dim] * (layers - 1) + [out_dim]
    modules: list[nn.Module] = []
    for number, (d_in, d_out) in enumerate(pairwise(dims), start=1):
        last = number == layers
        normalised = last_norm if last else norm
        modules.append(nn.Linear(d_in, d_out, bias=not normalised))
        if normalised:
            modules.append(nn.BatchNorm1d(d_out))
            if last:
                modules[-1].bias.requires_grad_(False)  # scale but no shift, as SimCLR's code
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)
