"""Assignments to prototypes."""

import math

import torch
from torch import Tensor

from sslctl.losses.exact import cross_entropy_of_other_views, exact


@torch.no_grad()
@exact
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Soft assignments that use all prototypes alike (SwAV, arXiv:2006.09882, eq. 3 and 4; Cuturi 2013).

    scores: (B, K) similarities. Rows and columns of exp(scores / ε) are normalised in turn; every row of the result sums to
    exactly 1, every column to about B / K.
    """
    log_q = scores / epsilon  # (B, K); in logarithms, so that no temperature overflows
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0, keepdim=True)  # prototypes share the batch …
        log_q = log_q - log_q.logsumexp(1, keepdim=True)  # … and each sample is one
    return log_q.exp()


@exact
def swav(scores: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    """Every view predicts the assignments of the others (SwAV, arXiv:2006.09882, eq. 2).

    scores: (V, B, K) similarities of unit embeddings to unit prototypes, the assigned views first; assignments: (T, B, K),
    T ≤ V, from `sinkhorn`. Mean over the T·(V - 1) pairs of different views; no gradient reaches the assignments.
    """
    return cross_entropy_of_other_views(scores / temperature, assignments.detach())


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
