"""Losses: pure functions of already gathered tensors. Computed in fp32 (or float64 when given) whatever the precision.

Inputs are unnormalised unless an argument's name says otherwise. Means over anchors and over symmetric halves.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _unit(z: Tensor) -> Tensor:
    """Rows on the unit sphere, at least in fp32: (B, D) -> (B, D)."""
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)


def _without_autocast(z: Tensor) -> torch.autocast:
    """Keeps the matrix products below out of bf16 and fp16: a temperature of 0.1 multiplies their rounding by ten."""
    return torch.autocast(z.device.type, enabled=False)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy over 2B views (SimCLR, arXiv:2002.05709, eq. 1).

    z1, z2: (B, D), row b two views of one image. Mean over the 2B anchors, 2B - 2 negatives each; the official code adds
    the two halves, which is twice this.
    """
    with _without_autocast(z1):
        z = _unit(torch.cat([z1, z2]))  # (2B, D)
        logits = z @ z.T / temperature  # (2B, 2B)
        logits.fill_diagonal_(float("-inf"))  # no anchor meets itself
        batch = len(z1)
        positive = torch.arange(2 * batch, device=z.device).roll(batch)  # (2B,), the other view
        return F.cross_entropy(logits, positive)


def info_nce(
    query: Tensor, positive: Tensor, negatives: Tensor, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """InfoNCE of queries against one key each and a common set of negatives (MoCo, arXiv:1911.05722, eq. 1).

    query, positive: (B, D). negatives: (K, D). excluded: (B, K) bool, negatives that a query must not meet (its own
    image's keys). Mean over the queries.
    """
    with _without_autocast(query):
        query, positive, negatives = _unit(query), _unit(positive), _unit(negatives)
        own = (query * positive).sum(1, keepdim=True)  # (B, 1)
        others = query @ negatives.T  # (B, K)
        if excluded is not None:
            others = others.masked_fill(excluded, float("-inf"))
        logits = torch.cat([own, others], 1) / temperature  # (B, 1 + K), the positive first
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))
