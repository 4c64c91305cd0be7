"""Errors of predicted pixels, colours and codes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.losses.exact import exact


@exact
def squared_error(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of (prediction - target)² over images and values; (B, …) each.

    weight: of the values, broadcast over (B, …); the mean is then over the weights' sum.
    """
    error = (prediction - target).square()
    if weight is None:
        return error.mean()
    weight = weight.expand_as(error)
    return (error * weight).sum() / weight.sum()


@exact
def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_variance)) from N(0, 1) in each dimension (arXiv:1312.6114, appendix B).

    (B, D) each; returns (B, D), in nats.
    """
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp())


@exact
def soft_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """-Σ weight · target · log softmax(logits), mean over rows (Zhang et al. 2016, arXiv:1603.08511, eq. 2).

    logits, target: (n, Q); weight: (n,), 0 for rows that do not count.
    """
    return (-(target * F.log_softmax(logits, 1)).sum(1) * weight).mean()


@exact
def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor, normalize_target: bool) -> Tensor:
    """Mean squared error of the hidden patches' pixels (MAE, arXiv:2111.06377, section 3).

    prediction, target: (B, L, P); mask: (B, L) bool, True where a patch is hidden. normalize_target: every patch of the target
    gets mean 0 and variance 1 of its own, the unbiased one, as the official code.
    """
    if normalize_target:
        target = normalized_patches(target)
    each = (prediction - target).square().mean(2)  # (B, L)
    return (each * mask).sum() / mask.sum()


@exact
def normalized_patches(patches: Tensor) -> Tensor:
    """(B, L, P) with mean 0 and variance 1 in every patch."""
    variance, mean = torch.var_mean(patches, 2, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()
