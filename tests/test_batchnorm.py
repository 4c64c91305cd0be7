"""BatchNorm in groups, over several processes, and calibrated: against that of the whole batch."""

import pytest
import torch
from torch import nn

from sslctl import distributed
from sslctl.models.batchnorm import (
    GroupedBatchNorm1d,
    GroupedBatchNorm2d,
    calibrating,
    group_batchnorm,
    running_statistics,
    synchronize_batchnorm,
)
from tests.processes import in_processes
from tests.runs import slow
from tests.test_distributed import normal, outcome_of

CASES = {
    "1d": (nn.BatchNorm1d, (8, 6), {}),
    "1d of one row each": (nn.BatchNorm1d, (4, 6), {}),
    "2d": (nn.BatchNorm2d, (8, 6, 3, 5), {}),
    "channels_last": (nn.BatchNorm2d, (8, 6, 3, 5), {}),
    "affine off": (nn.BatchNorm2d, (8, 6, 3, 5), {"affine": False}),
    "other momentum and eps": (nn.BatchNorm1d, (8, 6), {"momentum": 0.7, "eps": 0.1}),
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # of values of the size of 1


def norm_of(kind, options):
    norm = kind(6, **options)
    for seed, tensor in enumerate([*norm.parameters(), norm.running_mean]):
        tensor.data.copy_(normal(6, seed=seed) + 1)
    return norm


def normalized(norm, shape, channels_last=False):
    """Output, gradients and statistics of a BatchNorm after two batches, of which this process has its rows."""
    outputs = []
    for seed in (10, 11):
        x = (normal(*shape, seed=seed) * 2 + 3)[distributed.local_rows(shape[0])]
        x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
        y = norm(x)
        (distributed.gather(y) * normal(*shape, seed=seed + 2)).tanh().sum().backward()
        outputs += [y.detach(), x.grad / distributed.world_size()]
    distributed.average_gradients(norm.parameters())
    distributed.average(running_statistics(norm))
    return outputs, [p.grad for p in norm.parameters()], list(norm.buffers())


def synchronized(name, together=True):
    kind, shape, options = CASES[name]
    norm = norm_of(kind, options)
    if together:
        holder = nn.Sequential(norm)
        synchronize_batchnorm(holder)
        assert type(holder[0]) is (kind if distributed.world_size() == 1 else type(norm))
    return normalized(norm, shape, name == "channels_last")


def all_synchronized(together=True):
    return {name: synchronized(name, together) for name in CASES if together or name != "1d of one row each"}


def assert_normalized_alike(actual, expected):
    """found: of each process; expected: of one."""
    rows = [torch.cat(parts) for parts in zip(*(outputs for outputs, _, _ in actual), strict=True)]
    torch.testing.assert_close(rows, expected[0], **CLOSE)
    for _, gradients, buffers in actual:
        torch.testing.assert_close(gradients, expected[1], **CLOSE)
        torch.testing.assert_close(buffers, expected[2], **CLOSE)


@pytest.fixture(scope="module")
def synchronized_in_two():
    return in_processes(all_synchronized)


@pytest.mark.parametrize("name", CASES)
def test_batchnorm_over_two_processes_is_that_of_the_whole_batch(name, synchronized_in_two):
    assert_normalized_alike([actual[name] for actual in synchronized_in_two], synchronized(name))


def test_batchnorm_over_four_processes_is_that_of_the_whole_batch():
    assert_normalized_alike(in_processes(synchronized, "2d", count=4), synchronized("2d"))


def test_batchnorm_of_each_process_alone_is_another():
    actual = in_processes(synchronized, "2d", False)
    with pytest.raises(AssertionError, match="not close"):
        assert_normalized_alike(actual, synchronized("2d"))


def in_groups(groups):
    return {
        kind.__name__: normalized(group_batchnorm(norm_of(kind, {}), groups), shape)
        for kind, shape in ((nn.BatchNorm1d, (8, 6)), (nn.BatchNorm2d, (8, 6, 3, 5)))
    }


@pytest.mark.parametrize(("groups", "processes"), [(1, 2), (2, 2), (4, 2), (2, 4), slow(1, 4), slow(4, 4)])
def test_batchnorm_groups_are_of_the_global_batch(groups, processes):
    actual, expected = in_processes(in_groups, groups, count=processes), in_groups(groups)
    for name in expected:
        assert_normalized_alike([its[name] for its in actual], expected[name])


def one_group_too_many():
    return outcome_of(lambda: in_groups(3)), outcome_of(lambda: in_groups(8))


def test_batchnorm_groups_that_do_not_divide_among_processes_are_refused():
    for three, eight in in_processes(one_group_too_many):
        assert three[:2] == ("ValueError", "3 BatchNorm groups do not divide among 2 processes, nor they into these")
        assert eight[0] == "ValueError"  # of one row each
        assert "1 value per channel" in eight[1] or "more than 1 value" in eight[1]


class TheirBatchNorm(nn.BatchNorm2d):
    pass


def synchronized_kinds():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2), group_batchnorm(nn.BatchNorm2d(2), 4))
    synchronize_batchnorm(net)
    theirs = outcome_of(lambda: synchronize_batchnorm(nn.Sequential(TheirBatchNorm(2))))
    return [(type(child), child.groups) for child in net], theirs


def test_synchronizing_keeps_groups_and_refuses_other_libraries_batchnorm():
    for kinds, theirs in in_processes(synchronized_kinds):
        assert kinds == [(GroupedBatchNorm1d, 1), (GroupedBatchNorm2d, 1), (GroupedBatchNorm2d, 4)]
        assert "TheirBatchNorm" in theirs[1]


def test_one_process_keeps_torchs_own_batchnorm():
    net = nn.Sequential(nn.BatchNorm1d(2), TheirBatchNorm(2))
    synchronize_batchnorm(net)
    assert [type(child) for child in net] == [nn.BatchNorm1d, TheirBatchNorm]


def test_calibrated_statistics_are_the_mean_of_the_batches_and_others_stay():
    torch.manual_seed(0)
    seen, unseen = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    batches = [torch.randn(16, 3) * 2 + 5 for _ in range(3)]
    for norm in (seen, unseen):
        norm(torch.randn(16, 3) - 9)
        norm.eval()
    before = {name: tensor.clone() for name, tensor in unseen.state_dict().items()}
    with calibrating(nn.ModuleList([seen, unseen])):
        for batch in batches:
            seen(batch)
    torch.testing.assert_close(seen.running_mean, torch.stack([batch.mean(0) for batch in batches]).mean(0))
    torch.testing.assert_close(seen.running_var, torch.stack([batch.var(0) for batch in batches]).mean(0))
    assert (seen.momentum, seen.training) == (0.1, False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unseen.state_dict().items())


@pytest.mark.parametrize("groups", [1, 2])
def test_calibrated_statistics_of_groups_are_theirs(groups):
    torch.manual_seed(0)
    norm, batches = group_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), groups), [torch.randn(16, 3) for _ in range(3)]
    with calibrating(norm):
        for batch in batches:
            norm(batch)
    means = torch.stack([part.mean(0) for batch in batches for part in batch.chunk(groups)])
    torch.testing.assert_close(norm[0].running_mean, means.mean(0))
