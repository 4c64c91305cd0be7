"""Assignments to prototypes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sslctl.losses.exact import cross_entropy_of_other_views, exact


@torch.no_grad()
@exact
def sinkhorn(
    scores: Tensor, epsilon: float, iterations: int, gather: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Soft assignments that use all prototypes alike (SwAV, arXiv:2006.09882, eq. 3 and 4; Cuturi 2013).

    scores: (B, K) similarities. Rows and columns of exp(scores / ε) are normalised in turn; every row of the result sums to
    exactly 1, every column to about B / K. gather: where scores are a process's own rows, of any number, what puts those
    of all processes together, (1, K) -> (processes, K): the prototypes are then shared by the global batch.
    """
    log_q = scores / epsilon  # (B, K); in logarithms, so that no temperature overflows
    for _ in range(iterations):
        shares = log_q.logsumexp(0, keepdim=True)  # (1, K)
        shares = shares if gather is None else gather(shares).logsumexp(0, keepdim=True)
        log_q = log_q - shares  # prototypes share the batch …
        log_q = log_q - log_q.logsumexp(1, keepdim=True)  # … and each sample is one
    return log_q.exp()


@exact
def swav(scores: Tensor, assignments: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """Every view predicts the assignments of the others (SwAV, arXiv:2006.09882, eq. 2).

    scores: (V, B, K) similarities to prototypes, the assigned views first; assignments: (T, B, K), T ≤ V, from `sinkhorn`.
    weights: (V,), what the pairs of each view count; 1 without. Mean over the T·(V - 1) pairs of different views, whatever
    they count; no gradient reaches the assignments.
    """
    return cross_entropy_of_other_views(scores / temperature, assignments.detach(), weights)


@exact
def msn(scores: Tensor, targets: Tensor, temperature: float, entropy_weight: float) -> Tensor:
    """Masked views predict the whole view's prototypes, and all prototypes are used (MSN, arXiv:2204.07141, eq. 1).

    scores: (V, B, K) cosines of anchors and prototypes; targets: (B, K) probabilities. Mean cross entropy, plus
    entropy_weight times what the mean prediction's entropy lacks of ln K.
    """
    log_p = (scores / temperature).log_softmax(-1)  # (V, B, K)
    cross = -(targets.detach() * log_p).sum(-1).mean()
    entropy = torch.special.entr(log_p.exp().mean((0, 1))).sum()
    return cross + entropy_weight * (math.log(scores.shape[-1]) - entropy)
