"""Random numbers that depend on (seed, epoch, sample index, name) and on nothing else.

A counter-based hash (the finaliser of SplitMix64; Steele, Lea & Flood 2014) in wrapping int64 arithmetic. There is no
state: the parameters of image i's views in epoch e are the same for every batch size, worker count, process count and
resume point, on every device.
"""

import hashlib
import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Returns the int64 with the same 64 bits as `value`."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mix_int(value: int) -> int:
    """SplitMix64's finaliser on one Python integer; returns 0 <= x < 2**64."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * _MULTIPLY_1) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLY_2) & _MASK
    return value ^ (value >> 31)


def _mix(x: Tensor) -> Tensor:
    """Applies `mix_int` to an int64 tensor of any shape; int64 products wrap, right shifts are made logical by masks."""
    x = x + _signed(_GAMMA)
    x = (x ^ ((x >> 30) & (_MASK >> 30))) * _signed(_MULTIPLY_1)
    x = (x ^ ((x >> 27) & (_MASK >> 27))) * _signed(_MULTIPLY_2)
    return x ^ ((x >> 31) & (_MASK >> 31))


def hash_name(name: str) -> int:
    """Returns 64 bits of a name, the same in every process (Python's own hash is not)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class Key:
    """The random numbers of one batch: row b depends on (seed, epoch, index[b], name) only.

    index: (B,) int64 sample indices; its device is where the numbers are made.
    """

    def __init__(self, seed: int, epoch: int, index: Tensor):
        self.seed, self.epoch, self.index = seed, epoch, index
        self._stream = mix_int(mix_int(seed) ^ mix_int(epoch ^ hash_name("epoch")))

    def bits(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) int64, all 64 bits random."""
        count = 1
        for size in shape:
            count *= size
        base = _mix(self.index ^ _signed(mix_int(self._stream ^ hash_name(name))))  # (B,)
        counter = torch.arange(1, count + 1, device=self.index.device) * _signed(_GAMMA)  # (count,)
        return _mix(base[:, None] + counter).view(len(self.index), *shape)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) float32 in [0, 1): the upper 24 bits, exact in float32."""
        return ((self.bits(name, *shape) >> 40) & 0xFFFFFF).float() * 2.0**-24

    def normal(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) float32 of the standard normal distribution (Box & Muller 1958)."""
        radius = (-2 * torch.log1p(-self.uniform(f"{name}/radius", *shape))).sqrt()
        return radius * torch.cos(2 * math.pi * self.uniform(f"{name}/angle", *shape))

    def between(self, name: str, low: float, high: float, *shape: int) -> Tensor:
        """(B, *shape) float32 uniform in [low, high)."""
        return low + (high - low) * self.uniform(name, *shape)

    def chance(self, name: str, probability: float) -> Tensor:
        """(B,) bool, true with the given probability."""
        return self.uniform(name) < probability

    def permutation(self, name: str, n: int) -> Tensor:
        """(B, n) int64, each row a random permutation of 0..n-1."""
        return self.bits(name, n).argsort(dim=1, stable=True)

    def select(self, rows: Tensor | slice) -> "Key":
        """Returns the key of a part of the batch. rows: indices, a slice or a mask over (B,)."""
        return self.of(self.index[rows])

    def of(self, index: Tensor) -> "Key":
        """Returns the key of other images in the same epoch. index: (n,) int64."""
        return Key(self.seed, self.epoch, index)
