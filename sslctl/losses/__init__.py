"""Losses: pure functions of already gathered tensors. Computed in fp32 (or float64 when given) whatever the precision.

Inputs are unnormalised unless an argument's name says otherwise. Means over anchors and over symmetric halves, except where
a docstring says that a paper's learning rate needs another scale.
"""

from sslctl.losses.clustering import sinkhorn, swav
from sslctl.losses.contrastive import dcl, info_nce, nnclr, nt_xent, supcon
from sslctl.losses.decorrelation import barlow_twins, sigreg, vicreg, whitening_mse
from sslctl.losses.distillation import dino, negative_cosine, similarity_distillation

__all__ = [
    "barlow_twins",
    "dcl",
    "dino",
    "info_nce",
    "negative_cosine",
    "nnclr",
    "nt_xent",
    "sigreg",
    "similarity_distillation",
    "sinkhorn",
    "supcon",
    "swav",
    "vicreg",
    "whitening_mse",
]
