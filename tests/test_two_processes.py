"""Two processes train as one does: losses, gradients and state of every method, and whole runs."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import sslctl.training.setup
import sslctl.training.train
from tests.methods import JOINT_EMBEDDING, SINGLE_VIEW, words_of
from tests.own_methods import own
from tests.processes import call, in_processes, pretrain_in, said_by_pretrain, start_python
from tests.runs import MOCO, SIMCLR, STEPS, command, differences, edit, finish, metrics, newest, slow, state_of, tensors
from tests.sequences import recorded_batches, run
from tests.test_distributed import with_own_gradient

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
    built = {}

    def run(name, processes):
        if (name, processes) not in built:
            folder = tmp_path_factory.mktemp("run")
            built[name, processes] = in_processes(steps_of, folder / "run", RECIPES[name], count=processes)
        return built[name, processes]

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
    actual = in_processes(steps_of, tmp_path / "run", RECIPES[name], False)
    assert distance(actual[0][0]["gradients"], first_steps(name, 1)[0][0]["gradients"]) > 1e-2


def test_a_gather_without_the_others_gradient_gives_other_gradients(first_steps, tmp_path):
    actual = in_processes(steps_of, tmp_path / "run", RECIPES["simclr"], True, with_own_gradient)
    assert distance(actual[0][0]["gradients"], first_steps("simclr", 1)[0][0]["gradients"]) > 1e-2


# --- Whole runs ---

DROPOUT = (*SIMCLR, *own("DropoutSimCLR"))
WHOLE = {"moco": MOCO, "dropout": DROPOUT, "simclr": SIMCLR, "moco_v2plus": ("method=moco_v2plus", *MOCO[1:])}
WHOLE["frozen"] = (*SIMCLR, "backbone.freeze=2", "backbone.freeze_epochs=1")  # from epoch 1 on one BatchNorm over both
KNN = "evaluation.knn_every_epochs=0.4"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A recipe's name and a number of processes -> the directory of its uninterrupted run, made once."""
    built = {}

    def run(name, processes):
        if (name, processes) not in built:
            built[name, processes] = tmp_path_factory.mktemp("straight") / "run"
            pretrain_in(processes, built[name, processes], *WHOLE[name])
        return built[name, processes]

    return run


def losses(run):
    return torch.tensor([record["loss"] for record in metrics(run)])


@pytest.mark.parametrize(("name", "tolerance"), [("moco", 1e-3), slow("simclr", 3e-2)])
def test_a_run_of_two_processes_follows_that_of_one(name, tolerance, straight):
    actual, expected = straight(name, 2), straight(name, 1)
    assert [record["step"] for record in metrics(actual)] == list(range(1, STEPS + 1))
    torch.testing.assert_close(losses(actual), losses(expected), rtol=tolerance, atol=0)
    torch.testing.assert_close(losses(actual)[:3], losses(expected)[:3], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), slow(2, 4), slow(4, 1)])
def test_a_run_continues_with_another_number_of_processes(before, after, straight, tmp_path):
    pretrain_in(before, tmp_path / "run", *MOCO, stop_after=4)
    printed = pretrain_in(after, tmp_path / "run", *MOCO)
    assert "resuming at step 4 of 10" in printed
    assert f"saved by {before} processes, continued by {after}: equal to rounding, not bitwise" in printed
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
        slow("frozen", (3, 6)),
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
    actual = differences(tensors(tmp_path / "run"), tensors(straight("dropout", 2)))
    assert "method/backbone.network.conv1.weight" in actual


@pytest.mark.slow
def test_the_command_with_two_processes_finishes_and_follows_one(straight, tmp_path):
    run = tmp_path / "run"
    words = command(run, *MOCO, "trainer.processes=2")
    assert start_python(words, tmp_path).wait(timeout=120) == 0  # no process is forked, as the other tests' are
    printed = (tmp_path / "output").read_text()
    assert "1 threads in each of 2 processes with 128 images" in printed
    assert printed.count("done: ") == printed.count("starting at step 0") == 1
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


# --- Processes, precision, accumulation ---


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("name", [slow(name) for name in JOINT_EMBEDDING])
def test_two_processes_give_the_loss_gradients_and_state_of_one_for_every_method(name, tmp_path):
    """The state: queues, centres, memories, clusters, teachers, in each of the first steps."""
    words = (*words_of(name), "optimizer=sgd", "optimizer.base_lr=0.01")
    (one,) = in_processes(steps_of, tmp_path / "one", words, count=1)
    two = in_processes(steps_of, tmp_path / "two", words)
    for its in two:
        tolerance = 5e-2 if name == "wmse" else 1e-3  # an inverse of the covariance multiplies a rounding
        for step in range(LOOKED_AT):
            assert distance(its[step]["values"], one[step]["values"]) < tolerance
            # Together: a bias in front of a BatchNorm has no gradient but rounding.
            actual, expected = ({"all": flat(run[step]["gradients"])} for run in (its, one))
            assert distance(actual, expected) < tolerance
            torch.testing.assert_close(its[step]["kept"], one[step]["kept"], rtol=0, atol=1e-4)
            assert all(torch.equal(kept, two[0][step]["kept"][name]) for name, kept in its[step]["kept"].items())


@pytest.mark.parametrize("name", [slow(name) for name in SINGLE_VIEW])
def test_two_processes_give_the_loss_and_gradients_of_one_for_methods_of_one_view(name, tmp_path):
    words = (*words_of(name), "optimizer=sgd", "optimizer.base_lr=0.01")
    (one,) = in_processes(steps_of, tmp_path / "one", words, count=1)
    for its in in_processes(steps_of, tmp_path / "two", words):
        assert distance(its[0]["values"], one[0]["values"]) < 1e-3
        actual, expected = ({"all": flat(run[0]["gradients"])} for run in (its, one))
        assert distance(actual, expected) < 1e-3


# --- Resume, processes ---


def first_step(run_dir, kind, method, root, own):
    with recorded_batches() as seen, recorded_steps_of_sequences() as steps:
        assert run(method, root, run_dir, *own, stop_after=1) == 143
    return {"rows": seen[0].index, "steps": steps}


class recorded_steps_of_sequences:
    """Loss and gradients of every step."""

    def __enter__(self):
        self.patch, steps = pytest.MonkeyPatch(), []
        real = sslctl.training.train.train_step

        def train_step(setup, step, batch):
            gradients = {}
            named = [(name, p) for name, p in setup.method.named_parameters() if p.requires_grad]
            setup.method.after_backward = lambda s: gradients.update((name, p.grad.clone()) for name, p in named)
            result = real(setup, step, batch)
            steps.append({"loss": result[2]["loss"], "gradients": gradients})
            return result

        self.patch.setattr(sslctl.training.train, "train_step", train_step)
        self.patch.setattr(torch.nn.functional, "relu", lambda x, inplace=False: torch.nn.functional.softplus(x))
        return steps

    def __exit__(self, *_):
        self.patch.undo()


WITHOUT_DROPOUT = {"language": ("optimizer=sgd", "backbone.dropout=0.0"), "order": ("method.dropout=0",)}


@pytest.mark.parametrize("kind", [slow("verification"), slow("order"), slow("language")])
def test_two_processes_give_the_loss_and_gradients_of_one_for_sequences(kind, sequences, tmp_path):
    arguments = (kind, *sequences(kind))
    arguments = (
        *arguments[:3],
        (*arguments[3], *WITHOUT_DROPOUT.get(kind, ())),
    )
    (one,) = in_processes(first_step, tmp_path / "one", *arguments, count=1)
    two = in_processes(first_step, tmp_path / "two", *arguments)
    assert torch.equal(torch.cat([its["rows"] for its in two]), one["rows"])
    for its in two:
        left, right = its["steps"][0], one["steps"][0]
        assert left["loss"].item() == pytest.approx(right["loss"].item(), rel=1e-4)
        flat = [
            torch.cat([side["gradients"][name].flatten() for name in sorted(side["gradients"])])
            for side in (left, right)
        ]
        assert distance({"all": flat[0]}, {"all": flat[1]}) < 1e-3
