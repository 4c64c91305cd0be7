"""A run that was stopped and continued equals one that was not, bit for bit, and what must be saved for that is."""

import contextlib
import os
import random
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sslctl.commands.pretrain
import sslctl.evaluation.online
import sslctl.training.setup
from sslctl.evaluation.online import Embedder
from sslctl.runs import checkpoint
from sslctl.signals import Signals
from tests.methods import METHODS, words_of
from tests.own_methods import BeginningSimCLR, own
from tests.processes import logged_steps
from tests.runs import (
    MOCO,
    SIMCLR,
    STEPS,
    STEPS_PER_EPOCH,
    contents,
    differences,
    edit,
    finish,
    image_folder,
    metrics,
    newest,
    pretrain,
    slow,
    state_of,
    tensors,
)
from tests.sequences import finished, run

VIT = (
    *("backbone=timm", "backbone.model=vit_tiny_patch16_224", "+backbone.kwargs.patch_size=4", "dataset.image_size=8"),
    *("+backbone.kwargs.depth=2", "+backbone.kwargs.embed_dim=24", "+backbone.kwargs.num_heads=2"),
)
RECIPES = {
    "simclr": SIMCLR,
    "moco_v1": ("method=moco_v1", *MOCO[1:], "scheduler.milestones_epochs=[1]"),
    "moco_v2": MOCO,
    "moco_v2plus": ("method=moco_v2plus", *MOCO[1:]),
    "dropout": (*SIMCLR, *own("DropoutSimCLR")),
    "vit with drop path": (*SIMCLR, *VIT, "+backbone.kwargs.drop_path_rate=0.3"),
    "knn": (*MOCO, "evaluation.knn_every_epochs=1"),
    "knn and dropout": (*SIMCLR, *own("DropoutSimCLR"), "evaluation.knn_every_epochs=0.4"),
} | {name: (*MOCO, f"optimizer={name}") for name in ("adamw", "lars", "rmsprop")}

STOPS = (1, 3, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, STEPS)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The name of a recipe or method -> the directory of its uninterrupted run, made once."""
    built = {}

    def run(name):
        if name not in built:
            words = RECIPES[name] if name in RECIPES else words_of(name)
            built[name] = finish(tmp_path_factory.mktemp("straight") / "run", *words)
        return built[name]

    return run


def same_run(left, right):
    assert differences(tensors(left), tensors(right)) == []
    assert metrics(left) == metrics(right)


# --- Stopped and continued ---


@pytest.mark.parametrize("stop", STOPS)
def test_resume_at_any_step_equals_the_straight_run(stop, straight, tmp_path):
    same_run(finish(tmp_path / "run", *RECIPES["moco_v2plus"], stops=(stop,)), straight("moco_v2plus"))


@pytest.mark.parametrize("stops", [(1, 3), (6, 7, 8), slow((1, 2, 3, 4, 5, 6, 7, 8, 9))])
def test_several_resumes_in_one_epoch_equal_the_straight_run(stops, straight, tmp_path):
    same_run(finish(tmp_path / "run", *RECIPES["moco_v2plus"], stops=stops), straight("moco_v2plus"))


@pytest.mark.parametrize("recipe", ["dropout", "adamw", *map(slow, ("lars", "rmsprop", "knn and dropout"))])
def test_resume_in_mid_epoch_equals_the_straight_run(recipe, straight, tmp_path):
    torch.manual_seed(999)  # whatever the generators held before must not matter
    same_run(finish(tmp_path / "run", *RECIPES[recipe], stops=(2, 7)), straight(recipe))


def test_the_same_command_twice_gives_the_same_weights(straight, tmp_path):
    same_run(finish(tmp_path / "run", *RECIPES["moco_v2"]), straight("moco_v2"))


def test_another_seed_gives_other_weights(straight, tmp_path):
    actual = differences(tensors(finish(tmp_path / "run", *RECIPES["moco_v2"], "seed=1")), tensors(straight("moco_v2")))
    assert "method/backbone.network.conv1.weight" in actual


def test_numpys_and_pythons_generators_are_restored(tmp_path):
    def seed(value):
        random.seed(value)
        np.random.seed(value)

    words = (*SIMCLR, *own("NoisySimCLR"))
    seed(1)
    whole = finish(tmp_path / "whole", *words)
    seed(1)
    assert pretrain(tmp_path / "parts", *words, stop_after=4) == 143
    seed(2)
    same_run(finish(tmp_path / "parts", *words), whole)


def test_saving_and_logging_at_other_steps_changes_no_weight(straight, tmp_path):
    words = ("trainer.save_every_steps=1", "trainer.log_every_steps=3", "trainer.tensorboard=true")
    run = finish(tmp_path / "run", *RECIPES["dropout"], *words, stops=(4,))
    assert differences(tensors(run), tensors(straight("dropout"))) == []
    assert [m["step"] for m in metrics(run)] == [3, 6, 9, 10]


def test_a_run_keeps_the_thread_count_it_began_with(straight, tmp_path, capsys):
    assert pretrain(tmp_path / "run", *RECIPES["moco_v2"], stop_after=4) == 143
    same_run(finish(tmp_path / "run", *RECIPES["moco_v2"], "trainer.threads=2"), straight("moco_v2"))
    assert "1 threads as the run began with, not 2" in capsys.readouterr().out
    assert state_of(newest(tmp_path / "run"))["threads"] == 1
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_whose_beginning_is_cut_short_begins_again_as_it_did(epoch, tmp_path, monkeypatch):
    """With what a user's method draws from the global generator there, and has written by then."""
    words, calls, real = (*SIMCLR, *own("BeginningSimCLR")), [], Embedder.__call__

    def embed(self, function, **keywords):
        calls.append(function)
        if len(calls) == 3 * epoch + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, function, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "__call__", embed)
        assert pretrain(tmp_path / "run", *words) == 143
    assert [path.name for path in checkpoint.steps_on_disk(tmp_path / "run")] == (["step-5"] if epoch else [])
    same_run(finish(tmp_path / "run", *words), finish(tmp_path / "straight", *words))


def test_an_epoch_begins_once_however_many_parts_a_step_has(tmp_path, monkeypatch):
    calls, real = [], BeginningSimCLR.start_epoch
    monkeypatch.setattr(
        BeginningSimCLR, "start_epoch", lambda self, epoch, embed: calls.append(epoch) or real(self, epoch, embed)
    )
    parts = ("trainer.accumulate_steps=4", "trainer.accumulate_approximately=true")
    finish(tmp_path / "run", *SIMCLR, *own("BeginningSimCLR"), *parts)
    assert calls == [0, 1]


# --- What the resume needs: without it, the weights differ ---


def _other_queue(stored):
    torch.manual_seed(5)
    stored["queue"].copy_(F.normalize(torch.randn_like(stored["queue"]), dim=1))


def _no_teacher(stored):
    for name in stored:
        if name.startswith("teacher_"):
            stored[name].copy_(stored[name.removeprefix("teacher_")])


def _other_generators(state):
    torch.manual_seed(5)
    state["generators"][0]["torch"] = torch.get_rng_state()


def _zero(*names):
    def edit_state(state):
        for buffers in state["optimizer"]["state"].values():
            for name in names:
                buffers[name].zero_()

    return edit_state


@pytest.mark.parametrize(
    ("recipe", "stop", "part", "change"),
    [
        ("moco_v2", 3, "weights", _other_queue),
        ("moco_v2", 3, "weights", lambda stored: stored["queue_pointer"].zero_()),
        ("moco_v2", 5, "weights", lambda stored: stored["queue_index"].fill_(-1)),
        slow("moco_v2", 3, "weights", _no_teacher),
        ("dropout", 3, "state", _other_generators),
        slow("vit with drop path", 3, "state", _other_generators),
        ("moco_v2", 3, "state", _zero("momentum_buffer")),
        slow("lars", 3, "state", _zero("momentum")),
        slow("adamw", 3, "state", _zero("exp_avg")),
        slow("adamw", 3, "state", _zero("exp_avg_sq")),
        slow("adamw", 3, "state", _zero("step")),
    ],
    ids=[
        *("queue", "queue_pointer", "queue_index", "teacher", "generators of dropout", "generators of drop path"),
        *("momentum of sgd", "momentum of lars", "first moment of adamw", "second moment of adamw", "step of adamw"),
    ],
)
def test_resume_without_a_part_of_the_state_differs(recipe, stop, part, change, straight, tmp_path):
    run = tmp_path / "run"
    assert pretrain(run, *RECIPES[recipe], stop_after=stop) == 143
    edit(newest(run), **{part: change})
    actual = differences(tensors(finish(run, *RECIPES[recipe])), tensors(straight(recipe)))
    assert any(name.startswith("method/backbone.") and name.endswith("weight") for name in actual)


@pytest.mark.parametrize("skew", [-3, slow(1)], ids=["the epoch's first batch again", "one batch further"])
def test_resume_at_another_position_differs(skew, straight, tmp_path, monkeypatch):
    run, real = tmp_path / "run", sslctl.training.setup.batches
    assert pretrain(run, *RECIPES["simclr"], stop_after=3) == 143

    def skewed(*arguments, first_step, total_steps, **keywords):
        return real(*arguments, first_step=first_step + skew, total_steps=total_steps + skew, **keywords)

    monkeypatch.setattr(sslctl.training.setup, "batches", skewed)
    actual = differences(tensors(finish(run, *RECIPES["simclr"])), tensors(straight("simclr")))
    assert "method/backbone.network.conv1.weight" in actual


# --- Every method: chains of five stops, and what its state must hold ---

FAST = ("nnclr", "swav", "seed", "mae")
STATE = {
    "nnclr": ("queue", "queue_pointer"),
    "swav": ("queue", "queue_filled", "prototypes.weight"),
    "dino": ("center", "teacher_head.1.weight", "teacher_backbone.network.conv1.weight"),
    "byol": ("teacher_projector.0.weight",),
    "moco_v3": ("teacher_backbone.network.conv1.weight",),
    "ibot": ("centers", "mask_token", "teacher_head.1.weight"),
    "dinov2": ("mask_token", "teacher_heads.1.1.lengths"),
    "dinov2-centred": ("center", "patch_center"),
    "dinov3": ("gram_teacher.network.model.blocks.0.attn.qkv.weight", "teacher_heads.0.1.weight"),
    "deepcluster_v2": ("memory", "centroids", "assignments"),
    "msn": ("prototypes.weight", "teacher_projector.0.weight"),
    "seed": ("queue", "queue_pointer"),
    "compress": ("teacher_memory", "student_memory", "memory_pointer", "key_backbone.network.conv1.weight"),
    "distill": ("queue", "queue_pointer", "patch_projector.0.weight"),
    "diet": ("classifier.weight",),
    "rotation": ("classifier.weight",),
    "relative_patch": ("classifier.0.weight",),
    "jigsaw": ("table", "tile_head.0.weight"),
    "autoencoder": ("bottleneck.weight",),
    "vae": ("log_variance_head.bias",),
    "colorization": ("frequency", "counted"),
    "inpainting": ("discriminator.0.weight",),
    "mae": ("mask_token",),
    "simmim": ("mask_token",),
    "ijepa": ("teacher_backbone.network.model.blocks.0.attn.qkv.weight", "mask_token"),
}
FAST_PARTS = (
    *(("nnclr", part) for part in STATE["nnclr"]),
    *(("swav", "queue"), ("swav", "prototypes.weight")),
    *(("seed", part) for part in STATE["seed"]),
)


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in METHODS])
def test_resume_at_five_points_equals_the_straight_run(name, straight, tmp_path):
    same_run(finish(tmp_path / "run", *words_of(name), stops=(1, 3, 5, 6, 9)), straight(name))


def spoilt(tensor):
    """A number is set to 0, the values of a tensor change places."""
    return torch.roll(tensor, 1) if tensor.ndim else tensor * 0


@pytest.mark.parametrize(
    ("name", "part"),
    [(n, p) if (n, p) in FAST_PARTS else slow(n, p) for n, parts in STATE.items() for p in parts],
)
def test_resume_without_a_part_of_a_methods_state_differs(name, part, straight, tmp_path):
    run = tmp_path / "run"
    stop = 4 if name == "deepcluster_v2" else 6  # its memory is read where an epoch begins, at step 5
    assert pretrain(run, *words_of(name), stop_after=stop) == 143
    edit(newest(run), weights=lambda stored: stored.update({part: spoilt(stored[part])}))
    finish(run, *words_of(name))
    actual = differences(tensors(run), tensors(straight(name)))
    assert any(n.startswith("method/backbone.") and n.endswith("weight") for n in actual)  # not the part alone


# --- Evaluation while training ---


@pytest.mark.parametrize(("with_knn", "without"), [("knn", "moco_v2"), ("knn and dropout", "dropout")])
def test_online_evaluation_changes_no_weight(with_knn, without, straight):
    assert differences(tensors(straight(with_knn)), tensors(straight(without))) == []
    logged = [m["step"] for m in metrics(straight(with_knn)) if "knn" in m and m["step"]]
    assert logged == ([5, 10] if with_knn == "knn" else [2, 4, 6, 8, 10])


@pytest.mark.parametrize("stop", [slow(4), 5, slow(6), 10])
def test_resume_around_an_online_evaluation_logs_it_once(stop, straight, tmp_path):
    same_run(finish(tmp_path / "run", *RECIPES["knn"], stops=(stop,)), straight("knn"))


@contextlib.contextmanager
def _signal_in_evaluation(run_dir, step):
    """A SIGTERM in the online evaluation after a step."""
    real = sslctl.evaluation.online.extract

    def extract(*arguments, **keywords):
        if logged_steps(run_dir) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sslctl.evaluation.online, "extract", extract)
        yield


@pytest.mark.parametrize(("step", "save_every_steps"), [(5, 1), (5, 1000), slow(10, 1), slow(10, 1000)])
def test_a_signal_in_an_online_evaluation_saves_and_redoes_it(step, save_every_steps, straight, tmp_path):
    run, words = tmp_path / "run", (*RECIPES["knn"], f"trainer.save_every_steps={save_every_steps}")
    with _signal_in_evaluation(run, step):
        assert pretrain(run, *words) == 143
    assert newest(run).name == f"step-{step}"
    assert [m["step"] for m in metrics(run) if m["step"] >= step] == [step]  # its loss, and no kNN
    same_run(finish(run, *words), straight("knn"))


def test_a_signal_in_the_evaluation_before_the_first_step_redoes_it(straight, tmp_path):
    with _signal_in_evaluation(tmp_path / "run", 0):
        assert pretrain(tmp_path / "run", *RECIPES["knn"]) == 143
    same_run(finish(tmp_path / "run", *RECIPES["knn"]), straight("knn"))


def test_a_signal_in_the_evaluation_that_a_resume_begins_with_redoes_it(straight, tmp_path):
    assert pretrain(tmp_path / "run", *RECIPES["knn"], stop_after=5) == 143
    with _signal_in_evaluation(tmp_path / "run", 5):
        assert pretrain(tmp_path / "run", *RECIPES["knn"]) == 143
    same_run(finish(tmp_path / "run", *RECIPES["knn"]), straight("knn"))


@pytest.mark.parametrize("look", range(1, 5))
def test_a_signal_between_two_looks_at_the_flag_loses_no_step(look, tmp_path, monkeypatch):
    looks = []

    class Late(Signals):
        """Sees the signal when it looks for the given time, and from then on."""

        @property
        def status(self):
            looks.append(1)
            return 143 if len(looks) >= look else 0

        @status.setter
        def status(self, value):
            assert value == 0

    monkeypatch.setattr(sslctl.commands.pretrain, "Signals", Late)
    assert pretrain(tmp_path / "run", *SIMCLR, "trainer.save_every_steps=1000") == 143
    assert newest(tmp_path / "run").name == f"step-{metrics(tmp_path / 'run')[-1]['step']}"


# --- Streamed images and worker processes ---


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """Overrides for images of different sizes: decoded while training, 6 steps an epoch."""
    root = image_folder(tmp_path_factory.mktemp("images"), images=50)
    return (
        *("dataset=imagefolder", f"dataset.root={root}", "dataset.image_size=16", "trainer.batch_size=6"),
        *("method=moco", "method.queue_size=20", "method.batchnorm_groups=2", "evaluation.knn_every_epochs=1"),
    )


@pytest.fixture(scope="module")
def without_workers(streamed, tmp_path_factory):
    return finish(tmp_path_factory.mktemp("straight") / "run", *streamed, "trainer.workers=0")


@pytest.mark.parametrize("workers", [slow(1), 2])
def test_weights_do_not_depend_on_the_workers(workers, streamed, without_workers, tmp_path):
    same_run(finish(tmp_path / "run", *streamed, f"trainer.workers={workers}"), without_workers)


@pytest.mark.parametrize(("before", "after"), [(2, 2), slow(0, 2), slow(2, 0)])
def test_resume_in_mid_epoch_with_workers_equals_the_straight_run(before, after, streamed, without_workers, tmp_path):
    run = tmp_path / "run"
    assert pretrain(run, *streamed, f"trainer.workers={before}", stop_after=3) == 143
    assert pretrain(run, *streamed, f"trainer.workers={after}", stop_after=8) == 143
    same_run(finish(run, *streamed, f"trainer.workers={after}"), without_workers)


@pytest.mark.parametrize("workers", [0, slow(2)])
def test_loaders_draw_nothing_from_the_generator_of_dropout(workers, streamed, tmp_path):
    words = (*streamed[:4], *SIMCLR, *own("DropoutSimCLR"), f"trainer.workers={workers}")
    whole = finish(tmp_path / "whole", *words, "evaluation.knn_every_epochs=1")
    parts = finish(tmp_path / "parts", *words, "evaluation.knn_every_epochs=null", stops=(2, 8))
    assert differences(tensors(parts), tensors(whole)) == []


# --- The same command on a finished run ---


def test_a_finished_run_is_left_as_it_is(straight, capsys):
    run = straight("moco_v1")
    before = contents(run, without=("lock",))
    assert pretrain(run, *RECIPES["moco_v1"]) == 0
    assert "already finished" in capsys.readouterr().out
    assert contents(run, without=("lock",)) == before


# --- Resume, processes ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", [slow("verification"), slow("order"), "language"])
def test_resume_of_sequences_at_five_points_equals_the_straight_run(kind, sequences, tmp_path):
    straight = finished(kind, sequences, tmp_path / "straight")
    assert metrics(straight)[-1]["step"] >= 10
    stopped = finished(kind, sequences, tmp_path / "stopped", stops=(1, 3, 5, 6, 9))
    assert differences(tensors(stopped), tensors(straight)) == []
    assert metrics(stopped) == metrics(straight)
    if kind != "language":
        worked = finished(kind, sequences, tmp_path / "workers", "trainer.workers=1", stops=(4,))
        assert differences(tensors(worked), tensors(straight)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "part"),
    [
        slow("verification", "classifier.0.weight"),
        slow("order", "pair_head.0.weight"),
        slow("order", "classifier.weight"),
        ("language", "bias"),
    ],
)
def test_resume_of_sequences_without_a_part_of_the_state_differs(kind, part, sequences, tmp_path):
    straight = finished(kind, sequences, tmp_path / "straight")
    method, root, own = sequences(kind)
    stopped = tmp_path / "stopped"
    assert run(method, root, stopped, *own, stop_after=6) == 143
    edit(newest(stopped), weights=lambda stored: stored.update({part: stored[part].roll(1, 0)}))
    finished(kind, sequences, stopped)
    assert differences(tensors(stopped), tensors(straight)) != []
