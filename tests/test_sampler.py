import numpy as np
import pytest

from sslctl.data.sampler import batch_indices, permuted

SIZES = [1, 2, 3, 17, 1000, 4097]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (7, 123), (2**40, 10**6)])
def test_permuted_meets_every_image_once(size, seed, epoch):
    order = permuted(np.arange(size), size, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", SIZES)
def test_permuted_positions_one_by_one_equal_all_together(size):
    order = permuted(np.arange(size), size, 3, 5)
    places = np.random.default_rng(0).permutation(size)[:200]
    single = [permuted(np.array([place]), size, 3, 5)[0] for place in places]
    assert np.array_equal(single, order[places])
    assert np.array_equal(permuted(places, size, 3, 5), order[places])


def test_permuted_leaves_its_argument_alone():
    positions = np.arange(17)
    permuted(positions, 17, 0, 0)
    assert np.array_equal(positions, np.arange(17))


def test_permuted_differs_by_epoch_and_seed():
    """Two random orders of 4,097 agree in about one place; twenty would be a fault."""
    orders = [permuted(np.arange(4097), 4097, seed, epoch) for seed in range(3) for epoch in range(3)]
    for number, first in enumerate(orders):
        assert np.sum(first == np.arange(4097)) < 20
        for second in orders[:number]:
            assert np.sum(first == second) < 20


def test_permuted_sends_every_image_everywhere():
    """Over 1,200 epochs each of six images is about 200 times in each place."""
    orders = np.stack([permuted(np.arange(6), 6, 0, epoch) for epoch in range(1200)])
    counts = np.stack([np.bincount(column, minlength=6) for column in orders.T])
    assert ((counts - 200.0) ** 2 / 200).sum() < 65  # 25 degrees of freedom


def test_permuted_order_is_uncorrelated_with_the_one_on_disk_and_the_next_epochs():
    orders = [permuted(np.arange(4097), 4097, 0, epoch) for epoch in range(2)]
    assert abs(np.corrcoef(orders[0], np.arange(4097))[0, 1]) < 5 / np.sqrt(4097)
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 5 / np.sqrt(4097)
    assert abs(np.corrcoef(orders[0][:-1], orders[0][1:])[0, 1]) < 5 / np.sqrt(4097)


@pytest.mark.parametrize(("size", "batch_size"), [(1000, 32), (17, 17), (4097, 256), (10, 1)])
def test_batch_indices_are_blocks_of_the_epochs_order(size, batch_size):
    steps = size // batch_size
    for epoch in range(3):
        order = permuted(np.arange(size), size, 9, epoch)
        for position in {0, steps // 2, steps - 1}:
            actual = batch_indices(epoch * steps + position, size, batch_size, 9)
            assert np.array_equal(actual, order[position * batch_size : (position + 1) * batch_size])


def test_batch_indices_of_an_epoch_meet_no_image_twice_and_leave_out_the_rest():
    seen = np.concatenate([batch_indices(step, 1000, 96, 0) for step in range(10)])
    assert len(np.unique(seen)) == 960
    following = batch_indices(10, 1000, 96, 0)
    assert np.array_equal(following, permuted(np.arange(96), 1000, 0, 1))
