"""Which images are held out where nobody made a test split: a fixed fifth, with images of every class, no group in two parts."""

from collections.abc import Sequence

import numpy as np

from sslctl.data.listing import name_hash

_FIFTH = 0.2


def held_out_names(names: Sequence[str], classes: Sequence[Sequence[int]]) -> np.ndarray:
    """Tells which images (N,) a test split holds: the fifth that the hash of their names draws, so that a growing set moves none.

    classes: those of each image. Where a class of two images or more would have none held out, that of the least hash is; where
    it would have none left to train on, that of the greatest stays.
    """
    hashes = np.array([name_hash(name) for name in names], np.int64)
    held_out = hashes % 5 == 0
    rows_of: dict[int, list[int]] = {}
    for row, own in enumerate(classes):
        for number in own:
            rows_of.setdefault(number, []).append(row)
    for _, rows in sorted(rows_of.items()):
        by_hash = sorted(rows, key=lambda row: (hashes[row], names[row]))
        if held_out[rows].all():
            held_out[by_hash[-1]] = False
        elif not held_out[rows].any() and len(rows) > 1:
            spare = (row for row in by_hash if all((~held_out[rows_of[number]]).sum() > 1 for number in classes[row]))
            held_out[list(spare)[:1]] = True
    return held_out


def held_out_groups(groups: Sequence[str], classes: Sequence[Sequence[int]]) -> np.ndarray:
    """Tells which images (N,) a test split holds: whole groups, in the order of their names' hashes, to a fifth of each class."""
    names, own = np.unique(np.asarray(groups, object).astype(str), return_inverse=True)
    order = np.array(sorted(range(len(names)), key=lambda number: (name_hash(names[number]), names[number])))
    return choose_groups(own, classes, order, _FIFTH)


def choose_groups(
    groups: np.ndarray, classes: Sequence[Sequence[int]] | np.ndarray, order: np.ndarray, share: float
) -> np.ndarray:
    """Tells which images (N,) are of groups that together come nearest to a share of each class, one group after the other.

    groups: (N,) numbers from 0. classes: those of each image. order: of the groups, in which each is taken where that brings the
    shares nearer and leaves no class without an image. One is taken at least, unless each alone has all images of a class.
    """
    count = int(groups.max()) + 1
    largest = max((number for own in classes for number in own), default=-1) + 1
    images = np.zeros((count, largest + 1))  # of each class in a group and, in the last column, all
    np.add.at(images[:, -1], groups, 1)
    for group, own in zip(groups, classes, strict=True):
        images[group, list(own)] += 1
    images = images[:, images.sum(0) > 0]
    total, inside = images.sum(0), np.zeros(images.shape[1])
    part = np.zeros(count, bool)
    for group in order:
        together = inside + images[group]
        nearer = ((together / total - share) ** 2).sum() < ((inside / total - share) ** 2).sum()
        if nearer and (together < total).all():
            inside, part[group] = together, True
    spare = [group for group in order if (images[group] < total).all()]
    if not part.any() and spare:  # each is more than twice the share
        part[min(spare, key=lambda group: images[group].sum())] = True
    return part[groups]
