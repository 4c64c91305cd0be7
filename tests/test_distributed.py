"""Two processes train as one does: gathers, BatchNorm, every method, whole runs."""

import contextlib
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import sslctl.training.setup
import sslctl.training.train
from sslctl import distributed
from sslctl.errors import InputError
from sslctl.losses import nt_xent
from sslctl.models.batchnorm import (
    GroupedBatchNorm1d,
    GroupedBatchNorm2d,
    calibrating,
    group_batchnorm,
    running_statistics,
    synchronize_batchnorm,
)
from tests.training import (
    MOCO,
    SIMCLR,
    STEPS,
    call,
    command,
    differences,
    edit,
    finish,
    in_processes,
    metrics,
    newest,
    own,
    pretrain_in,
    said_by_pretrain,
    slow,
    state_of,
    tensors,
)

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
    found = in_processes(full_gradients, count=processes)
    torch.testing.assert_close(torch.cat([rows for _, rows, _ in found]), x, rtol=1e-5, atol=1e-7)
    for its_loss, _, its_weight in found:
        torch.testing.assert_close(its_loss, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(its_weight, weight, rtol=1e-5, atol=1e-7)


def test_a_gather_that_cuts_gradients_gives_other_ones():
    _, _, weight = full_gradients()
    for loss, _, found in in_processes(cut_gradients):
        torch.testing.assert_close(loss, full_gradients()[0], rtol=1e-6, atol=0)
        assert (found - weight).norm() > 0.1 * weight.norm()


def gathered_values():
    rank = distributed.rank()
    values = {
        "rows": distributed.gather(torch.full((2, 3), rank)),
        "transposed": distributed.gather(torch.arange(6.0).view(2, 3).T + 10 * rank),
        "half": distributed.gather(torch.full((1,), 1.5, dtype=torch.bfloat16)),
        "large": distributed.gather(torch.tensor([2**62 + rank])),
    }
    uneven = [torch.full((2, 2), float(rank)), torch.tensor(rank, dtype=torch.float64), torch.arange(6.0).view(2, 3).T]
    distributed.average(uneven)
    values |= {"averages": uneven, "largest": distributed.all_reduce_max(143 - rank)}
    values["gathered_objects"] = distributed.all_gather_object({"rank": rank, "state": torch.tensor([rank])})
    values["rows of 8"] = distributed.local_rows(8)
    return values


def test_processes_gather_average_and_agree():
    for rank, found in enumerate(in_processes(gathered_values)):
        assert found["rows"].tolist() == [[0] * 3] * 2 + [[1] * 3] * 2
        assert found["transposed"].tolist() == [[0, 3], [1, 4], [2, 5], [10, 13], [11, 14], [12, 15]]
        assert found["half"].dtype == torch.float32
        assert found["large"].tolist() == [2**62, 2**62 + 1]
        assert [t.unique().tolist() for t in found["averages"]] == [[0.5], [0.5], [0, 1, 2, 3, 4, 5]]
        assert found["averages"][1].dtype == torch.float64
        assert found["largest"] == 143
        assert [value["rank"] for value in found["gathered_objects"]] == [0, 1]
        assert found["gathered_objects"][1]["state"].tolist() == [1]
        assert found["rows of 8"] == slice(4 * rank, 4 * rank + 4)


def test_one_process_alone_agrees_with_itself():
    x = torch.ones(2, requires_grad=True)
    assert distributed.gather(x) is x
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

    found = [outcome_of(lambda: distributed.on_main_process(lambda: called.append(1) or {"step": 3}))]
    for error in (OSError("full"), InputError("in use")):
        found.append(outcome_of(lambda error=error: distributed.on_main_process(lambda: failing(error))))
        found.append(outcome_of(lambda error=error: distributed.main_process_first(lambda: failing(error))))
    found.append(outcome_of(lambda: distributed.main_process_first(lambda: distributed.rank())))
    return found, len(called)


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


# --- BatchNorm ---

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


def assert_normalized_alike(found, expected):
    """found: of each process; expected: of one."""
    rows = [torch.cat(parts) for parts in zip(*(outputs for outputs, _, _ in found), strict=True)]
    torch.testing.assert_close(rows, expected[0], **CLOSE)
    for _, gradients, buffers in found:
        torch.testing.assert_close(gradients, expected[1], **CLOSE)
        torch.testing.assert_close(buffers, expected[2], **CLOSE)


@pytest.fixture(scope="module")
def synchronized_in_two():
    return in_processes(all_synchronized)


@pytest.mark.parametrize("name", CASES)
def test_batchnorm_over_two_processes_is_that_of_the_whole_batch(name, synchronized_in_two):
    assert_normalized_alike([found[name] for found in synchronized_in_two], synchronized(name))


def test_batchnorm_over_four_processes_is_that_of_the_whole_batch():
    assert_normalized_alike(in_processes(synchronized, "2d", count=4), synchronized("2d"))


def test_batchnorm_of_each_process_alone_is_another():
    found = in_processes(synchronized, "2d", False)
    with pytest.raises(AssertionError, match="not close"):
        assert_normalized_alike(found, synchronized("2d"))


def in_groups(groups):
    return {
        kind.__name__: normalized(group_batchnorm(norm_of(kind, {}), groups), shape)
        for kind, shape in ((nn.BatchNorm1d, (8, 6)), (nn.BatchNorm2d, (8, 6, 3, 5)))
    }


@pytest.mark.parametrize(("groups", "processes"), [(1, 2), (2, 2), (4, 2), (2, 4), slow(1, 4), slow(4, 4)])
def test_batchnorm_groups_are_of_the_global_batch(groups, processes):
    found, expected = in_processes(in_groups, groups, count=processes), in_groups(groups)
    for name in expected:
        assert_normalized_alike([its[name] for its in found], expected[name])


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


# --- Methods: two processes against one ---

RECIPES = {
    "simclr": SIMCLR,
    "moco_v2, 1 group": (*MOCO[:2], "method.batchnorm_groups=1"),
    "moco_v2, 2 groups": (*MOCO[:2], "method.batchnorm_groups=2"),
    "moco_v2, 4 groups": MOCO,
    "moco_v2plus": ("method=moco_v2plus", *MOCO[1:]),
    "supervised": ("method=supervised",),
}
METHODS = [slow(name) if name in ("moco_v2, 1 group", "moco_v2, 2 groups") else name for name in RECIPES]
LOOKED_AT = 3  # steps


@contextlib.contextmanager
def recorded_steps():
    """What every step of a run took and gave: images, views, loss, gradients, and what is kept without a gradient."""
    steps, real = [], sslctl.training.train.train_step

    def train_step(setup, step, batch):
        method, gradients = setup.method, {}
        named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
        method.after_backward = lambda s: gradients.update((name, p.grad.clone()) for name, p in named)
        result = real(setup, step, batch)
        others = {name: t for name, t in method.state_dict().items() if name not in dict(named)}
        kept = {n: t.clone() for n, t in others.items() if not n.endswith(("running_mean", "running_var", "_tracked"))}
        rows = {"index": batch.index, "label": batch.label, "views": batch.views["global"].transpose(0, 1)}
        values = {name: result[2][name] for name in ("loss", "feature_std")} | {"norm": result[3]}
        steps.append({"rows": rows, "values": values, "gradients": gradients, "kept": kept})
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sslctl.training.train, "train_step", train_step)
        yield steps


def steps_of(run_dir, overrides, synchronize=True, gather=None):
    """The first steps of a run. synchronize, gather: what is left out or replaced, for a control.

    Softplus stands for ReLU: an activation that a rounding moves over the kink would change a gradient by a part.
    """
    with recorded_steps() as steps, pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x))
        if not synchronize:
            patch.setattr(sslctl.training.setup, "synchronize_batchnorm", lambda method: None)
        if gather:
            patch.setattr("sslctl.methods.simclr.gather", gather)
        assert said_by_pretrain(run_dir, *overrides, stop_after=LOOKED_AT)[0] == 143
    return steps


@pytest.fixture(scope="module")
def first_steps(tmp_path_factory):
    """A recipe's name and a number of processes -> the first steps in each of them, made once."""
    made = {}

    def run(name, processes):
        if (name, processes) not in made:
            folder = tmp_path_factory.mktemp("run")
            made[name, processes] = in_processes(steps_of, folder / "run", RECIPES[name], count=processes)
        return made[name, processes]

    return run


def distance(left, right):
    """The largest norm of a difference of two tensors' of a name, as a part of their norm."""
    return max(float((left[name] - right[name]).norm() / right[name].norm()) for name in right)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_see_the_images_and_views_of_one_bit_for_bit(name, first_steps):
    (one,), two = first_steps(name, 1), first_steps(name, 2)
    for step in range(LOOKED_AT):
        for kind, rows in one[step]["rows"].items():
            assert torch.equal(torch.cat([its[step]["rows"][kind] for its in two]), rows), (step, kind)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_loss_gradients_and_state_of_one(name, first_steps):
    (one,), two = first_steps(name, 1), first_steps(name, 2)
    for its in two:
        for step, tolerance in enumerate((1e-4, 1e-2, 1e-2)):  # LARS's first steps multiply a rounding
            assert distance(its[step]["values"], one[step]["values"]) < tolerance
            assert distance(its[step]["gradients"], one[step]["gradients"]) < tolerance
            torch.testing.assert_close(its[step]["kept"], one[step]["kept"], rtol=0, atol=1e-4)  # a queue of unit rows
        assert all(torch.equal(kept, two[0][step]["kept"][name]) for name, kept in its[step]["kept"].items())


@pytest.mark.parametrize("name", ["simclr", slow("supervised")])
def test_batchnorm_left_apart_gives_other_gradients(name, first_steps, tmp_path):
    found = in_processes(steps_of, tmp_path / "run", RECIPES[name], False)
    assert distance(found[0][0]["gradients"], first_steps(name, 1)[0][0]["gradients"]) > 1e-2


def test_a_gather_without_the_others_gradient_gives_other_gradients(first_steps, tmp_path):
    found = in_processes(steps_of, tmp_path / "run", RECIPES["simclr"], True, with_own_gradient)
    assert distance(found[0][0]["gradients"], first_steps("simclr", 1)[0][0]["gradients"]) > 1e-2


# --- Whole runs ---

DROPOUT = (*SIMCLR, *own("DropoutSimCLR"))
WHOLE = {"moco": MOCO, "dropout": DROPOUT, "simclr": SIMCLR, "moco_v2plus": ("method=moco_v2plus", *MOCO[1:])}
KNN = "evaluation.knn_every_epochs=0.4"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A recipe's name and a number of processes -> the directory of its uninterrupted run, made once."""
    made = {}

    def run(name, processes):
        if (name, processes) not in made:
            made[name, processes] = tmp_path_factory.mktemp("straight") / "run"
            pretrain_in(processes, made[name, processes], *WHOLE[name])
        return made[name, processes]

    return run


def losses(run):
    return torch.tensor([record["loss"] for record in metrics(run)])


@pytest.mark.parametrize(("name", "tolerance"), [("moco", 1e-3), slow("simclr", 3e-2)])
def test_a_run_of_two_processes_follows_that_of_one(name, tolerance, straight):
    found, expected = straight(name, 2), straight(name, 1)
    assert [record["step"] for record in metrics(found)] == list(range(1, STEPS + 1))
    torch.testing.assert_close(losses(found), losses(expected), rtol=tolerance, atol=0)
    torch.testing.assert_close(losses(found)[:3], losses(expected)[:3], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), slow(2, 4), slow(4, 1)])
def test_a_run_continues_with_another_number_of_processes(before, after, straight, tmp_path):
    pretrain_in(before, tmp_path / "run", *MOCO, stop_after=4)
    said = pretrain_in(after, tmp_path / "run", *MOCO)
    assert "resuming at step 4 of 10" in said
    assert f"saved by {before} processes, continued by {after}: equal to rounding, not bitwise" in said
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
    torch.testing.assert_close(losses(tmp_path / "run"), losses(straight("moco", 1)), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("moco", (3,)),
        ("dropout", (7,)),
        slow("moco", (1, 4, 5)),
        slow("dropout", (2, 7)),
        slow("simclr", (5,)),
        slow("moco_v2plus", (3, 9)),
    ],
)
def test_a_stopped_run_of_two_processes_equals_the_straight_one_bit_for_bit(name, stops, straight, tmp_path):
    for stop in stops:
        pretrain_in(2, tmp_path / "run", *WHOLE[name], stop_after=stop)
        assert newest(tmp_path / "run").name == f"step-{stop}"
    pretrain_in(2, tmp_path / "run", *WHOLE[name])
    assert differences(tensors(tmp_path / "run"), tensors(straight(name, 2))) == []
    assert metrics(tmp_path / "run") == metrics(straight(name, 2))


def test_online_evaluation_changes_nothing_in_a_run_of_two_processes(straight, tmp_path):
    pretrain_in(2, tmp_path / "run", *DROPOUT, KNN)
    assert differences(tensors(tmp_path / "run"), tensors(straight("dropout", 2))) == []
    assert [r["step"] for r in metrics(tmp_path / "run") if "knn" in r] == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("process", [slow(0), 1])
def test_dropout_needs_the_generator_of_each_process(process, straight, tmp_path):
    def other_generator(state):
        assert not torch.equal(*(its["torch"] for its in state["generators"]))
        torch.manual_seed(5)
        state["generators"][process]["torch"] = torch.get_rng_state()

    pretrain_in(2, tmp_path / "run", *DROPOUT, stop_after=2)
    edit(newest(tmp_path / "run"), state=other_generator)
    pretrain_in(2, tmp_path / "run", *DROPOUT)
    found = differences(tensors(tmp_path / "run"), tensors(straight("dropout", 2)))
    assert "method/backbone.network.conv1.weight" in found


@pytest.mark.slow
def test_the_command_with_two_processes_finishes_and_follows_one(straight, tmp_path):
    run = tmp_path / "run"
    assert call(command(run, *MOCO, "trainer.processes=2"), tmp_path) == 0
    said = (tmp_path / "output").read_text()
    assert "1 threads in each of 2 processes with 128 images" in said
    assert said.count("done: ") == said.count("starting at step 0") == 1
    assert metrics(run) == metrics(straight("moco", 2))
    assert differences(tensors(run), tensors(straight("moco", 2))) == []
    assert (run / "backbone.safetensors").exists()
    assert len(state_of(newest(run))["generators"]) == 2


@pytest.mark.slow
def test_a_run_of_one_process_is_continued_by_the_command_with_two(straight, tmp_path):
    run = tmp_path / "run"
    pretrain_in(1, run, *MOCO, stop_after=4)
    assert call(command(run, *MOCO, "trainer.processes=2"), tmp_path) == 0
    assert "saved by 1 processes, continued by 2" in (tmp_path / "output").read_text()
    torch.testing.assert_close(losses(run), losses(straight("moco", 1)), rtol=1e-3, atol=0)


def test_a_finished_run_of_two_processes_is_left_as_it_is(straight):
    run = straight("moco", 2)
    before = tensors(run)
    assert "already finished" in pretrain_in(2, run, *MOCO)
    assert finish(run, *MOCO) == run  # nor by one
    assert differences(tensors(run), before) == []
