"""How far a share of images may lie from the true one by chance: Wilson's interval (1927)."""

import math

UNKNOWN_NOISE = 0.02  # of accuracies on a few hundred images, where their number is not known


def wilson_noise(one: float, other: float, images: int | None) -> float:
    """Returns by how much two shares of so many images may differ by chance: from half the widths of their 95 % intervals
    (Wilson 1927), as if each were of images of its own."""
    if not images:
        return UNKNOWN_NOISE
    widths = [high - low for low, high in (wilson(share, images) for share in (one, other))]
    return math.hypot(*widths) / 2


def wilson(share: float, count: int) -> tuple[float, float]:
    """Returns (low, high): the 95 % interval of a share of so many (Wilson 1927)."""
    z2 = 1.959964**2
    middle, half = share + z2 / (2 * count), (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5
    return (middle - half) / (1 + z2 / count), (middle + half) / (1 + z2 / count)
