"""Signals and kills: the step is completed, the run is saved, the same command continues it exactly."""

import contextlib
import os
import signal
import threading
import time
import types

import pytest
import torch
from torch.utils.data import DataLoader

import sslctl.evaluation.closing
import sslctl.training.beginning
from sslctl import distributed
from sslctl.cli import main
from sslctl.data.loader import clean_batches
from sslctl.data.workers import fetching, ignore_signals
from sslctl.factory.from_config import build_source
from sslctl.runs import checkpoint, claim
from sslctl.signals import REQUEUE, TO_BE_CONTINUED, Interrupted, Signals, check
from sslctl.training.train import Outcome, agree_to_stop
from tests.own_methods import own
from tests.processes import call, children_of, logged_steps, running, start, wait_until
from tests.runs import (
    PROBE,
    SIMCLR,
    STEPS,
    command,
    contents,
    differences,
    finish,
    image_folder,
    metrics,
    newest,
    pretrain,
    results,
    signal_at,
    slow,
    tensors,
)


def terminated_at_its_start(worker):
    os.kill(os.getpid(), signal.SIGTERM)
    ignore_signals(worker)


def test_a_signal_while_workers_start_does_not_end_them():
    loader = DataLoader(range(4), num_workers=1, worker_init_fn=terminated_at_its_start)
    with fetching(loader) as fetched:
        assert len(list(fetched)) == 4
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


LONG = (  # about 200 steps of a few milliseconds
    *("method=moco", "method.queue_size=600", "method.batchnorm_groups=1", "backbone.widths=[8,16]"),
    *("trainer.batch_size=64", "trainer.epochs=9", "trainer.save_every_steps=25", "evaluation.knn_every_epochs=2"),
)
CLOSING = (*SIMCLR, "evaluation.closing=true", *PROBE)


def same_run(left, right):
    assert differences(tensors(left), tensors(right)) == []
    assert metrics(left) == metrics(right)


def output(folder):
    return (folder / "output").read_text()


@contextlib.contextmanager
def ended(process):
    """Ends a process that a failed test would leave behind."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


# --- In this process ---


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step_with_its_status(number, status, tmp_path, capsys):
    with signal_at(3, number):
        assert pretrain(tmp_path / "run", *SIMCLR) == status
    printed = capsys.readouterr().err
    assert "stopping after this step" in printed
    assert f"the same command continues {tmp_path / 'run'}" in printed
    assert [path.name for path in checkpoint.steps_on_disk(tmp_path / "run")] == ["step-3"]
    assert not claim.is_held(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_are_put_back_after_a_run(number, tmp_path):
    before = signal.getsignal(number)
    assert pretrain(tmp_path / "run", *SIMCLR, stop_after=1) == 143
    assert signal.getsignal(number) is before


def test_signals_only_set_a_flag_until_a_second_interrupt():
    with Signals() as signals:
        check()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.status == 143
        with pytest.raises(Interrupted):
            check()
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.status == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_one_signal_asks_for_a_requeue_and_the_other_keeps_its_default():
    for asked, other in (("USR1", "USR2"), ("USR2", "USR1")):
        with Signals(requeue=asked) as signals:
            assert signal.getsignal(REQUEUE[other]) == signal.SIG_DFL
            os.kill(os.getpid(), REQUEUE[asked])
            assert signals.status == TO_BE_CONTINUED == 75
    with Signals():
        assert {signal.getsignal(number) for number in REQUEUE.values()} == {signal.SIG_DFL}


@pytest.mark.parametrize("requeued", [True, False])
def test_a_run_that_is_told_of_its_jobs_end_saves_and_requeues_once(requeued, tmp_path, monkeypatch, capsys):
    """By SIGUSR1, in a job of Slurm whose scontrol is a fake one."""
    fake = tmp_path / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho no such job >&2\nexit {0 if requeued else 1}\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    run = tmp_path / "run"
    with signal_at(3, signal.SIGUSR1):
        assert main(command(run, *SIMCLR)) == 75
    assert newest(run).name == "step-3"
    assert (tmp_path / "calls").read_text() == "requeue 123\n"
    message = "the job starts again" if requeued else "failed: no such job"
    assert f"sslctl: scontrol requeue 123{': ' if requeued else ' '}{message}" in capsys.readouterr().err
    finish(run, *SIMCLR)
    assert (tmp_path / "calls").read_text() == "requeue 123\n"


def test_a_run_whose_time_is_over_saves_and_the_same_command_continues_it(tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(run, *SIMCLR, "trainer.max_hours=1e-9") == 75
    assert newest(run).name == "step-1"
    assert "trainer.max_hours is over" in capsys.readouterr().out
    assert pretrain(run, *SIMCLR, "trainer.max_hours=1e-9") == 75  # a budget of each command
    assert newest(run).name == "step-2"
    same_run(finish(run, *SIMCLR), finish(tmp_path / "straight", *SIMCLR))


@pytest.mark.parametrize(("left", "longest_save", "status"), [(20, 10, 0), (5, 10, 75), (-1, 0, 75)])
def test_time_is_that_of_a_clock_that_is_never_set_and_leaves_room_for_a_save(left, longest_save, status, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)  # long before
    signals = Signals()
    setup = types.SimpleNamespace(ends_at=time.monotonic() + left, longest_save=longest_save, watch=None)
    assert agree_to_stop(setup, signals) == (Outcome.STOPPED if status else None)
    assert signals.status == status


def test_the_end_of_the_time_is_said_by_the_first_process_alone(monkeypatch, capsys):
    setup = types.SimpleNamespace(ends_at=time.monotonic(), longest_save=0.0, watch=None)
    for rank, said in ((1, ""), (0, "  trainer.max_hours is over\n")):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        agree_to_stop(setup, Signals())
        assert capsys.readouterr().out == said


def test_a_run_in_another_thread_leaves_the_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def body():
        with Signals() as signals:
            seen.append((signals.status, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), slow(signal.SIGTERM, 143)])
def test_a_signal_in_the_closing_evaluation_leaves_only_that_to_do(number, status, tmp_path, monkeypatch, capsys):
    run, real = tmp_path / "run", sslctl.evaluation.closing.closing_results

    def closing_results(*arguments, **keywords):
        os.kill(os.getpid(), number)
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(sslctl.evaluation.closing, "closing_results", closing_results)
        assert pretrain(run, *CLOSING) == status
    assert newest(run).name == f"step-{STEPS}"
    assert not (run / "results.jsonl").exists()
    assert not (run / "backbone.safetensors").exists()
    kept, logged = contents(run / "checkpoints"), metrics(run)
    assert pretrain(run, *CLOSING) == 0
    assert contents(run / "checkpoints") == kept
    assert metrics(run) == logged
    assert {r["subject"] for r in results(run / "results.jsonl")} == {"trained", "random"}


def test_an_interrupt_while_the_data_are_read_ends_at_once(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sslctl.training.beginning, "build_source", interrupted)
    assert pretrain(tmp_path / "run", *SIMCLR) == 130
    assert not (tmp_path / "run").exists()


# --- Workers hold nothing ---


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"), images=60)


def test_evaluation_workers_do_not_hold_the_lock(images, tmp_path):
    from omegaconf import OmegaConf

    node = {"_target_": "sslctl.data.sources.folder", "root": str(images), "image_size": 16}
    source = build_source(OmegaConf.create({**node, "channels": 3, "memory_gb": 2}), "train")
    assert source.images is None
    lock = claim.Lock(tmp_path)
    batches = clean_batches(source, torch.arange(60), resize=16, batch_size=4, workers=2)
    next(batches)
    lock.release()  # as the kernel does when the main process is killed
    held = claim.is_held(tmp_path)
    batches.close()
    assert not held


# --- Real processes; more of them die in test_kill_campaign.py ---


@pytest.mark.slow
def test_a_second_interrupt_ends_a_long_step_at_once(tmp_path):
    words = command(tmp_path / "run", *SIMCLR, *own("SlowSimCLR"))
    with ended(start(words, tmp_path)) as process:
        wait_until(lambda: "in the step" in output(tmp_path), process)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "Ctrl-C again" in output(tmp_path), process)
        time.sleep(0.5)
        assert process.poll() is None, "the first interrupt should wait for the step"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=15) == 130
    assert "Traceback" not in output(tmp_path)


@pytest.mark.slow
def test_a_signal_in_a_long_closing_evaluation_is_answered_soon(tmp_path):
    words = (*SIMCLR, "evaluation.closing=true")
    run = tmp_path / "run"
    with ended(start(command(run, *words, "probe.epochs=1000000"), tmp_path)) as process:
        wait_until(lambda: "evaluating" in output(tmp_path), process)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143
    assert newest(run).name == f"step-{STEPS}"
    kept = contents(run / "checkpoints")
    assert call(command(run, *words, "probe.epochs=1"), tmp_path) == 0
    assert contents(run / "checkpoints") == kept
    assert (run / "backbone.safetensors").exists()
    assert results(run / "results.jsonl")


# --- Worker processes ---


@pytest.fixture(scope="module")
def streamed(images):
    """Images of different sizes, decoded by two workers; about 12 steps an epoch."""
    return (
        *("dataset=imagefolder", f"dataset.root={images}", "dataset.image_size=16", "trainer.batch_size=4"),
        *("method=moco", "method.queue_size=20", "method.batchnorm_groups=2", "trainer.epochs=15"),
        *("trainer.workers=2", "trainer.save_every_steps=20", "evaluation.knn_every_epochs=1"),
    )


@pytest.fixture(scope="module")
def streamed_straight(streamed, tmp_path_factory):
    return finish(tmp_path_factory.mktemp("straight") / "run", *streamed, "trainer.workers=0")


@pytest.mark.slow
def test_workers_of_a_killed_process_end_and_hold_nothing(streamed, streamed_straight, tmp_path):
    run, words = tmp_path / "run", command(tmp_path / "run", *streamed)
    with ended(start(words, tmp_path)) as process:
        wait_until(lambda: logged_steps(run) >= 25 and len(children_of(process.pid)) >= 2, process)
        workers = children_of(process.pid)
        process.kill()
        process.wait()
    killed = time.monotonic()
    assert call(words, tmp_path) == 0, output(tmp_path)  # at once: the workers may still be there
    wait_until(lambda: not any(map(running, workers)), seconds=max(0.1, killed + 10 - time.monotonic()))
    pids = (process.pid, *workers)
    assert [f for f in os.listdir("/dev/shm") if any(f.startswith(f"torch_{pid}_") for pid in pids)] == []
    same_run(run, streamed_straight)


# --- Two at once ---


@pytest.mark.slow
def test_a_second_process_in_the_same_directory_is_refused(tmp_path):
    run, words = tmp_path / "run", command(tmp_path / "run", *LONG, "trainer.epochs=60")
    with ended(start(words, tmp_path)) as process:
        wait_until(lambda: logged_steps(run) >= 5, process)
        assert call(words, tmp_path) == 2
        assert f"in use by pid {process.pid} on " in output(tmp_path)
        assert process.poll() is None
        process.kill()
        process.wait()
    assert (run / "lock").read_text().startswith(f"pid {process.pid} ")
    reached = logged_steps(run)
    with ended(start(words, tmp_path)) as process:  # a lock left by a killed process is taken over
        wait_until(lambda: (run / "lock").read_text().startswith(f"pid {process.pid} "), process)
        wait_until(lambda: logged_steps(run) > reached, process)
