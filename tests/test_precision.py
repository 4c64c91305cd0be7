"""fp32, bf16 and fp16: which steps count, what stays float32, and what a stopped run needs besides its weights."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

import sslctl.training.train
from sslctl.models.heads import Prototypes
from sslctl.training.precision import MOST_SKIPPED, NonFiniteError, Precision
from sslctl.views import Key, ViewMaker
from tests.by_hand import make_batch, tiny_backbone, view_settings
from tests.methods import built, words_of
from tests.own_methods import own
from tests.runs import (
    MOCO,
    SIMCLR,
    STEPS,
    SUPERVISED,
    differences,
    edit,
    finish,
    metrics,
    newest,
    pretrain,
    slow,
    state_of,
    tensors,
)

FP16 = "trainer.precision=fp16"
OVERFLOWING = (*MOCO, *own("OverflowingMoCo"), FP16, "trainer.save_every_steps=1")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def copied(setup):
    """Every tensor of a method and its optimizer."""
    buffers = setup.optimizer.state_dict()["state"]
    flat = {f"optimizer/{i}/{name}": value for i, state in buffers.items() for name, value in state.items()}
    return copy.deepcopy({**setup.method.state_dict(), **flat})


@pytest.fixture
def watched(monkeypatch):
    """One (tensors before, after, loss scale after, output) for every training step."""
    steps, real = [], sslctl.training.train.train_step

    def train_step(setup, step, batch):
        before = copied(setup)
        result = real(setup, step, batch)
        steps.append((before, copied(setup), setup.precision.scaler.get_scale(), result[2]))
        return result

    monkeypatch.setattr(sslctl.training.train, "train_step", train_step)
    return steps


def changed(before, after):
    """Names of what a step changed, without the moving average of a teacher and BatchNorm's count of calls."""
    names = [n for n in after if n not in before or not torch.equal(after[n], before[n])]
    averaged = [n for n in names if n.startswith("teacher_") and "running_" not in n]
    return [n for n in names if n not in averaged and not n.endswith("num_batches_tracked")]


# --- Overflow in fp16 ---


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])])
@pytest.mark.parametrize("fault", ["loss", "images"])
def test_an_overflowed_step_changes_nothing_and_is_counted(fault, device, watched, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_FAULT", f"{fault}@3-4")
    run = finish(tmp_path / "run", *OVERFLOWING, f"trainer.device={device}")
    for step, (before, after, *_) in enumerate(watched):
        assert (changed(before, after) == []) == (step in (3, 4)), f"step {step}"
        assert all(torch.isfinite(t).all() for t in after.values())
    scales = [scale for _, _, scale, _ in watched]
    assert scales == [2.0**16] * 3 + [2.0**15] + [2.0**14] * 6
    assert [m["skipped_steps"] for m in metrics(run)] == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert state_of(newest(run))["skipped"] == [2, 0]
    assert watched[-1][1]["queue_pointer"] == 8 * 256 % 600


def test_running_statistics_overflow_when_they_are_not_put_back(watched, tmp_path, monkeypatch):
    monkeypatch.setattr(Precision, "snapshot_batchnorm", lambda self: setattr(self, "before", self.statistics))
    monkeypatch.setenv("TEST_FAULT", "images@3-3")
    finish(tmp_path / "run", *OVERFLOWING)
    assert not all(torch.isfinite(t).all() for name, t in watched[3][1].items() if "running_" in name)


def test_a_skipped_step_moves_a_teacher_only_towards_its_student(watched, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_FAULT", "loss@3-3")
    finish(tmp_path / "run", *OVERFLOWING, "method.teacher_momentum=0.5")
    before, after, *_ = watched[3]
    for name, teacher in before.items():
        if name.startswith("teacher_") and name.endswith("weight"):
            expected = (teacher + before[name.removeprefix("teacher_")]) / 2
            torch.testing.assert_close(after[name], expected, atol=1e-7, rtol=1e-6)


def test_too_many_overflows_in_a_row_stop_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEST_FAULT", "loss@2-100")
    words = (*OVERFLOWING, "trainer.epochs=6", "scheduler=constant", "trainer.keep_last=30")
    assert pretrain(tmp_path / "run", *words, stop_after=12) == 143  # the count goes on where it was
    capsys.readouterr()
    assert pretrain(tmp_path / "run", *words) == 1
    printed = capsys.readouterr().err
    for words in ("step 21", f"{MOST_SKIPPED} steps in a row", "lr 0.03", "digits train image "):
        assert words in printed
    assert len(printed.strip().splitlines()) == 1
    assert newest(tmp_path / "run").name == "step-21"  # of 20 good and bad steps, not of the last
    kept = tensors(tmp_path / "run")
    assert all(torch.isfinite(t).all() for t in kept.values() if isinstance(t, torch.Tensor))
    assert (kept["state/skipped/0"], kept["state/skipped/1"]) == (19, 19)
    assert kept["method/queue_pointer"] == 2 * 256


@pytest.mark.slow
def test_a_good_step_between_overflows_begins_the_count_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_FAULT", "loss@0-18")
    run = finish(tmp_path / "run", *OVERFLOWING, "trainer.epochs=4")
    assert state_of(newest(run))["skipped"] == [19, 0]


@pytest.mark.parametrize("words", [("optimizer=adamw",), slow(("trainer.clip_grad_norm=0.1",))])
def test_overflows_leave_other_optimizers_as_they_are(words, watched, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_FAULT", "loss@3-3")
    finish(tmp_path / "run", *OVERFLOWING, *words)
    assert changed(*watched[3][:2]) == []
    assert all(torch.isfinite(t).all() for t in watched[-1][1].values())


# --- Stopped and continued ---


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    produced = {}

    def run(*words):
        if words not in produced:
            produced[words] = finish(tmp_path_factory.mktemp("straight") / "run", *words)
        return produced[words]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(4, 5), *map(slow, ((1,), (2, 5, 7), (9, 10)))])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resume_equals_the_straight_run(precision, stops, straight, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_FAULT", "loss@3-4" if precision == "fp16" else "loss@99-99")
    words = (*OVERFLOWING, f"trainer.precision={precision}")
    run = finish(tmp_path / "run", *words, stops=stops)
    assert differences(tensors(run), tensors(straight(*words))) == []
    assert metrics(run) == metrics(straight(*words))


def test_without_the_loss_scale_a_resume_differs(straight, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_FAULT", "loss@3-4")
    assert pretrain(tmp_path / "run", *OVERFLOWING, stop_after=6) == 143
    edit(newest(tmp_path / "run"), state=lambda state: state["scaler"].update(scale=2.0**-6))
    finish(tmp_path / "run", *OVERFLOWING)
    actual = differences(tensors(tmp_path / "run"), tensors(straight(*OVERFLOWING)))
    assert "method/backbone.network.conv1.weight" in actual
    assert "state/scaler/scale" in actual


# --- What is float32 ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_prototypes_under_autocast_are_those_of_fp32(dtype):
    torch.manual_seed(0)
    prototypes, z = Prototypes(32, 50), torch.randn(64, 32)
    expected, low = prototypes(z), z.to(dtype)
    of_low = prototypes(low.float())
    with torch.autocast("cpu", dtype):
        actual, found_of_low = prototypes(z), prototypes(low)
        rounded = F.linear(F.normalize(z, dim=1), prototypes.weight)
    assert (actual.dtype, found_of_low.dtype, rounded.dtype) == (torch.float32, torch.float32, dtype)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found_of_low, of_low, atol=1e-5, rtol=0)
    assert (rounded.float() - expected).abs().max() > 1e-4  # what a product in the lower precision would give


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_nearest_neighbours_of_nnclr_under_autocast_are_those_of_fp32(dtype):
    method = built("nnclr", "method.queue_size=4096", "method.out_dim=16").method
    z = torch.randn(256, 16)
    expected, low = method.nearest(z), z.to(dtype)
    of_low = method.nearest(low.float())
    with torch.autocast("cpu", dtype):
        actual, found_of_low = method.nearest(z), method.nearest(low)
        rounded = method.queue[(F.normalize(z, dim=1) @ method.queue.T).argmax(1)]
    assert torch.equal(actual, expected)
    assert torch.equal(found_of_low, of_low)
    assert not torch.equal(rounded, expected)  # others are taken for the nearest in the lower precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", [SIMCLR, MOCO, SUPERVISED], ids=["simclr", "moco", "supervised"])
def test_losses_and_weights_stay_float32(method, precision, watched, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(F, "cross_entropy", _noting(F.cross_entropy, seen))
    assert pretrain(tmp_path / "run", *method, f"trainer.precision={precision}", stop_after=4) == 143
    assert set(seen) == {torch.float32}
    for *_, result in watched:
        assert result["loss"].dtype == torch.float32
        assert torch.isfinite(result["loss"])
    for name, tensor in watched[-1][1].items():
        assert tensor.dtype == (torch.float32 if tensor.is_floating_point() else torch.int64), name


def _noting(function, seen):
    def noted(values, *rest, **keywords):
        seen.append(values.dtype)
        return function(values, *rest, **keywords)

    return noted


@pytest.mark.slow
def test_bf16_is_used_where_it_is_asked_for(watched, tmp_path):
    finish(tmp_path / "low", *SIMCLR, "trainer.precision=bf16")
    low = watched[0][3]["loss"]
    watched.clear()
    finish(tmp_path / "high", *SIMCLR)
    high = watched[0][3]["loss"]
    assert low != high
    torch.testing.assert_close(low, high, atol=0.05, rtol=0)


NEAR, NEARER = {"rel": 0.2, "abs": 0.1}, {"rel": 0.1, "abs": 0.05}


@pytest.mark.parametrize(
    ("name", "precision", "bound"),
    [
        *(("swav", "bf16", NEAR), ("seed", "bf16", NEAR), ("mae", "bf16", NEARER)),
        *(slow("dino", "fp16", NEAR), slow("wmse", "fp16", NEAR), slow("inpainting", "fp16", NEARER)),
        *(slow("diet", "bf16", NEARER), slow("distill", "bf16", NEARER)),
    ],
)
def test_losses_in_half_precision_are_finite_and_near_those_of_fp32(name, precision, bound, tmp_path):
    """A method's own castings; the losses by themselves: test_losses_in_half_precision.py."""
    for folder, words in (("low", (f"trainer.precision={precision}",)), ("high", ())):
        assert pretrain(tmp_path / folder, *words_of(name), *words, stop_after=3) == 143
    for actual, expected in zip(metrics(tmp_path / "low"), metrics(tmp_path / "high"), strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], **bound)


# --- Not a number, where the device is not waited for ---


def precision_of(name="fp32"):
    return Precision(name, torch.device("cpu"), tiny_backbone(), lambda i: f"image {i}")


def test_the_first_bad_step_is_the_one_that_is_reported():
    precision, good = precision_of(), torch.tensor(1.0)
    first, second = make_batch(6, start=10), make_batch(6, start=30)
    precision._note(0, good, good, second)
    precision.raise_if_nonfinite(lambda step: 0.0)
    precision._note(1, good, torch.tensor(float("inf")), first)
    precision._note(2, torch.tensor(float("nan")), good, second)
    precision._note(3, good, good, second)
    with pytest.raises(
        NonFiniteError, match=r"gradient is inf at step 1 \(lr 0.1\).*image 10, image 11, image 12, image 13"
    ):
        precision.raise_if_nonfinite(lambda step: step / 10)


def test_a_bad_first_step_is_reported():
    precision = precision_of("bf16")
    precision._note(0, torch.tensor(float("nan")), torch.tensor(float("nan")), make_batch(2, start=5))
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 0 .*image 5, image 6"):
        precision.raise_if_nonfinite(lambda step: 0.1)


def test_good_steps_raise_nothing():
    precision = precision_of()
    precision.raise_if_nonfinite(lambda step: 0.1)
    for step in range(3):
        precision._note(step, torch.tensor(2.0), torch.tensor(0.0), make_batch(2))
        precision.raise_if_nonfinite(lambda step: 0.1)


@pytest.mark.parametrize("every", [("log", 5), ("save", 4), ("knn", 5)])
def test_a_noted_step_is_found_before_anything_is_logged_or_saved(every, tmp_path, capsys, monkeypatch):
    def should_step(self, step, lr, loss, norm, batch):  # as on a GPU
        self._note(step, loss, norm, batch)
        return True

    monkeypatch.setattr(Precision, "should_step", should_step)
    monkeypatch.setenv("TEST_FAULT", "nan loss@2")
    what, steps = every
    words = {"log_every": 1000, "save_every": 1000} | {f"{what}_every": steps}
    run = tmp_path / "run"
    chosen = [f"trainer.{name}_steps={value}" for name, value in words.items() if not name.startswith("knn")]
    chosen += ["evaluation.knn_every_epochs=1"] if what == "knn" else []
    assert pretrain(run, *MOCO, *own("FailingMoCo"), *chosen) == 1
    assert "at step 2 " in capsys.readouterr().err
    assert not list((run / "checkpoints").glob("step-*"))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] if what == "knn" else []
    assert [m["step"] for m in logged] == ([0] if what == "knn" else [])


@pytest.mark.parametrize("fault", ["nan loss", "inf loss", "nan gradient"])
@pytest.mark.parametrize("precision", ["bf16", slow("fp32")])
def test_a_bad_number_stops_before_optimizer_and_queue(precision, fault, tmp_path, capsys, monkeypatch):
    from tests.own_methods import FailingMoCo

    monkeypatch.setenv("TEST_FAULT", f"{fault}@3")
    words = (*MOCO, *own("FailingMoCo"), f"trainer.precision={precision}", "trainer.save_every_steps=1")
    assert pretrain(tmp_path / "run", *words) == 1
    assert "step 3 " in capsys.readouterr().err
    assert newest(tmp_path / "run").name == "step-3"
    kept, alive = tensors(tmp_path / "run"), FailingMoCo.alive.state_dict()
    same = [n for n in alive if not n.startswith("teacher") and "running_" not in n and "num_batches" not in n]
    assert [n for n in same if not torch.equal(alive[n], kept[f"method/{n}"])] == []


@pytest.mark.slow
def test_fp16_survives_one_number_that_is_not_finite(tmp_path, monkeypatch):
    for fault in ("nan loss", "inf loss", "nan gradient"):
        monkeypatch.setenv("TEST_FAULT", f"{fault}@3")
        run = finish(tmp_path / fault.replace(" ", "-"), *MOCO, *own("FailingMoCo"), FP16)
        assert metrics(run)[-1]["skipped_steps"] == 1
        assert all(torch.isfinite(t).all() for t in tensors(run).values() if isinstance(t, torch.Tensor))


# --- On a GPU ---


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [SIMCLR, MOCO, (*MOCO, "method.symmetric=true")])
def test_steps_between_two_records_do_not_wait_for_the_gpu(method, precision, tmp_path, monkeypatch):
    real = sslctl.training.train.train_step

    def train_step(setup, step, batch):
        result = real(setup, step, batch)
        if step == 1:  # the first ones choose kernels and make buffers
            torch.cuda.set_sync_debug_mode("error")
        if step == STEPS - 2:
            torch.cuda.set_sync_debug_mode("default")
        return result

    monkeypatch.setattr(sslctl.training.train, "train_step", train_step)
    words = ("trainer.device=cuda", "trainer.log_every_steps=1000", "trainer.save_every_steps=1000")
    try:
        finish(tmp_path / "run", *method, f"trainer.precision={precision}", *words)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("augmentation", ["simclr", "moco_v1", "moco_v2"])
def test_views_on_a_gpu_equal_those_of_a_cpu(augmentation):
    views = ViewMaker(view_settings(augmentation), 32)
    images = torch.randint(0, 256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    index = torch.arange(64)
    expected = views(images, Key(0, 1, index))["global"]
    actual = views(images.cuda(), Key(0, 1, index.cuda()))["global"]
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_deterministic_resume_on_a_gpu_equals_the_straight_run(precision, straight, tmp_path):
    words = (*MOCO, "trainer.device=cuda", "trainer.deterministic=true", f"trainer.precision={precision}")
    run = finish(tmp_path / "run", *words, stops=(2, 7))
    assert differences(tensors(run), tensors(straight(*words))) == []
    assert metrics(run) == metrics(straight(*words))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("fault", ["nan loss", "inf loss", "nan gradient"])
def test_a_bad_number_on_a_gpu_stops_before_it_is_saved(fault, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEST_FAULT", f"{fault}@3")
    words = (
        *MOCO,
        *own("FailingMoCo"),
        "trainer.device=cuda",
        "trainer.log_every_steps=2",
        "trainer.save_every_steps=2",
    )
    assert pretrain(tmp_path / "run", *words) == 1
    assert "at step 3 " in capsys.readouterr().err
    assert newest(tmp_path / "run").name == "step-2"
