"""What features look like without labels: functions of a matrix Z (N, D), calculated in double precision."""

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 1024  # rows compared with all others at a time
DELTA = 1e-4  # on the diagonal of LiDAR's covariance within images
_FIRST, _LAST = 11, 100  # ranks of the eigenvalues that α-ReQ fits


def rankme(z: Tensor) -> float:
    """How many directions the features use: exp of the entropy of their singular values, not centred.

    z: (N, D); N of 25,600 in the paper. Between 1 and min(N, D); compare runs of one method.
    RankMe (Garrido et al. 2023, arXiv:2210.02885, eq. 1).
    """
    return effective_rank(_squared_singular_values(z.double()).sqrt())


def effective_rank(values: Tensor) -> float:
    """exp(-Σ p ln p) with p = values / their sum + 1e-7. values: (K,), none negative."""
    p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + 1e-7
    return torch.special.entr(p).sum().exp().item()


def alpha_req(z: Tensor) -> float | None:
    """The exponent α with which the eigenvalues of the covariance fall, λ_j ∝ j^-α. z: (N, D). Near 1 is good.

    None where fewer than three of the fitted eigenvalues are more than rounding. α-ReQ (Agrawal et al. 2022).
    """
    z = z.double()
    return decay_exponent(_squared_singular_values(z - z.mean(0)) / (len(z) - 1))


def decay_exponent(eigenvalues: Tensor) -> float | None:
    """α of descending eigenvalues (D,): weighted least squares on log λ over log j, weights 1/j, j = 11 … 100."""
    largest = eigenvalues[0]
    fitted = eigenvalues[_FIRST - 1 : _LAST]
    fitted = fitted[fitted > 1e-12 * largest]
    if len(fitted) < 3:
        return None
    j = torch.arange(_FIRST, _FIRST + len(fitted), dtype=torch.float64)
    x, y, weight = j.log(), fitted.double().log(), 1 / j
    x = x - (weight * x).sum() / weight.sum()
    return (-(weight * x * y).sum() / (weight * x * x).sum()).item()


def lidar(z: Tensor, delta: float = DELTA) -> float:
    """How many directions tell images apart by more than their views vary. z: (n, q, D), q views of each of n images.

    The effective rank of the eigenvalues of Σ_w^-½ Σ_b Σ_w^-½, Σ_w with delta on its diagonal; at most min(D, n - 1).
    LiDAR (Thilak et al. 2023, arXiv:2312.04000, section 4).
    """
    z = z.double()
    n, q, dim = z.shape
    centres = z.mean(1)  # (n, D)
    apart, within = centres - centres.mean(0), (z - centres[:, None]).reshape(-1, dim)
    between = apart.T @ apart / n
    noise = within.T @ within / (n * q) + delta * torch.eye(dim, dtype=z.dtype)
    factor = torch.linalg.cholesky(noise)  # Σ_w = L Lᵀ: L⁻¹ Σ_b L⁻ᵀ has the eigenvalues of Σ_w^-½ Σ_b Σ_w^-½
    half = torch.linalg.solve_triangular(factor, between, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
    return effective_rank(torch.linalg.eigvalsh((whitened + whitened.T) / 2).clamp(min=0))


def feature_std(z: Tensor) -> float:
    """Mean over dimensions of the standard deviation of unit rows. z: (N, D). 1/√D: spread evenly; 0: collapsed.

    SimSiam, arXiv:2011.10566, section 4.1. What training logs under this name is √D times as much.
    """
    return F.normalize(z.double(), dim=1).std(0).mean().item()


def alignment(x: Tensor, y: Tensor, power: float = 2) -> float:
    """Mean ‖x̄ - ȳ‖^power of two views of the same images, unit rows (Wang & Isola 2020, arXiv:2005.10242). (N, D) each."""
    x, y = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)
    return (x - y).norm(dim=1).pow(power).mean().item()


def uniformity(z: Tensor, t: float = 2) -> float:
    """log of the mean over pairs i < j of exp(-t ‖z̄_i - z̄_j‖²), unit rows (Wang & Isola 2020). z: (N, D), N ≥ 2.

    0: all in one place; -2 t at the least for two points; near -4 on a sphere of many dimensions, t = 2.
    """
    z = F.normalize(z.double(), dim=1)
    total = z.new_zeros(())
    for start in range(0, len(z), _BLOCK):
        rows = z[start : start + _BLOCK]
        squared = (2 - 2 * rows @ z[start:].T).clamp_(min=0)  # (b, N - start)
        total += squared.mul_(-t).exp_().triu_(diagonal=1).sum()
    return (total / (len(z) * (len(z) - 1) / 2)).log().item()


def _squared_singular_values(z: Tensor) -> Tensor:
    """(min(N, D),) descending: the eigenvalues of the smaller of ZᵀZ and ZZᵀ."""
    gram = z.T @ z if z.shape[1] <= len(z) else z @ z.T
    return torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)
