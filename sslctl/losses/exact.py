"""What keeps losses in fp32 while the networks around them run in bf16, fp16 or TF32."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

_P = ParamSpec("_P")


def exact(loss: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """A loss whose floating arguments arrive in at least fp32, and whose products stay out of autocast.

    A temperature of 0.1 multiplies the rounding of a product by ten; exp(1 / 0.05) is no fp16 number.
    """

    @wraps(loss)
    def full(*args: _P.args, **keywords: _P.kwargs) -> Tensor:
        tensors = [value for value in (*args, *keywords.values()) if isinstance(value, Tensor)]
        with torch.autocast(tensors[0].device.type, enabled=False):
            return loss(*map(_full, args), **{name: _full(value) for name, value in keywords.items()})

    return full


def _full(value):
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def unit(z: Tensor) -> Tensor:
    """Rows on the unit sphere: (…, D) -> (…, D)."""
    return F.normalize(z, dim=-1)


def cross_entropy_of_other_views(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """logits: (V, B, K), targets: (T, B, K) whose rows sum to 1. Mean over images and the T·(V - 1) pairs of different views.

    weights: (V,), factors of the terms of each view's logits, none without.
    ln Σ exp is taken out of the sum over B and K: one of some million terms near ln K would lose its digits.
    """
    own = logits.logsumexp(-1).mean(1)  # (V,)
    cross = own - torch.einsum("tbk,vbk->tv", targets, logits) / logits.shape[1]  # (T, V)
    itself = torch.eye(*cross.shape, dtype=torch.bool, device=cross.device)  # T of the pairs
    cross = cross if weights is None else cross * weights
    return cross.masked_fill(itself, 0.0).sum() / (cross.numel() - len(cross))
