"""Losses: pure functions of already gathered tensors. Computed in fp32 (or float64 when given) whatever the precision.

Inputs are unnormalised unless an argument's name says otherwise. Means over anchors and over symmetric halves, except where
a docstring says that a paper's learning rate needs another scale.
"""

from sslctl.losses.clustering import msn, sinkhorn, swav
from sslctl.losses.contrastive import cpc, dcl, info_nce, nnclr, nt_xent, supcon
from sslctl.losses.decorrelation import barlow_twins, koleo, sigreg, vicreg, whitening_mse
from sslctl.losses.distillation import (
    dino,
    gram,
    hidden_patches,
    ibot,
    memory_distillation,
    negative_cosine,
    similarity_distillation,
)
from sslctl.losses.reconstruction import gaussian_kl, masked_mse, normalized_patches, soft_cross_entropy, squared_error

__all__ = [
    "barlow_twins",
    "cpc",
    "dcl",
    "dino",
    "gaussian_kl",
    "gram",
    "hidden_patches",
    "ibot",
    "info_nce",
    "koleo",
    "masked_mse",
    "memory_distillation",
    "msn",
    "negative_cosine",
    "nnclr",
    "normalized_patches",
    "nt_xent",
    "sigreg",
    "similarity_distillation",
    "sinkhorn",
    "soft_cross_entropy",
    "squared_error",
    "supcon",
    "swav",
    "vicreg",
    "whitening_mse",
]
