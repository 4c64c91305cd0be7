"""Which rows of the training split a probe has labels of, and which of these are held out to choose its settings by."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.data.held_out import choose_groups
from sslctl.data.sampler import permuted
from sslctl.errors import InputError
from sslctl.evaluation.features import Features

_FOLDED = 20  # rows a class up to which folds are held out, not one part


def too_few(data: Features) -> bool:
    """Tells whether no part of few labels can be held out: a class has one alone, and the rows are not enough for a share.

    Of groups: whether there are fewer than two of them.
    """
    if data.groups is not None:
        return len(data.groups.unique()) < 2
    if data.targets is not None:
        return len(data.targets) < 2
    counts = torch.bincount(data.labels)
    return len(data.labels) <= _FOLDED * data.num_classes and int(counts[counts > 0].min()) < 2


def folds(data: Features, share: float, seed: int) -> list[Tensor]:
    """Returns masks (N,) of held-out rows: five stratified folds for few labels, else one part of the given share.

    Of groups: one part of whole groups, a fifth for few labels. Of several labels an image: one part in any case.
    """
    n = len(data.labels)
    few = n <= _FOLDED * data.num_classes
    if data.groups is not None:
        return [_part_of_groups(data, 0.2 if few else share, seed)]
    order = torch.from_numpy(permuted(np.arange(n), n, seed, epoch=-1))
    if few and data.targets is not None:
        few, share = False, 0.2
    if not few:
        mask = torch.zeros(n, dtype=torch.bool)
        mask[order[: max(1, round(share * n))]] = True
        return [mask]
    counts = torch.bincount(data.labels, minlength=data.num_classes)
    fewest = int(counts[counts > 0].min())
    if fewest < 2:
        raise ValueError("a class has one row alone: no fold can be held out (too_few)")
    fold = torch.empty(n, dtype=torch.long)
    for label in range(data.num_classes):
        rows = order[data.labels[order] == label]
        fold[rows] = torch.arange(len(rows)) % min(5, fewest)
    return [fold == f for f in range(min(5, fewest))]


def _part_of_groups(data: Features, share: float, seed: int) -> Tensor:
    """Returns the mask (N,) of whole groups that are about this share of the rows and of each class."""
    groups = data.groups.unique(return_inverse=True)[1].numpy()
    order = permuted(np.arange(groups.max() + 1), int(groups.max()) + 1, seed, epoch=-1)
    targets = data.targets if data.targets is not None else F.one_hot(data.labels, data.num_classes)
    part = torch.from_numpy(choose_groups(groups, [row.nonzero()[0] for row in targets.numpy()], order, share))
    if not part.any():  # each group alone has a class: any of them
        part = torch.from_numpy(groups == order[0])
    return part


def draw_labels(labels: Tensor, amount: float, draw: int, targets: Tensor | None = None) -> Tensor:
    """Returns the rows (n,) of a stratified draw: `amount` a class when it is 1 or more, else that share of each class.

    targets: (N, C) bool, where an image may have several labels. Images are then gone through in the drawn order, and one is
    taken where it has a label of which there are too few yet, so that a label may have more; none at all counts as one.
    """
    n = len(labels)
    order = torch.from_numpy(permuted(np.arange(n), n, draw, epoch=-2))
    if targets is not None:
        return _draw_several(targets, amount, order)
    rows = []
    for label in labels.unique():
        own = order[labels[order] == label]
        take = round(amount) if amount >= 1 else max(1, round(amount * len(own)))
        if take > len(own):
            raise InputError(f"labels={amount:g}: class {label} has only {len(own)} images")
        rows.append(own[:take])
    return torch.cat(rows).sort().values


def _draw_several(targets: Tensor, amount: float, order: Tensor) -> Tensor:
    own = torch.cat([targets, ~targets.any(1, keepdim=True)], 1).long()  # (N, C + 1)
    counts = own.sum(0)
    wanted = torch.full_like(counts, round(amount)) if amount >= 1 else (counts * amount).round().long().clamp(min=1)
    few = ((wanted > counts) & (counts > 0))[:-1].nonzero()[:, 0].tolist()
    if few:
        raise InputError(f"labels={amount:g}: class {few[0]} has only {int(counts[few[0]])} images")
    rows = []
    for row in order.tolist():
        if ((own[row] > 0) & (wanted > 0)).any():
            wanted -= own[row]
            rows.append(row)
    return torch.tensor(rows).sort().values
