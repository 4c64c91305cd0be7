"""Nothing grows with a run; a clock that jumps and a small disk do it no harm. scripts/long_run.py is the long form."""

import contextlib
import itertools
import re
import subprocess
import time
import types

import pytest
from kill_traces import points
from long_run import disk_excess, leaks, sampled

import sslctl.commands.pretrain
import sslctl.training.logger
from sslctl.cli import main
from sslctl.runs import checkpoint
from sslctl.visuals.tensorboard import is_pictured
from tests.own_methods import own
from tests.runs import MOCO, SIMCLR, STEPS, command, differences, finish, metrics, pretrain, slow, tensors

SHOWN = ("trainer.tensorboard=true", "evaluation.knn_every_epochs=1")
MANY = (
    *MOCO[:2],
    "method.batchnorm_groups=1",
    "trainer.batch_size=71",
    "trainer.save_every_epochs=1",
    *SHOWN,
)  # 20 steps
BOUND = 8000  # bytes a step: half a batch of projections; in a run so short the allocator comes and goes


@pytest.mark.slow
def test_memory_open_files_and_disk_stay_flat(tmp_path, capsys):
    with sampled(every=5) as samples:
        assert main(command(tmp_path / "run", *MANY, "trainer.epochs=10")) == 0
    assert samples[-1].step == 195
    assert leaks(samples, BOUND) == []
    assert disk_excess(tmp_path / "run") is None
    assert re.search(r"done: .*/run \(\d+\.\d MiB\)\n", capsys.readouterr().out)


def test_a_tensor_kept_in_every_step_is_noticed(tmp_path):
    with sampled(every=2) as samples:
        assert main(command(tmp_path / "run", *MANY, *own("HoardingMoCo"), "trainer.epochs=3")) == 0
    (tensors_kept,) = [line for line in leaks(samples, 10**6) if line.startswith("tensors")]
    assert tensors_kept == "tensors grow by 1 a step"


@pytest.mark.parametrize(
    ("epochs", "every", "expected"), [(10, 1, 11), (20, 1, 21), (21, 1, 12), (1000, 5, 21), (1000, 1, 21)]
)
def test_pictures_of_a_long_run_are_as_many_as_of_a_short_one(epochs, every, expected):
    """Of evenly many looks, its first and its last among them."""
    plan = types.SimpleNamespace(total_steps=8 * epochs, knn_every_steps=8 * every)
    looks = sorted({*range(0, plan.total_steps, plan.knn_every_steps), plan.total_steps})
    pictured = [step for step in looks if is_pictured(plan, step)]
    assert (pictured[0], pictured[-1], len(pictured)) == (0, plan.total_steps, expected)
    assert len({after - before for before, after in itertools.pairwise(pictured[:-1])}) == 1


# --- Clocks ---


def steps_shown(run):
    return {tag: [step for step, _ in shown] for tag, shown in points(run).items()}


ONCE = {"loss": list(range(1, STEPS + 1)), "knn": [0, 5, 10], "rankme": [0, 5, 10], "neighbours": [0, 5, 10]}


def shown_once(run):
    return {tag: steps for tag, steps in steps_shown(run).items() if tag in ONCE} == ONCE


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch, capsys):
    run, real = tmp_path / "run", time.time
    assert pretrain(run, *SIMCLR, *SHOWN, stop_after=4) == 143
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    assert pretrain(run, *SIMCLR, *SHOWN, stop_after=7) == 143
    monkeypatch.setattr(time, "time", lambda: real() - 7200)
    finish(run, *SIMCLR, *SHOWN)
    assert shown_once(run)
    speeds = [float(words.replace(",", "")) for words in re.findall(r"images/s ([-\d,]+)", capsys.readouterr().out)]
    assert speeds
    assert min(speeds) > 0


@pytest.mark.parametrize("at", ["before its line", slow("after its line")])
def test_an_evaluation_that_is_cut_short_is_shown_once(at, tmp_path, monkeypatch):
    run, real = tmp_path / "run", sslctl.training.logger.append_metrics

    def append_metrics(path, record):
        cut = record["step"] == 5 and "rankme" in record
        if not cut or at == "after its line":
            real(path, record)
        if cut:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sslctl.training.logger, "append_metrics", append_metrics)
        assert pretrain(run, *SIMCLR, *SHOWN) == 130
    finish(run, *SIMCLR, *SHOWN)
    assert shown_once(run)
    assert [record["step"] for record in metrics(run) if "rankme" in record] == [0, 5, 10]


# --- A disk that is full ---


@pytest.fixture
def small_disk(tmp_path):
    """A file system of three MiB, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root mounts a file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(path):
    with path.open("wb", buffering=0) as opened, contextlib.suppress(OSError):
        while opened.write(bytes(512)):
            pass


def test_a_disk_that_fills_up_in_an_evaluation_is_named_and_the_run_continues(
    small_disk, tmp_path, monkeypatch, capsys
):
    words = (*SIMCLR, *SHOWN, "trainer.save_every_steps=2")
    run, real = small_disk / "run", sslctl.commands.pretrain.evaluate_online

    def evaluate_online(measure, board, method, log, step):
        if step == 5:
            fill(small_disk / "filler")
        real(measure, board, method, log, step)

    with monkeypatch.context() as patch:
        patch.setattr(sslctl.commands.pretrain, "evaluate_online", evaluate_online)
        assert pretrain(run, *words) == 1
    printed = capsys.readouterr().err
    assert "No space left on device" in printed
    assert str(run) in printed
    assert "Traceback" not in printed
    checkpoint.verify(checkpoint.newest_valid(run))
    (small_disk / "filler").unlink()
    finish(run, *words)
    assert shown_once(run)
    straight = finish(tmp_path / "straight", *words)
    assert differences(tensors(run), tensors(straight)) == []
    assert metrics(run) == metrics(straight)
