"""One positive against negatives, in the batch or in a queue."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.losses.exact import exact, unit


@exact
def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy over 2B views (SimCLR, arXiv:2002.05709, eq. 1).

    z1, z2: (B, D), row b two views of one image. Mean over the 2B anchors, 2B - 2 negatives each; the official code adds
    the two halves, which is twice this.
    """
    logits, positive = _logits_of_pairs(z1, z2, temperature)
    return F.cross_entropy(logits, positive)


def _logits_of_pairs(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(2B, 2B) similarities over the temperature, -∞ on the diagonal, and (2B,) where each row's other view is."""
    z = unit(torch.cat([z1, z2]))  # (2B, D)
    logits = z @ z.T / temperature  # (2B, 2B)
    logits.fill_diagonal_(float("-inf"))  # no anchor meets itself
    return logits, torch.arange(len(z), device=z.device).roll(len(z1))


@exact
def info_nce(
    query: Tensor, positive: Tensor, negatives: Tensor, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """InfoNCE of queries against one key each and a common set of negatives (MoCo, arXiv:1911.05722, eq. 1).

    query, positive: (B, D). negatives: (K, D). excluded: (B, K) bool, negatives that a query must not meet (its own
    image's keys). Mean over the queries.
    """
    query, positive, negatives = unit(query), unit(positive), unit(negatives)
    own = (query * positive).sum(1, keepdim=True)  # (B, 1)
    others = query @ negatives.T  # (B, K)
    if excluded is not None:
        others = others.masked_fill(excluded, float("-inf"))
    logits = torch.cat([own, others], 1) / temperature  # (B, 1 + K), the positive first
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


@exact
def dcl(z1: Tensor, z2: Tensor, temperature: float, sigma: float | None = None) -> Tensor:
    """Decoupled contrastive loss: the positive is not in the denominator (Yeh et al. 2022, arXiv:2110.06848, eq. 6).

    z1, z2: (B, D). sigma: weights the positives by 2 - exp(s / σ) / mean exp(s / σ), without gradient (DCLW, section
    3.3). Mean over the 2B anchors, each with 2B - 2 negatives of both views; can be negative.
    """
    logits, positive = _logits_of_pairs(z1, z2, temperature)
    own = logits.gather(1, positive[:, None])[:, 0]  # (2B,) s_p / τ
    others = logits.scatter(1, positive[:, None], float("-inf")).logsumexp(1)  # (2B,)
    if sigma is not None:
        share = (own.detach() * (temperature / sigma)).softmax(0) * len(own)  # exp(s / σ) over its mean
        own = (2 - share) * own
    return (others - own).mean()


@exact
def supcon(z: Tensor, label: Tensor, temperature: float, base_temperature: float = 0.07) -> Tensor:
    """Supervised contrastive loss, the sum over positives outside the logarithm (arXiv:2004.11362, eq. 2, L_out).

    z: (N, D), all views; label: (N,), equal for the views of an image. Times temperature / base_temperature, the scale
    that the learning rates of the official code are for. An anchor without a positive contributes 0.
    """
    z = unit(z)
    logits = z @ z.T / temperature  # (N, N)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = logits - logits.masked_fill(itself, float("-inf")).logsumexp(1, keepdim=True)  # (N, N)
    positives = (label[:, None] == label) & ~itself  # (N, N)
    each = -(log_p * positives).sum(1) / positives.sum(1).clamp(min=1)  # (N,)
    return each.mean() * (temperature / base_temperature)


@exact
def nnclr(p: Tensor, nearest: Tensor, temperature: float) -> Tensor:
    """Predictions against the neighbours of the other view (Dwibedi et al. 2021, arXiv:2104.14548, eq. 3).

    p: (B, D) predictions of one view; nearest: (B, D) neighbours, in a queue, of the other. Each neighbour picks its own
    prediction among the batch's, so the blind value is ln B.
    """
    logits = unit(nearest) @ unit(p).T / temperature  # (B, B)
    return F.cross_entropy(logits, torch.arange(len(p), device=p.device))


@exact
def cpc(prediction: Tensor, candidates: Tensor, own: Tensor) -> Tensor:
    """InfoNCE of predicted patch embeddings by dot products (CPC, arXiv:1807.03748, eq. 4).

    prediction: (n, D); candidates: (m, D), embeddings of patches; own: (n,) int64, which of them each row predicts, the
    others are its negatives. Unnormalised on purpose; gradient reaches the candidates. Mean over rows.
    """
    return F.cross_entropy(prediction @ candidates.T, own)
