"""Random numbers that depend on (seed, epoch, sample index, name) and on nothing else.

A counter-based hash (the finaliser of SplitMix64; Steele, Lea & Flood 2014) in wrapping int64 arithmetic. There is no
state: the parameters of image i's views in epoch e are the same for every batch size, worker count, process count and
resume point, on every device.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sslctl.transfer import to_device

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


class Draws:
    """What is drawn from random bits; a subclass has `bits`."""

    bits: Callable[..., Tensor]  # (name, *shape) -> (B, *shape) int64, all 64 bits random

    def uniform(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) float32 in [0, 1): the upper 24 bits, exact in float32."""
        return _unit_interval(self.bits(name, *shape))

    def between(self, name: str, low: float, high: float, *shape: int) -> Tensor:
        """(B, *shape) float32 uniform in [low, high)."""
        return low + (high - low) * self.uniform(name, *shape)

    def chance(self, name: str, probability: float) -> Tensor:
        """(B,) bool, true with the given probability."""
        return self.uniform(name) < probability

    def permutation(self, name: str, n: int) -> Tensor:
        """(B, n) int64, each row a random permutation of 0..n-1."""
        return self.bits(name, n).argsort(dim=1, stable=True)


class Key(Draws):
    """The random numbers of one batch: row b depends on (seed, epoch, index[b], name) only.

    index: (B,) int64 sample indices; its device is where the numbers are made.
    """

    def __init__(self, seed: int, epoch: int, index: Tensor):
        self.seed, self.epoch, self.index = seed, epoch, index
        self._stream = mix_int(mix_int(seed) ^ mix_int(epoch ^ hash_name("epoch")))

    def bits(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) int64, all 64 bits random."""
        count = math.prod(shape)
        base = _mix(self.index ^ self._stream_of(name))  # (B,)
        counter = torch.arange(1, count + 1, device=self.index.device) * _signed(_GAMMA)  # (count,)
        return _mix(base[:, None] + counter).view(len(self.index), *shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) float32 of the standard normal distribution (Box & Muller 1958)."""
        radius = (-2 * torch.log1p(-self.uniform(f"{name}/radius", *shape))).sqrt()
        return radius * torch.cos(2 * math.pi * self.uniform(f"{name}/angle", *shape))

    def stacked(self, prefixes: dict[str, list[str]], counts: dict[str, int]) -> dict[str, "StackedKey"]:
        """Draws the numbers of many names in one hash: a GPU is asked for some 30 operations, not for as many a name.

        prefixes: group -> what stands before the names, in the order of the group's stack. counts: name -> how many numbers
        are drawn. Returns group -> StackedKey.
        """
        every = [prefix for several in prefixes.values() for prefix in several]
        streams = [self._stream_of(f"{prefix}/{name}") for prefix in every for name in counts]
        name_of, counters = _layout(tuple(counts.values()))
        constants = to_device(torch.tensor(streams + name_of + counters), self.index.device)
        streams, name_of, counters = constants.split([len(streams), len(name_of), len(counters)])

        base = _mix(self.index[:, None] ^ streams.view(len(every), 1, len(counts)))  # (V, B, names)
        bits = _mix(base.index_select(2, name_of) + counters)  # (V, B, numbers)
        parts = [len(several) for several in prefixes.values()]
        tables = zip(bits.split(parts), _unit_interval(bits).split(parts), strict=True)
        return {
            group: StackedKey(*(table.flatten(0, 1) for table in pair), counts)
            for group, pair in zip(prefixes, tables, strict=True)
        }

    def select(self, rows: Tensor | slice) -> "Key":
        """Returns the key of a part of the batch. rows: indices, a slice or a mask over (B,)."""
        return self.of(self.index[rows])

    def of(self, index: Tensor) -> "Key":
        """Returns the key of other images in the same epoch. index: (n,) int64."""
        return Key(self.seed, self.epoch, index)

    def _stream_of(self, name: str) -> int:
        """Returns the epoch's stream of a name, as an int64."""
        return _signed(mix_int(self._stream ^ hash_name(name)))


class StackedKey(Draws):
    """A batch's random numbers under several prefixes, one below the other, as `Key.stacked` drew them.

    Row v·B + b of "name" is row b of the key's "prefix[v]/name", bit for bit. A name has no more numbers than were drawn.
    """

    def __init__(self, bits: Tensor, uniform: Tensor, counts: dict[str, int]):
        self._bits, self._uniform = bits, uniform  # (V·B, numbers)
        ends = itertools.accumulate(counts.values())
        self._columns = {name: slice(end - count, end) for (name, count), end in zip(counts.items(), ends, strict=True)}

    def bits(self, name: str, *shape: int) -> Tensor:
        """(V·B, *shape) int64, all 64 bits random."""
        return self._numbers(self._bits, name, shape)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """(V·B, *shape) float32 in [0, 1)."""
        return self._numbers(self._uniform, name, shape)

    def _numbers(self, table: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
        return table[:, self._columns[name]][:, : math.prod(shape)].reshape(len(table), *shape)


def _unit_interval(bits: Tensor) -> Tensor:
    """int64 -> float32 in [0, 1)."""
    return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24


@functools.cache
def _layout(counts: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Returns of each number which name it has, by its place, and what the counter adds to its hash."""
    name_of = [place for place, count in enumerate(counts) for _ in range(count)]
    counters = [_signed(step * _GAMMA) for count in counts for step in range(1, count + 1)]
    return name_of, counters
