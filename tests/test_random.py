"""Keyed random numbers: a function of seed, epoch, image and name, uniform and independent."""

import math

import pytest
import torch

from sslctl.random import hash_name, mix_int
from sslctl.views import Key
from tests.test_views import integers


def test_mix_equals_the_published_splitmix64():
    """Vigna's splitmix64.c seeded with 1234567; a state's next output is the mix of the state."""
    gamma = 0x9E3779B97F4A7C15
    outputs = [mix_int(1234567 + step * gamma) for step in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_bits_equal_plain_python_arithmetic():
    """Written out in Python integers: a change here would change the views of every run that is being resumed."""
    seed, epoch, name, index = 3, 7, "global/0/crop", [0, 1, 59_999, 2**40]
    stream = mix_int(mix_int(seed) ^ mix_int(epoch ^ hash_name("epoch")))
    gamma, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    expected = []
    for i in index:
        base = mix_int(i ^ mix_int(stream ^ hash_name(name)))
        expected.append([mix_int((base + step * gamma) & mask) for step in range(1, 5)])
    actual = Key(seed, epoch, torch.tensor(index)).bits(name, 4)
    assert [[value & mask for value in row] for row in actual.tolist()] == expected


@pytest.mark.parametrize("sizes", [[64], [1] * 64, [17, 47], [63, 1]])
def test_key_gives_the_same_numbers_in_any_batch(sizes):
    index = integers(0, 10**6, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))

    def draws(key):
        return (
            key.bits("a"),
            key.uniform("a", 3, 2),
            key.between("a", -2.0, 5.0),
            key.chance("a", 0.4),
            key.permutation("a", 5),
        )

    whole = draws(Key(0, 4, index))
    parts = [draws(Key(0, 4, part)) for part in index[order].split(sizes)]
    for number, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[number] for part in parts]), expected[order])


def test_select_equals_the_rows_of_the_whole():
    key = Key(1, 2, torch.arange(100, 120))
    rows = torch.tensor([3, 19, 0])
    mask = torch.zeros(20, dtype=torch.bool)
    mask[rows] = True
    assert torch.equal(key.select(rows).uniform("a", 2), key.uniform("a", 2)[rows])
    assert torch.equal(key.select(mask).uniform("a", 2), key.uniform("a", 2)[mask])


def test_stacked_keys_equal_those_of_each_prefix_bit_for_bit():
    key, counts = Key(3, 7, integers(0, 2**40, 9)), {"crop": 10, "flip": 1, "order": 4}
    prefixes = {"global": ["global/0", "global/1"], "local": ["local/0"], "gram": ["global/0"]}
    stacks = key.stacked(prefixes, counts)
    for group, several in prefixes.items():
        stack = stacks[group]
        for number, prefix in enumerate(several):
            rows = slice(9 * number, 9 * number + 9)
            assert torch.equal(stack.bits("crop", 5, 2)[rows], key.bits(f"{prefix}/crop", 5, 2))
            assert torch.equal(stack.bits("crop", 3)[rows], key.bits(f"{prefix}/crop", 3))
            assert torch.equal(stack.uniform("flip")[rows], key.uniform(f"{prefix}/flip"))
            assert torch.equal(stack.chance("flip", 0.4)[rows], key.chance(f"{prefix}/flip", 0.4))
            assert torch.equal(stack.between("order", -1.0, 2.0, 4)[rows], key.between(f"{prefix}/order", -1.0, 2.0, 4))
            assert torch.equal(stack.permutation("order", 3)[rows], key.permutation(f"{prefix}/order", 3))


def test_a_stacked_key_has_no_more_numbers_than_were_drawn():
    stack = Key(0, 0, torch.arange(5)).stacked({"global": ["0"]}, {"crop": 2, "flip": 1})["global"]
    with pytest.raises(RuntimeError):
        stack.uniform("crop", 3)
    with pytest.raises(KeyError):
        stack.uniform("jitter")
    assert not hasattr(stack, "normal")  # it is drawn from two numbers of other names


def test_key_differs_by_seed_epoch_index_and_name():
    index = torch.arange(1000)
    variants = [
        Key(0, 0, index).bits("a"),
        Key(1, 0, index).bits("a"),
        Key(0, 1, index).bits("a"),
        Key(1, 1, index).bits("a"),
        Key(2, 0, index).bits("a"),
        Key(0, 0, index + 1000).bits("a"),
        Key(0, 0, index).bits("b"),
        Key(0, 0, index).bits("a", 2)[:, 1],
    ]
    assert len(torch.cat(variants).unique()) == 1000 * len(variants)  # 64 bits: one coincidence is out of the question


def chi_square(counts, expected):
    return (((counts - expected) ** 2) / expected).sum().item()


@pytest.mark.parametrize(
    "draw",
    [
        lambda n: Key(0, 0, torch.arange(n)).uniform("a"),
        lambda n: Key(0, 0, torch.arange(n // 100)).uniform("a", 100).flatten(),
        lambda n: torch.stack([Key(0, epoch, torch.arange(n // 100)).uniform("a") for epoch in range(100)]).flatten(),
        lambda n: torch.stack([Key(seed, 0, torch.arange(n // 100)).uniform("a") for seed in range(100)]).flatten(),
        lambda n: Key(0, 0, torch.arange(n) * 4096).uniform("a"),
    ],
    ids=["index", "shape", "epoch", "seed", "strided index"],
)
def test_uniform_is_uniform(draw):
    values = draw(100_000)
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, 64, 0, 1)
    assert 15 < chi_square(counts, len(values) / 64) < 130  # 63 degrees of freedom, six standard deviations
    low_bits = (values * 2**24).long() % 64
    assert 15 < chi_square(torch.bincount(low_bits, minlength=64).float(), len(values) / 64) < 130


def test_every_bit_is_fair():
    bits = Key(0, 0, torch.arange(40_000)).bits("a")
    shares = torch.stack([((bits >> place) & 1).float().mean() for place in range(64)])
    assert (shares - 0.5).abs().max() < 5 * 0.5 / math.sqrt(40_000)


def test_uniform_is_uncorrelated_between_neighbours():
    index = torch.arange(50_000)
    first = Key(0, 0, index).uniform("a", 2)
    others = {
        "next image": Key(0, 0, index + 1).uniform("a", 2),
        "next epoch": Key(0, 1, index).uniform("a", 2),
        "next seed": Key(1, 0, index).uniform("a", 2),
        "other name": Key(0, 0, index).uniform("b", 2),
        "next number": first.flip(1),
    }
    for name, other in others.items():
        for column in range(2):
            pair = torch.stack([first[:, column], other[:, column]])
            assert abs(torch.corrcoef(pair)[0, 1].item()) < 5 / math.sqrt(50_000), name


def test_permutations_are_uniform():
    rows = Key(0, 0, torch.arange(48_000)).permutation("a", 4)
    assert torch.equal(rows.sort(1).values, torch.arange(4).expand(48_000, 4))
    kinds = torch.unique(rows, dim=0, return_counts=True)[1]
    assert len(kinds) == 24
    assert 2 < chi_square(kinds.float(), 2000.0) < 65  # 23 degrees of freedom


def test_chance_and_between_keep_to_their_parameters():
    key = Key(0, 0, torch.arange(40_000))
    assert not key.chance("a", 0.0).any()
    assert key.chance("a", 1.0).all()
    assert abs(key.chance("a", 0.3).float().mean().item() - 0.3) < 0.012
    values = key.between("a", -1.0, 3.0)
    assert values.min() >= -1
    assert values.max() < 3
    assert abs(values.mean().item() - 1.0) < 0.03


@pytest.mark.parametrize(("bits", "expected"), [(0, 0.0), ((1 << 64) - 1, 1 - 2**-24), (1 << 39, 0.0), (1 << 63, 0.5)])
def test_uniform_has_exactly_the_upper_24_bits_and_never_is_one(bits, expected, monkeypatch):
    bits = torch.tensor([bits - (1 << 64) if bits >> 63 else bits])
    monkeypatch.setattr(Key, "bits", lambda self, name, *shape: bits)
    key = Key(0, 0, torch.arange(1))
    assert key.uniform("a").item() == expected
    assert not key.chance("a", 0.0)
    assert key.chance("a", 1.0)


def test_normal_is_normal():
    from scipy.stats import kstest

    key = Key(0, 0, torch.arange(20_000))
    values = key.normal("a", 2)
    assert values.shape == (20_000, 2)
    assert kstest(values.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(torch.corrcoef(values.T)[0, 1].item()) < 5 / math.sqrt(20_000)
    assert not torch.equal(values[:, 0], key.normal("b"))
    radius, angle = (key.uniform(f"a/{part}", 2)[:20].flatten().tolist() for part in ("radius", "angle"))
    pairs = zip(radius, angle, strict=True)
    by_hand = [math.sqrt(-2 * math.log(1 - r)) * math.cos(2 * math.pi * a) for r, a in pairs]
    torch.testing.assert_close(values[:20].flatten(), torch.tensor(by_hand), atol=1e-5, rtol=1e-4)
