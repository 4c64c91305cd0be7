"""Embeddings that are spread: whose dimensions, or rows, carry different things."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.losses.exact import exact, unit


@exact
def barlow_twins(z1: Tensor, z2: Tensor, lambda_: float) -> Tensor:
    """The cross-correlation of two views, taken to the identity (Zbontar et al. 2021, arXiv:2103.03230, eq. 1).

    z1, z2: (B, D). Each dimension is normalised over the batch (biased variance, as BatchNorm). Sum over all entries.
    """
    c = _standardized(z1).T @ _standardized(z2) / len(z1)  # (D, D)
    on = (1 - c.diagonal()).square().sum()
    off = c.square().sum() - c.diagonal().square().sum()
    return on + lambda_ * off


def _standardized(z: Tensor) -> Tensor:
    """Mean 0, variance 1 over the batch, with BatchNorm's ε."""
    return F.batch_norm(z, None, None, training=True, eps=1e-5)


@exact
def vicreg(z1: Tensor, z2: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """Views alike, dimensions spread and uncorrelated (Bardes et al. 2022, arXiv:2105.04906, eq. 6).

    z1, z2: (B, D). As the official code, not as the paper: the distance is a mean over dimensions, not a sum, and the two
    variance terms are averaged, not added; the paper's weights 25, 25, 1 are for this.
    """
    spread = [F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (z1, z2)]
    return (
        invariance * F.mse_loss(z1, z2)
        + variance * (spread[0] + spread[1]) / 2
        + covariance * (_off_diagonal(z1) + _off_diagonal(z2))
    )


def _off_diagonal(z: Tensor) -> Tensor:
    """Σ over i ≠ j of Cov_ij², over D."""
    z = z - z.mean(0)
    cov = z.T @ z / (len(z) - 1)  # (D, D)
    return (cov.square().sum() - cov.diagonal().square().sum()) / z.shape[1]


@exact
def whitening_mse(views: Tensor, parts: Tensor) -> Tensor:
    """Distance of whitened views (W-MSE, arXiv:2007.06346, eq. 3 and 6).

    views: (V, B, D). parts: (P, B) int64, P permutations of the batch split in len = B / size pieces: (P, pieces, size);
    every view is whitened in each piece, which must hold more rows than D. Mean of 2 - 2 cos over pairs of views; both
    sides get a gradient. Raises ValueError for pieces too small to whiten; NaN, at which a run stops, where the rows of one
    have collapsed and its covariance is singular.
    """
    pairs = [(i, j) for i in range(len(views)) for j in range(i + 1, len(views))]
    losses = []
    for part in parts.flatten(0, 1):  # (size,)
        white = torch.stack([_whitened(view[part]) for view in views])  # (V, size, D)
        losses += [2 - 2 * (unit(white[i]) * unit(white[j])).sum(1).mean() for i, j in pairs]
    return torch.stack(losses).mean()


def _whitened(z: Tensor) -> Tensor:
    """(n, D) -> mean 0, covariance 1, by the inverse Cholesky factor of the covariance; NaN where that is singular."""
    if len(z) <= z.shape[1]:
        raise ValueError(
            f"{len(z)} embeddings of {z.shape[1]} dimensions cannot be whitened: their covariance is singular"
        )
    z = z - z.mean(0)
    factor, failed = torch.linalg.cholesky_ex(z.T @ z / (len(z) - 1))  # (D, D), ()
    factor = torch.where(failed > 0, torch.nan, factor)
    return torch.linalg.solve_triangular(factor, z.T, upper=False).T


_KNOTS, _END = 17, 3.0


@exact
def sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """How far embeddings are from an isotropic Gaussian (SIGReg of LeJEPA, arXiv:2511.08544, section 4).

    z: (B, D); directions: (D, M) columns, normalised here. Epps and Pulley's statistic of each projection: B times the
    integral over t of |φ(t) - exp(-t²/2)|² exp(-t²/2), by trapezoids on 17 knots of [0, 3], doubled. Mean over directions;
    about 1.05 for Gaussian data, whatever B.
    """
    t = torch.linspace(0, _END, _KNOTS, device=z.device, dtype=z.dtype)  # (T,)
    gauss = torch.exp(-t.square() / 2)
    weights = torch.full_like(t, 2 * _END / (_KNOTS - 1))
    weights[:: _KNOTS - 1] = _END / (_KNOTS - 1)  # the first and the last
    angles = (z @ F.normalize(directions, dim=0))[:, :, None] * t  # (B, M, T)
    gap = (angles.cos().mean(0) - gauss).square() + angles.sin().mean(0).square()  # (M, T)
    return len(z) * (gap * gauss * weights).sum(1).mean()


@exact
def koleo(z: Tensor) -> Tensor:
    """Keeps embeddings apart from their nearest neighbours (Sablayrolles et al. 2019, arXiv:1806.03198, eq. 3).

    z: (B, D). Minus the mean logarithm of each unit row's distance to the nearest other one, with 1e-8 added to every
    coordinate and to the distance, as the official code of DINOv2.
    """
    z = unit(z)
    with torch.no_grad():
        nearest = (z @ z.T).fill_diagonal_(-1).argmax(1)  # (B,)
    return -(F.pairwise_distance(z, z[nearest], eps=1e-8) + 1e-8).log().mean()
