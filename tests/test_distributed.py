"""Two processes train as one does: gathers, BatchNorm, every method, whole runs."""

import os
import re
import time

import pytest
import torch
import torch.distributed as dist

import sslctl.training.train
from sslctl import distributed
from sslctl.errors import InputError
from sslctl.losses import nt_xent
from tests.own_methods import own
from tests.processes import in_processes, said_by_pretrain
from tests.runs import SIMCLR

# --- Gathering and agreeing ---


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cross_sample_loss(gather, x, weight):
    """NT-Xent of linear maps of two views, and a sum of two gathers: autograd hands both the same gradient tensor."""
    z1, z2 = gather(x @ weight), gather(x.cos() @ weight)
    return nt_xent(z1, z2, 0.5) + ((gather(x @ weight) + gather(x.sin() @ weight)) ** 3).mean()


def gradients_of_cross_sample_loss(gather):
    """(loss, gradient of the rows, of the weight) with this process's rows of (12, 5)."""
    x = normal(12, 5)[distributed.local_rows(12)].requires_grad_()
    weight = normal(5, 4, seed=1).requires_grad_()
    loss = cross_sample_loss(gather, x, weight)
    loss.backward()
    distributed.average_gradients([weight])
    return loss.detach(), x.grad / distributed.world_size(), weight.grad


def without_gradient(x):
    parts = [torch.empty_like(x) for _ in range(distributed.world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def with_own_gradient(x):
    """What is common elsewhere: this process's rows keep their gradient, the others' are cut."""
    parts = list(without_gradient(x).chunk(distributed.world_size()))
    parts[distributed.rank()] = x
    return torch.cat(parts)


def cut_gradients():
    return gradients_of_cross_sample_loss(with_own_gradient)


def full_gradients():
    return gradients_of_cross_sample_loss(distributed.gather)


@pytest.mark.parametrize("processes", [2, 4])
def test_gather_gives_the_gradient_of_one_process(processes):
    loss, x, weight = full_gradients()
    actual = in_processes(full_gradients, count=processes)
    torch.testing.assert_close(torch.cat([rows for _, rows, _ in actual]), x, rtol=1e-5, atol=1e-7)
    for its_loss, _, its_weight in actual:
        torch.testing.assert_close(its_loss, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(its_weight, weight, rtol=1e-5, atol=1e-7)


def test_a_gather_that_cuts_gradients_gives_other_ones():
    _, _, weight = full_gradients()
    for loss, _, actual in in_processes(cut_gradients):
        torch.testing.assert_close(loss, full_gradients()[0], rtol=1e-6, atol=0)
        assert (actual - weight).norm() > 0.1 * weight.norm()


def gathered_values():
    rank = distributed.rank()
    values = {
        "rows": distributed.gather(torch.full((2, 3), rank)),
        "transposed": distributed.gather(torch.arange(6.0).view(2, 3).T + 10 * rank),
        "half": distributed.gather(torch.full((1,), 1.5, dtype=torch.bfloat16)),
        "large": distributed.gather(torch.tensor([2**62 + rank])),
        "on the host": distributed.gather_on_host(torch.arange(2) + 10 * rank),
    }
    uneven = [torch.full((2, 2), float(rank)), torch.tensor(rank, dtype=torch.float64), torch.arange(6.0).view(2, 3).T]
    distributed.average(uneven)
    values |= {"averages": uneven, "largest": distributed.all_reduce_max(143 - rank)}
    values["gathered_objects"] = distributed.all_gather_object({"rank": rank, "state": torch.tensor([rank])})
    values["rows of 8"] = distributed.local_rows(8)
    return values


def test_processes_gather_average_and_agree():
    for rank, actual in enumerate(in_processes(gathered_values)):
        assert actual["rows"].tolist() == [[0] * 3] * 2 + [[1] * 3] * 2
        assert actual["transposed"].tolist() == [[0, 3], [1, 4], [2, 5], [10, 13], [11, 14], [12, 15]]
        assert actual["half"].dtype == torch.float32
        assert actual["large"].tolist() == [2**62, 2**62 + 1]
        assert actual["on the host"].tolist() == [0, 1, 10, 11]
        assert [t.unique().tolist() for t in actual["averages"]] == [[0.5], [0.5], [0, 1, 2, 3, 4, 5]]
        assert actual["averages"][1].dtype == torch.float64
        assert actual["largest"] == 143
        assert [value["rank"] for value in actual["gathered_objects"]] == [0, 1]
        assert actual["gathered_objects"][1]["state"].tolist() == [1]
        assert actual["rows of 8"] == slice(4 * rank, 4 * rank + 4)


def test_one_process_alone_agrees_with_itself():
    x = torch.ones(2, requires_grad=True)
    assert distributed.gather(x) is distributed.gather_on_host(x) is x
    assert (distributed.rank(), distributed.world_size(), distributed.all_reduce_max(5)) == (0, 1, 5)
    assert distributed.all_gather_object("a") == ["a"]
    assert distributed.on_main_process(lambda: "b") == distributed.main_process_first(lambda: "b") == "b"


def outcome_of(function):
    """What a function returned, or the kind, words and status of what it raised."""
    try:
        return function()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "status", None)


def failures_of_the_first():
    called = []

    def failing(error):
        called.append(error)
        raise error

    actual = [outcome_of(lambda: distributed.on_main_process(lambda: called.append(1) or {"step": 3}))]
    for error in (OSError("full"), InputError("in use")):
        actual.append(outcome_of(lambda error=error: distributed.on_main_process(lambda: failing(error))))
        actual.append(outcome_of(lambda error=error: distributed.main_process_first(lambda: failing(error))))
    actual.append(outcome_of(lambda: distributed.main_process_first(lambda: distributed.rank())))
    return actual, len(called)


def agreements_of_the_first():
    """Whatever asks the others, asked by the first process while it works alone."""
    x = torch.ones(2, requires_grad=True)

    def alone():
        distributed.broadcast_from_main(x)
        distributed.average([x.detach()])
        return distributed.gather(x) is x, distributed.all_reduce_max(3), distributed.all_gather_object(4)

    return distributed.on_main_process(alone)


def test_threads_are_all_cpus_where_the_system_tells_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    assert distributed.default_threads() == os.cpu_count()


def test_the_first_process_alone_asks_nobody():
    assert in_processes(agreements_of_the_first) == [(True, 3, [4])] * 2


def begun(run_dir):
    """What two processes hold after one step of a method that writes before an epoch."""
    kept = []

    def step(setup, at, batch):
        kept.extend([setup.method.drawn.clone(), setup.method.backbone.network.conv1.weight.clone()])
        return real(setup, at, batch)

    real = sslctl.training.train.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sslctl.training.train, "train_step", step)
        said_by_pretrain(run_dir, *SIMCLR, *own("BeginningSimCLR"), stop_after=1)
    return kept[:2]


def test_what_begins_an_epoch_is_the_same_in_all_processes(tmp_path):
    (drawn, weight), others = in_processes(begun, tmp_path / "run")
    assert torch.isfinite(drawn).all()
    assert torch.equal(drawn, others[0])
    assert torch.equal(weight, others[1])


def test_what_the_first_process_alone_does_or_raises_reaches_all():
    (first, calls), (second, none) = in_processes(failures_of_the_first)
    refused, full = ("InputError", "in use", None), ("OSError", "full", None)
    assert first == [{"step": 3}, full, full, refused, refused, 0]
    assert second == [
        {"step": 3},
        ("OtherProcessFailed", "", 1),
        ("OtherProcessFailed", "", 1),
        *[("OtherProcessFailed", "", 2)] * 2,
        1,
    ]
    assert (calls, none) == (5, 0)


# --- Silence ---


def message_of_those_who_wait_for(silent):
    distributed._NOTICING = 1
    if distributed.rank() == silent:
        time.sleep(4)
        return ""
    try:
        distributed.all_reduce_max(0)
    except RuntimeError as error:
        return str(distributed.explain(error))
    return "nobody was silent"


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_process_is_named_by_each_that_waits_for_it(silent):
    messages = in_processes(message_of_those_who_wait_for, silent, count=3, patience=1)
    for rank, message in enumerate(messages):
        if rank != silent:
            assert re.fullmatch(rf"no answer from process {silent} \(pid \d+ on \S+\) for 0.0167 min .*", message)


def message_of_an_error():
    return str(distributed.explain(LookupError("a mistake")))


def test_other_errors_stay_as_they_are():
    assert in_processes(message_of_an_error) == ["a mistake"] * 2


def long_work_of_the_first():
    return distributed.on_main_process(lambda: time.sleep(2) or 7), distributed.all_reduce_max(distributed.rank())


def test_the_first_process_may_work_longer_than_the_others_wait():
    assert in_processes(long_work_of_the_first, patience=0.5) == [(7, 1)] * 2
