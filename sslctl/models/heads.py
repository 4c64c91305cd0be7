"""Heads: what stands on a backbone during pretraining and is thrown away afterwards."""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.losses.exact import exact, unit

Length = Literal["unit", "learnt", "free"]  # of prototypes


def mlp(
    in_dim: int,
    hidden_dim: int,
    out_dim: int,
    layers: int,
    *,
    norm: bool,
    last_norm: str = "",
    hidden_bias: bool = False,
    last_bias: bool = True,
    activation: str = "relu",
) -> nn.Sequential:
    """Linear (-BatchNorm)-activation, repeated, and a last Linear (-BatchNorm). (B, in_dim) -> (B, out_dim).

    layers: number of Linears; 1 is a linear head. norm: BatchNorm after every Linear but the last. last_norm: "" for none
    after the last one, "affine", "scale" (no shift) or "plain" (neither). hidden_bias: Linears in front of a hidden
    BatchNorm keep their bias, as some papers' codes; one in front of the last BatchNorm has none. activation: relu, gelu.
    """
    dims = [in_dim] + [hidden_dim] * (layers - 1) + [out_dim]
    modules: list[nn.Module] = []
    for number, (d_in, d_out) in enumerate(pairwise(dims), start=1):
        if number < layers:
            modules.append(nn.Linear(d_in, d_out, bias=hidden_bias or not norm))
            modules += [nn.BatchNorm1d(d_out)] if norm else []
            modules.append({"relu": nn.ReLU(inplace=True), "gelu": nn.GELU()}[activation])
        else:
            modules.append(nn.Linear(d_in, d_out, bias=last_bias and not last_norm))
            modules += [_last_batchnorm(last_norm, d_out)] if last_norm else []
    return nn.Sequential(*modules)


def _last_batchnorm(kind: str, dim: int) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(dim, affine={"affine": True, "scale": True, "plain": False}[kind])
    if kind == "scale":
        norm.bias.requires_grad_(False)
    return norm


def prototype_head(
    in_dim: int,
    hidden_dim: int,
    bottleneck_dim: int,
    prototypes: int,
    *,
    layers: int = 3,
    norm: bool,
    length: Length = "unit",
) -> nn.Sequential:
    """DINO's head: Linears with GELU, then similarities of unit embeddings to unit prototypes. (…, in_dim) -> (…, K).

    layers: of the embedding. norm: BatchNorm after the hidden Linears (for ResNets); takes (B, in_dim) only. length: of
    the prototypes. The Linears begin as torch's do; the official code draws them with a standard deviation of 0.02.
    """
    embedding = mlp(in_dim, hidden_dim, bottleneck_dim, layers, norm=norm, activation="gelu", hidden_bias=True)
    return nn.Sequential(embedding, Prototypes(bottleneck_dim, prototypes, length))


class Prototypes(nn.Module):
    """Similarities of unit embeddings to learnt directions: (…, D) -> (…, K) in fp32, whatever the precision around them.

    Without bias. length: of the directions. "unit": both sides are made of unit length, so the weights' gradient is along
    the sphere, as with DINO's weight normalisation. "learnt": as that, times a length of each direction's own, 1 at first
    (DINOv2's weight normalisation). "free": the weights as they are, of unit length at first (DINOv3's plain layer).
    """

    def __init__(self, dim: int, count: int, length: Length = "unit"):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, dim), dim=1))  # (K, D)
        self.lengths = nn.Parameter(torch.ones(count, 1)) if length == "learnt" else None
        self.free = length == "free"

    @exact
    def forward(self, z: Tensor) -> Tensor:
        directions = self.weight if self.free else unit(self.weight)
        return F.linear(unit(z), directions if self.lengths is None else directions * self.lengths)

    @torch.no_grad()
    def normalize_(self) -> None:
        """Puts the weights themselves on the unit sphere."""
        self.weight.copy_(F.normalize(self.weight, dim=1))
