"""The order of the images as a function of (seed, epoch, position)."""

import numpy as np

from sslctl.random import hash_name, mix_int

_ROUNDS = 6


def _mix(x: np.ndarray) -> np.ndarray:
    """Applies SplitMix64's finaliser to uint64, which wraps."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the images at some positions of an epoch's order, without making the whole order.

    A Feistel network over the next even power of two, walked until it lands inside (Black & Rogaway 2002): a bijection
    on 0..size-1 keyed by (seed, epoch). positions: (n,) int64 below size. Returns (n,) int64.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    stream = mix_int(mix_int(seed) ^ mix_int(epoch ^ hash_name("order")))
    keys = [np.uint64(mix_int(stream + number)) for number in range(_ROUNDS)]

    def walk(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & low
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & low)
        return (left << np.uint64(half)) | right

    result = walk(positions.astype(np.uint64))
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = walk(result[outside])
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def batch_indices(step: int, size: int, batch_size: int, seed: int) -> np.ndarray:
    """Returns the images of one step: block [kG, (k+1)G) of its epoch's order, the incomplete last block left out."""
    epoch, position = divmod(step, size // batch_size)
    return permuted(np.arange(position * batch_size, (position + 1) * batch_size), size, seed, epoch)
