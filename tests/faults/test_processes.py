"""Several processes: whatever happens to one of them, none hangs, the message is shown, the same command continues."""

import contextlib
import json
import os
import random
import signal
import sys
import time

import pytest

from sslctl.runs import checkpoint, claim
from sslctl.training import launch
from tests.own_methods import own
from tests.processes import (
    call,
    children_of,
    in_processes,
    logged_steps,
    pretrain_in,
    running,
    said_by_pretrain,
    start,
    start_python,
    wait_until,
)
from tests.runs import MOCO, STEPS, command, differences, metrics, slow, tensors

FAILING = (*MOCO, *own("FailingMoCo"), "trainer.save_every_steps=2")
LONG = (*MOCO, "trainer.epochs=200", "trainer.save_every_steps=5")  # 1000 steps of some ten milliseconds
TWO = "trainer.processes=2"


def output(folder):
    return (folder / "output").read_text()


def steps_on_disk(run_dir):
    return [checkpoint.step_of(path) for path in checkpoint.steps_on_disk(run_dir)]


@contextlib.contextmanager
def started(folder, *overrides, steps=0):
    """A run of two processes that has logged so many more steps: its launcher and {rank: process id}."""
    run_dir = folder / "run"
    begin = logged_steps(run_dir)
    launcher = start(command(run_dir, *LONG, TWO, *overrides), folder)
    children = {}
    try:
        wait_until(lambda: len(children_of(launcher.pid)) == 2, launcher)
        children = dict(enumerate(children_of(launcher.pid)))
        wait_until(lambda: not steps or logged_steps(run_dir) >= begin + steps, launcher)
        yield launcher, children
    finally:
        for pid in (launcher.pid, *children.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()


def ends(launcher, children, status, seconds=40):
    """All processes are gone in time, and the launcher's status is as expected."""
    assert launcher.wait(timeout=seconds) == status
    assert not any(map(running, children.values()))


# --- In processes that something else has started, as torchrun does ---


def failing_run(run_dir, fault, rank, *overrides):
    os.environ |= {"TEST_FAULT": fault} | ({"TEST_RANK": str(rank)} if rank is not None else {})
    return said_by_pretrain(run_dir, *FAILING, *overrides)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted run of FAILING without a fault."""
    run = tmp_path_factory.mktemp("straight") / "run"
    pretrain_in(2, run, *FAILING)
    return run


def same_run(left, right):
    assert differences(tensors(left), tensors(right)) == []
    assert metrics(left) == metrics(right)


@pytest.mark.parametrize(
    ("name", "status", "rank"),
    [("SIGTERM", 143, 1), slow("SIGTERM", 143, 0), slow("SIGINT", 130, 0), slow("SIGINT", 130, 1)],
)
def test_a_signal_to_one_process_stops_all_after_the_same_step(name, status, rank, straight, tmp_path):
    run = tmp_path / "run"
    outcomes = in_processes(failing_run, run, f"{name}@4", rank)
    assert [actual for actual, _ in outcomes] == [status] * 2
    assert f"the same command continues {run}" in outcomes[0][1]
    assert "the same command continues" not in outcomes[1][1]
    assert steps_on_disk(run) == [5, 4]
    assert not claim.is_held(run)
    assert "resuming at step 5 of 10" in pretrain_in(2, run, *FAILING)
    same_run(run, straight)


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_an_exception_in_one_process_ends_all(rank, straight, tmp_path):
    outcomes = in_processes(failing_run, tmp_path / "run", "exception@5", rank)
    assert [status for status, _ in outcomes] == [1, 1]
    assert "LookupError: a mistake of the user's own" in outcomes[rank][1]
    assert steps_on_disk(tmp_path / "run") == [4, 2]
    assert "resuming at step 4 of 10" in pretrain_in(2, tmp_path / "run", *FAILING)
    same_run(tmp_path / "run", straight)


def test_a_failing_save_of_the_first_process_ends_all(tmp_path):
    (first, words), (second, silence) = in_processes(failing_run, tmp_path / "run", "full disk@5", 0)
    assert (first, second) == (1, 1)
    assert "checkpoint not written: No space left on device" in words
    assert "sslctl: " not in silence
    assert steps_on_disk(tmp_path / "run") == [4, 2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("fault", "rank"),
    [
        *[("nan loss", None), slow("inf loss", None), slow("nan gradient", None)],
        *[("inf loss", 1), slow("nan loss", 1), slow("nan gradient", 1)],
    ],
)
def test_a_loss_that_is_no_number_ends_all_and_is_not_saved(fault, rank, tmp_path):
    outcomes = in_processes(failing_run, tmp_path / "run", f"{fault}@5", rank, "trainer.save_every_steps=1")
    assert [status for status, _ in outcomes] == [1, 1]
    assert " at step 5 (lr" in outcomes[rank or 0][1]
    assert steps_on_disk(tmp_path / "run") == [5, 4]  # the steps before it


BAD = {
    "/imagse": ("dataset=imagefolder", "dataset.root={folder}/imagse"),
    "trainer.batch_size=255 does not divide into 2 parts": ("trainer.batch_size=255",),
    "trainer.processes=3 in a group of 2": ("trainer.processes=3", "trainer.batch_size=255"),
    "is in use by pid": ("run_dir={folder}/held",),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_refused_by_all_processes(words, tmp_path):
    claim.make(tmp_path / "held")
    lock = claim.Lock(tmp_path / "held")
    overrides = [word.format(folder=tmp_path) for word in (*MOCO[:2], "method.batchnorm_groups=1", *BAD[words])]
    outcomes = in_processes(said_by_pretrain, tmp_path / "run", *overrides)
    lock.release()
    assert [status for status, _ in outcomes] == [2, 2]
    assert words in outcomes[0][1]
    assert [path.name for path in tmp_path.iterdir()] == ["held"]
    assert [path.name for path in (tmp_path / "held").iterdir()] == ["lock"]


# --- With sslctl's own launcher ---


def refused(folder, *overrides):
    """What a command with two processes printed before it ended with status 2, without the plan."""
    began = time.monotonic()
    assert call(command(folder / "run", *MOCO, TWO, *overrides), folder) == 2
    assert time.monotonic() - began < 30
    return [line for line in output(folder).splitlines() if line.startswith("sslctl: ")]


@pytest.mark.slow
def test_a_folder_that_is_not_there_is_refused_once(tmp_path):
    (line,) = refused(tmp_path, "dataset=imagefolder", f"dataset.root={tmp_path}/imagse")
    assert f"{tmp_path}/imagse" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_once(tmp_path):
    (line,) = refused(tmp_path, "trainer.batch_size=255", "method.batchnorm_groups=1")
    assert "trainer.batch_size=255 does not divide by trainer.processes=2" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_directory_in_use_is_refused_once(tmp_path):
    claim.make(tmp_path / "run")
    lock = claim.Lock(tmp_path / "run")
    (line,) = refused(tmp_path)
    lock.release()
    assert f"{tmp_path / 'run'} is in use by pid {os.getpid()}" in line


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_the_same_command_continues_it(tmp_path):
    with started(tmp_path, steps=7) as (launcher, children):
        os.kill(children[1], signal.SIGKILL)
        ends(launcher, children, 1)
    assert "process 1 was killed by SIGKILL; the same command continues the run" in output(tmp_path)
    assert not claim.is_held(tmp_path / "run")
    with started(tmp_path, steps=3) as (launcher, children):
        launcher.send_signal(signal.SIGTERM)
        ends(launcher, children, 143)
    assert "  resuming at step " in output(tmp_path)
    assert steps_on_disk(tmp_path / "run")[0] == logged_steps(tmp_path / "run")
    steps = [record["step"] for record in metrics(tmp_path / "run")]
    assert steps == list(range(1, steps[-1] + 1))


@pytest.mark.slow
def test_a_killed_first_process_ends_the_run(tmp_path):
    with started(tmp_path, steps=2) as (launcher, children):
        os.kill(children[0], signal.SIGKILL)
        ends(launcher, children, 1)
    assert "process 0 was killed by SIGKILL" in output(tmp_path)


@pytest.mark.slow
def test_signals_to_one_process_or_the_launcher_stop_all_with_a_checkpoint(tmp_path):
    with started(tmp_path, steps=2) as (launcher, children):
        os.kill(children[1], signal.SIGTERM)
        ends(launcher, children, 143)
    assert steps_on_disk(tmp_path / "run")[0] == logged_steps(tmp_path / "run")
    with started(tmp_path, steps=2) as (launcher, children):
        launcher.send_signal(signal.SIGINT)
        ends(launcher, children, 130)
    assert steps_on_disk(tmp_path / "run")[0] == logged_steps(tmp_path / "run")
    assert output(tmp_path).count("the same command continues") == 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_ends_the_run_and_is_named(rank, tmp_path):
    with started(tmp_path, "trainer.timeout_minutes=0.03", steps=2) as (launcher, children):
        os.kill(children[rank], signal.SIGSTOP)
        ends(launcher, children, 1)
    assert f"no answer from process {rank} (pid {children[rank]} on " in output(tmp_path)
    assert "for 0.03 min (trainer.timeout_minutes); the same command continues the run" in output(tmp_path)
    assert "Traceback" not in output(tmp_path)


@pytest.mark.parametrize(("number", "stopped"), [(signal.SIGKILL, True), slow(signal.SIGHUP, False)])
def test_processes_end_with_a_killed_launcher_also_stopped_ones(number, stopped, tmp_path):
    with started(tmp_path, steps=2) as (launcher, children):
        if stopped:
            os.kill(children[1], signal.SIGSTOP)
        launcher.send_signal(number)
        launcher.wait()
        wait_until(lambda: not (any(map(running, children.values())) or claim.is_held(tmp_path / "run")), seconds=10)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_any_moment_while_the_processes_start_ends_them_at_once(number, status, tmp_path):
    moments = random.Random(0)
    for _ in range(4):
        launcher = start(command(tmp_path / "run", *LONG, TWO), tmp_path)
        wait_until(lambda: (tmp_path / "started").exists(), launcher)
        time.sleep(0.15 + moments.uniform(0, 0.35))  # before it listens itself, Python's own end is as good
        children = children_of(launcher.pid)
        launcher.send_signal(number)
        assert launcher.wait(timeout=10) in (status, -number)
        assert not any(map(running, children))
    assert "was killed by" not in output(tmp_path)


def test_processes_import_nothing_from_the_current_directory(tmp_path, monkeypatch):
    for name in ("json.py", "ctypes.py", "torch.py", "sslctl/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"import sys; print('imported {name}', file=sys.stderr)\n")
    monkeypatch.chdir(tmp_path)
    job, place = tmp_path / "job", {"SSLCTL_PARENT": "none"}
    job.write_text(json.dumps({"path": sys.path}))
    with (tmp_path / "errors").open("w+") as errors, open(os.devnull) as watched:
        assert launch.start(job, place, watched.fileno(), errors).wait() == 1
        errors.seek(0)
        printed = errors.read()
    assert "invalid literal for int() with base 10: 'none'" in printed  # it came so far, with sslctl's own modules
    assert "imported" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "words"),
    [
        ("exception@5", "1", "process 1 failed:\nsslctl: LookupError: a mistake of the user's own"),
        ("full disk@5", "0", "checkpoint not written: No space left on device"),
        ("nan loss@5", "", "loss is nan at step 5 (lr"),
    ],
)
def test_a_failure_is_shown_and_ends_the_command(fault, rank, words, tmp_path):
    environment = {"TEST_FAULT": fault} | ({"TEST_RANK": rank} if rank else {})
    assert call(command(tmp_path / "run", *FAILING, TWO), tmp_path, environment=environment) == 1
    assert words in output(tmp_path)
    assert "Traceback" not in output(tmp_path)
    assert steps_on_disk(tmp_path / "run") == [4, 2]


# --- With torchrun ---


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process_and_gives_the_run_of_the_launcher(straight, tmp_path):
    words = ["--nproc-per-node=2", "--standalone", "--max-restarts=1", "-m", "sslctl"]
    words += command(tmp_path / "run", *FAILING)
    fault = {"TEST_FAULT": "SIGKILL@5", "TEST_RANK": "1"}
    assert start_python(words, tmp_path, fault, module="torch.distributed.run").wait(timeout=120) == 0
    assert output(tmp_path).count("resuming at step 4 of 10") == output(tmp_path).count("done: ") == 1
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
    same_run(tmp_path / "run", straight)
