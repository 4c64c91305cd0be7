"""What must hold for every method that compares embeddings: teachers, resume, processes, precision, and that it learns."""

import json

import pytest
import torch

from sslctl.cli import main
from sslctl.methods.base import clip_each_, enqueue
from tests.test_distributed import distance, steps_of
from tests.training import differences, edit, finish, in_processes, metrics, newest, pretrain, slow, tensors

SMALL_HEAD = ("dataset.scale.head_dim=16", "dataset.scale.prototypes=20", "scheduler.warmup_epochs=1")
METHODS = {
    "moco_v3": (),
    "nnclr": ("method.queue_size=600",),
    "dcl": (),
    "supcon": (),
    "byol": (),
    "simsiam": ("method.predictor_dim=8",),
    "dino": ("method.bottleneck_dim=8", "method.freeze_epochs=0.4", "method.teacher_temperature_warmup_epochs=1"),
    "swav": ("method.queue_size=512", "method.queue_epochs=0.6", "method.freeze_epochs=0.4"),
    "barlow_twins": (),
    "vicreg": (),
    "wmse": ("method.whitening_size=64", "method.draws=2"),
    "lejepa": ("method.slices=32",),
}
TEACHERS = ("moco_v3", "byol", "dino")
FAST = ("nnclr", "swav")


def words_of(name):
    return (f"method={name}", *SMALL_HEAD, *METHODS[name])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    made = {}

    def run(name):
        if name not in made:
            made[name] = finish(tmp_path_factory.mktemp("straight") / "run", *words_of(name))
        return made[name]

    return run


# --- Resume ---


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in METHODS])
def test_resume_at_five_points_equals_the_straight_run(name, straight, tmp_path):
    run = finish(tmp_path / "run", *words_of(name), stops=(1, 3, 5, 6, 9))
    assert differences(tensors(run), tensors(straight(name))) == []
    assert metrics(run) == metrics(straight(name))


STATE = {
    "nnclr": ("queue", "queue_pointer"),
    "swav": ("queue", "queue_filled", "prototypes.weight"),
    "dino": ("center", "teacher_head.1.weight", "teacher_backbone.network.conv1.weight"),
    "byol": ("teacher_projector.0.weight",),
    "moco_v3": ("teacher_backbone.network.conv1.weight",),
}


def spoilt(tensor):
    """A number is set to 0, the values of a tensor change places."""
    return torch.roll(tensor, 1) if tensor.ndim else tensor * 0


@pytest.mark.parametrize(
    ("name", "part"),
    [slow(n, p) if n not in FAST or p == "queue_filled" else (n, p) for n, parts in STATE.items() for p in parts],
)
def test_resume_without_a_part_of_the_state_differs(name, part, straight, tmp_path):
    run = tmp_path / "run"
    assert pretrain(run, *words_of(name), stop_after=6) == 143
    edit(newest(run), weights=lambda stored: stored.update({part: spoilt(stored[part])}))
    finish(run, *words_of(name))
    assert differences(tensors(run), tensors(straight(name))) != []


# --- Teachers, frozen parts, queues ---


def built(name, folder):
    """A method as its configuration makes it, after a finished run."""
    from sslctl.evaluation.subjects import load_method

    return load_method(finish(folder / "run", *words_of(name)))


@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_takes_no_gradient_and_moves_by_one_minus_momentum(name, tmp_path):
    method = built(name, tmp_path)
    teachers = {n: p for n, p in method.named_parameters() if n.startswith("teacher_")}
    assert teachers
    assert not any(p.requires_grad for p in teachers.values())
    before = {n: p.clone() for n, p in teachers.items()}
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(parameter.requires_grad * torch.randn_like(parameter))
    s = method.schedules(0) | {"teacher_momentum": 0.9}
    method.before_step(s)
    width = getattr(method, "center", torch.zeros(1, 1)).shape[1]
    method.after_step(s, {"logits": torch.zeros(4, 2, width)} if name == "dino" else {})
    students = dict(method.named_parameters())
    for n, p in teachers.items():
        torch.testing.assert_close(p, 0.9 * before[n] + 0.1 * students[n.removeprefix("teacher_")])


def test_dino_and_swav_leave_their_prototypes_as_they_are_while_frozen(tmp_path):
    for name, weight in (("dino", "head.1.weight"), ("swav", "prototypes.weight")):
        run = tmp_path / name
        assert pretrain(run, *words_of(name), stop_after=1) == 143
        frozen = tensors(run)[f"method/{weight}"]
        finish(run, *words_of(name), stops=(2,))
        start = built(name, tmp_path / f"{name}-start").state_dict()[weight]
        torch.testing.assert_close(frozen, start, atol=1e-6, rtol=0)
        assert not torch.allclose(tensors(run)[f"method/{weight}"], start, atol=1e-4)


def test_simsiams_predictor_keeps_its_learning_rate(tmp_path):
    run = finish(tmp_path / "run", *words_of("simsiam"))
    groups = {key: value for key, value in tensors(run).items() if key.endswith("/lr")}
    assert sorted(groups.values())[-1] == pytest.approx(0.05)
    assert sorted(groups.values())[0] < 0.01


def test_a_queue_wraps_and_keeps_the_newest():
    queue, pointer = torch.zeros(5, 1), torch.tensor(3)
    enqueue(queue, pointer, torch.arange(1.0, 4.0)[:, None])
    assert queue[:, 0].tolist() == [3, 0, 0, 1, 2]
    assert pointer == 1
    enqueue(queue, pointer, torch.arange(10.0, 17.0)[:, None])
    assert sorted(queue[:, 0].tolist()) == [12, 13, 14, 15, 16]


def test_each_gradient_is_clipped_by_itself():
    small, large = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    small.grad, large.grad = torch.tensor([0.1, 0.0, 0.0]), torch.tensor([30.0, 40.0])
    clip_each_([small, large], 3.0)
    assert small.grad.norm() == pytest.approx(0.1)
    assert large.grad.norm() == pytest.approx(3.0)


# --- Processes, precision, accumulation ---


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("name", [slow(name) for name in METHODS])
def test_two_processes_give_the_loss_and_gradients_of_one(name, tmp_path):
    words = (*words_of(name), "optimizer=sgd", "optimizer.base_lr=0.01")
    (one,) = in_processes(steps_of, tmp_path / "one", words, count=1)
    for its in in_processes(steps_of, tmp_path / "two", words):
        tolerance = 1e-2 if name == "wmse" else 1e-3  # an inverse of the covariance multiplies a rounding
        assert distance(its[0]["values"], one[0]["values"]) < tolerance
        # Together: a bias in front of a BatchNorm has no gradient but rounding.
        found, expected = ({"all": flat(run[0]["gradients"])} for run in (its, one))
        assert distance(found, expected) < tolerance
        torch.testing.assert_close(its[0]["queue"], one[0]["queue"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", slow("fp16")])
@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in METHODS])
def test_losses_in_half_precision_are_finite_and_near_those_of_fp32(name, precision, straight, tmp_path):
    words = (*words_of(name), f"trainer.precision={precision}")
    assert pretrain(tmp_path / "run", *words, stop_after=3) == 143
    for found, expected in zip(metrics(tmp_path / "run"), metrics(straight(name)), strict=False):
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.2, abs=0.1)


@pytest.mark.parametrize("name", ["nnclr", "barlow_twins", "swav", "byol"])
def test_accumulation_is_refused_with_the_reason(name, tmp_path, capsys):
    assert pretrain(tmp_path / "run", *words_of(name), "trainer.accumulate_steps=2") == 2
    said = capsys.readouterr().err
    assert "BatchNorm takes its statistics over the batch" in said
    assert not (tmp_path / "run").exists()


def test_labels_are_asked_for_where_they_are_needed(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(folder / f"{number}.png")
    words = ["pretrain", "method=supcon", "dataset=folder", f"dataset.root={folder}", "trainer.batch_size=2"]
    assert main([*words, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "supcon needs labels" in capsys.readouterr().err


def test_feature_std_is_logged_by_every_method(straight):
    for name in FAST:
        records = [json.loads(line) for line in (straight(name) / "metrics.jsonl").read_text().splitlines()]
        assert all("feature_std" in record for record in records)
