"""Faults while a run writes: kills at any byte and between any two operations, full disks, lost directories, bad numbers."""

import contextlib
import errno
import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import sslctl.training.beginning
from sslctl.cli import main
from sslctl.commands import data, report
from sslctl.data.audit import Audit
from sslctl.errors import InputError
from sslctl.factory.from_run import resolve_runs
from sslctl.runs import checkpoint, claim
from sslctl.runs.generators import generator_states
from sslctl.visuals import sheets
from tests.own_methods import FailingMoCo, own, own_optimizer
from tests.processes import ended_by
from tests.runs import (
    CONFIG,
    FACTS,
    MOCO,
    PREPROCESS,
    SIMCLR,
    STEPS,
    command,
    contents,
    differences,
    file_size_limit,
    finish,
    metrics,
    newest,
    pretrain,
    signal_at,
    slow,
    tensors,
)

# --- A checkpoint by itself ---


def module(seed):
    torch.manual_seed(seed)
    return nn.Linear(64, 64)


@functools.cache
def prepared(step):
    """About 17 kB of weights and twice that of optimizer and generators; made before a fork, which may not train."""
    built = module(step)
    optimizer = torch.optim.SGD(built.parameters(), 0.1, momentum=0.9)
    built(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    state = {
        "step": step,
        "optimizer": optimizer.state_dict(),
        "generators": [generator_states()],
        "threads": 1,
        "scaler": {},
        "skipped": [0, 0],
    }
    return built, state


def save(run_dir, step, keep_last=2):
    return checkpoint.save(run_dir, step, *prepared(step), keep_last)


def in_child(function):
    """Runs a function in a forked process; returns the number of the signal that ended it, 0 for none."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def die_at_byte(size):
    """The process dies in the write that would make a file longer than so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def die_at_operation(number, below):
    """The process dies just before the given operation on files below a directory: opening, renaming, removing …"""
    seen = []

    def hook(event, arguments):
        if event == "open" or (event.startswith("os.") and event not in ("os.putenv", "os.listdir", "os.scandir")):
            path = arguments[0] if arguments else ""
            path = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
            if path.startswith(str(below)) or (event in ("os.remove", "os.rmdir") and not os.path.isabs(path)):
                seen.append(event)
                if len(seen) == number:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def valid(run_dir):
    """The names of all checkpoints that are not temporary; each must verify."""
    for path in checkpoint.steps_on_disk(run_dir):
        checkpoint.verify(path)
    return [path.name for path in checkpoint.steps_on_disk(run_dir)]


def hidden(run_dir):
    """Temporary files and directories, which begin with a dot."""
    return [str(p.relative_to(run_dir)) for p in run_dir.rglob(".*")]


@pytest.fixture
def saved(tmp_path):
    """A run directory with checkpoints of steps 2 and 4."""
    save(tmp_path, 2)
    save(tmp_path, 4)
    return tmp_path


def contents_only(actual):
    return {name: content for name, (_, content) in actual.items()}


def after_a_kill(run_dir, before):
    """What must hold whenever the saving of step 6 was cut short."""
    assert "step-4" in valid(run_dir), "the checkpoint before it is gone"
    assert contents_only(contents(run_dir / "checkpoints" / "step-4")) == before, "the checkpoint before it is another"
    newest_left = checkpoint.continue_from(run_dir, keep_last=2)
    assert newest_left == checkpoint.newest_valid(run_dir)
    assert len(valid(run_dir)) == 2, "an older checkpoint is left"
    assert (run_dir / "last").read_text() == f"checkpoints/{newest_left.name}\n"
    checkpoint.load(newest_left, module(0))
    save(run_dir, 8)
    assert valid(run_dir) == ["step-8", newest_left.name], "the run cannot go on as it would have"
    assert (run_dir / "last").read_text() == "checkpoints/step-8\n"


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 16000, 17000, 20000, 30000])
def test_a_kill_at_a_byte_of_a_checkpoint_leaves_the_one_before(size, saved):
    before = contents_only(contents(saved / "checkpoints" / "step-4"))
    prepared(6)

    def killed():
        die_at_byte(size)
        save(saved, 6)

    assert in_child(killed) == signal.SIGXFSZ
    assert checkpoint.newest_valid(saved).name == "step-4"
    after_a_kill(saved, before)


def killed_at_every_operation(run_dir, action, check):
    """Cuts an action short before each of its operations in turn, always from the same start; returns what went wrong."""
    start, problems = run_dir.with_name("start"), []
    run_dir.rename(start)
    for number in range(1, 200):
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(start, run_dir, symlinks=True)

        def killed(number=number):
            die_at_operation(number, run_dir)
            action()

        ended = in_child(killed)
        try:
            check()
        except (AssertionError, checkpoint.CheckpointError) as error:
            problems.append(f"before operation {number}: {str(error).splitlines()[0]}")
        if not ended:
            assert number > 1, "no operation was noticed"
            return problems
    raise AssertionError("there are too many operations")


def test_a_kill_between_two_operations_leaves_a_valid_checkpoint(tmp_path):
    run = tmp_path / "run"
    before = {path.name: contents(path) for path in (save(run, 2), save(run, 4))}["step-4"]
    prepared(6)
    check = lambda: after_a_kill(run, contents_only(before))  # noqa: E731
    assert killed_at_every_operation(run, lambda: save(run, 6), check) == []


def copy_with_links_followed(run_dir):
    """As cp -rL, scp -r and zip do with a run of 0.1.0, whose `last` is a link: it becomes a directory."""
    (run_dir / "last").unlink()
    shutil.copytree(checkpoint.newest_valid(run_dir), run_dir / "last")


def test_a_kill_while_a_copy_of_a_checkpoint_gives_way_to_a_file_leaves_a_valid_checkpoint(tmp_path):
    run = tmp_path / "run"
    before = {path.name: contents(path) for path in (save(run, 2), save(run, 4))}["step-4"]
    prepared(6)
    copy_with_links_followed(run)

    def check():
        checkpoint.continue_from(run, keep_last=2)
        assert hidden(run) == []
        after_a_kill(run, contents_only(before))

    assert killed_at_every_operation(run, lambda: save(run, 6), check) == []


def test_a_kill_while_the_only_checkpoint_is_saved_again_leaves_one(tmp_path):
    run = tmp_path / "run"
    save(run, 5)

    def check():
        assert checkpoint.newest_valid(run), "the only checkpoint is gone"
        assert valid(run) == ["step-5"], "the only checkpoint is damaged"

    assert killed_at_every_operation(run, lambda: save(run, 5), check) == []


def test_a_kill_while_a_run_begins_leaves_a_directory_that_the_same_command_takes(tmp_path, monkeypatch):
    """At any operation and any byte: the directory, the lock, the marker, the first files."""
    run = tmp_path / "outer" / "run"
    run.parent.mkdir(parents=True)
    started = claim.environment("")
    monkeypatch.setattr(
        claim, "environment", lambda command: started | {"command": command}
    )  # it takes most of the time

    def begin():
        claim.claim(run, config=CONFIG, hashes={}, facts=FACTS, preprocess=PREPROCESS, command="")

    def check():
        begin()
        checkpoint.continue_from(run, keep_last=2)
        names = {"config.yaml", "environment.json", "preprocess.json", "lock", "sslctl-run.json"}
        assert {path.name for path in run.iterdir()} == names

    assert killed_at_every_operation(run.parent, begin, check) == []
    for size in (0, 1, 20, 40):
        shutil.rmtree(run)
        assert in_child(lambda size=size: [die_at_byte(size), begin()]) == signal.SIGXFSZ
        check()


# --- A full disk ---


@contextlib.contextmanager
def no_space(where):
    """A patched function reports a full disk."""

    def full(*arguments, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {
        "fsync": (os, "fsync"),
        "mkdir": (Path, "mkdir"),
        "rename": (Path, "rename"),
        "text": (Path, "write_text"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*target[where], full)
        yield


@pytest.mark.parametrize("fault", [0, 100, 10000, 17000, 20000, "fsync", "mkdir", "rename", "text"])
def test_a_full_disk_is_an_error_that_leaves_the_older_checkpoints(fault, saved):
    before = contents(saved)
    with (
        pytest.raises(OSError, match="checkpoint") as caught,
        no_space(fault) if isinstance(fault, str) else file_size_limit(fault),
    ):
        save(saved, 6)
    assert caught.value.errno == (errno.ENOSPC if isinstance(fault, str) else errno.EFBIG)
    assert str(saved) in str(caught.value)
    assert contents(saved) == before
    assert hidden(saved) == []


def test_a_checkpoint_can_be_written_once_there_is_space_again(saved):
    with contextlib.suppress(Exception), file_size_limit(10000):
        save(saved, 6)
    assert valid(saved) == ["step-4", "step-2"]
    save(saved, 6)
    assert valid(saved) == ["step-6", "step-4"]


@contextlib.contextmanager
def limited_save(step, size):
    """The disk is full while one step is saved."""
    real = checkpoint.save

    def save_limited(run_dir, at, *arguments, **keywords):
        with file_size_limit(size) if at == step else contextlib.nullcontext():
            return real(run_dir, at, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_limited)
        yield


def test_a_run_on_a_full_disk_fails_and_continues_exactly(tmp_path, capsys):
    words = (*MOCO, "trainer.save_every_steps=2")
    with limited_save(6, 5000):
        assert pretrain(tmp_path / "run", *words) == 1
    printed = capsys.readouterr()
    assert str(tmp_path / "run") in printed.err
    assert "saved" not in printed.out + printed.err
    assert "Traceback" not in printed.err
    assert valid(tmp_path / "run") == ["step-4", "step-2"]
    assert hidden(tmp_path / "run") == []
    finish(tmp_path / "run", *words)
    assert differences(tensors(tmp_path / "run"), tensors(finish(tmp_path / "straight", *words))) == []


def test_a_full_disk_for_tensorboard_is_said_once_and_the_run_continues(tmp_path, capfd):
    """By its limit on the size of files: events come to more than metrics and checkpoints of a tiny network."""
    words = (*SIMCLR, "trainer.tensorboard=true", "evaluation.knn_every_epochs=1")
    with file_size_limit(30_000):
        assert pretrain(tmp_path / "run", *words) == 1
    (line,) = [text for text in capfd.readouterr().err.splitlines() if text]
    assert line.startswith("sslctl: ")
    assert "log not written: File too large" in line
    finish(tmp_path / "run", *words)


# --- Files of others at out= ---


@pytest.mark.parametrize("there", ["text", "pipe", "dangling link", "directory"])
@pytest.mark.parametrize(
    ("name", "writable"),
    [
        ("page.html", report.writable),
        ("picture.png", lambda path: sheets.writable(path, "views")),
        ("picture.jpg", lambda path: sheets.writable(path, "pictures")),
        ("audit.json", data.writable),
    ],
)
def test_what_a_verb_did_not_write_is_not_replaced(name, writable, there, tmp_path):
    path = tmp_path / name
    assert writable(path) == path
    {
        "text": lambda: path.write_text('{"mine": 1}'),
        "pipe": lambda: os.mkfifo(path),
        "dangling link": lambda: path.symlink_to("nowhere"),
        "directory": path.mkdir,
    }[there]()
    with pytest.raises(InputError, match="did not write: move it away" if there != "directory" else "is a directory"):
        writable(path)


def test_what_a_verb_wrote_is_replaced(tmp_path):
    for name in ("picture.png", "picture.jpg"):
        sheets.save(torch.zeros(3, 8, 8), tmp_path / name)
        assert sheets.writable(tmp_path / name, "views")
    (tmp_path / "audit.json").write_text(json.dumps(data.as_json(Audit({}, {}))))
    assert data.writable(tmp_path / "audit.json")


# --- Directories that cannot be written ---


def test_a_run_directory_below_a_file_is_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")

    def read(*_):
        raise AssertionError("the data were read first")

    monkeypatch.setattr(sslctl.training.beginning, "build_source", read)
    assert pretrain(tmp_path / "file" / "run", *SIMCLR) == 2
    assert str(tmp_path / "file" / "run") in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_of_another_tool_is_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "results.jsonl", ".notes.writing"):
        (tmp_path / name).write_text("{}")
    for step in range(1, 5):
        anothers(tmp_path / "checkpoints" / f"step-{step}")
    before = contents(tmp_path)

    def read(*_):
        raise AssertionError("the data were read first")

    monkeypatch.setattr(sslctl.training.beginning, "build_source", read)
    assert pretrain(tmp_path, *SIMCLR) == 2
    assert f"{tmp_path} is no run of sslctl and not empty" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_run_directory_is_refused(tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o555)
    assert pretrain(tmp_path / "closed" / "run", *SIMCLR) == 2
    assert str(tmp_path / "closed" / "run") in capsys.readouterr().err
    assert list((tmp_path / "closed").iterdir()) == []


def test_a_directory_that_is_lost_in_mid_run_is_an_error(tmp_path, capsys, monkeypatch):
    run, real = tmp_path / "run", checkpoint.save

    def lost(run_dir, step, *arguments, **keywords):
        if step == 6:
            (run / "checkpoints").rename(tmp_path / "kept")
            (run / "checkpoints").write_text("not a directory")
        return real(run_dir, step, *arguments, **keywords)

    monkeypatch.setattr(checkpoint, "save", lost)
    assert pretrain(run, *SIMCLR, "trainer.save_every_steps=2") == 1
    assert str(run / "checkpoints") in capsys.readouterr().err
    for step in (2, 4):
        checkpoint.verify(tmp_path / "kept" / f"step-{step}")
    assert not (run / "backbone.safetensors").exists()


def test_a_run_whose_directory_another_has_taken_ends_and_touches_nothing_there(tmp_path, capsys, monkeypatch):
    """As by `mv run old` and another run of the same name, while the first trains."""
    run, real = tmp_path / "run", sslctl.training.train.train_step
    before = {}

    def replaced(setup, step, batch):
        if step == 5:
            shutil.copytree(run, tmp_path / "other")
            (tmp_path / "other" / "lock").write_text("pid 1 on elsewhere\n")
            run.rename(tmp_path / "moved")
            (tmp_path / "other").rename(run)
            before.update(contents(run))
        return real(setup, step, batch)

    monkeypatch.setattr(sslctl.training.train, "train_step", replaced)
    assert pretrain(run, *SIMCLR, "trainer.save_every_steps=2") == 1
    assert f"{run} was moved away, and is now in use by pid 1 on elsewhere" in capsys.readouterr().err
    assert contents(run) == before


# --- Rotation ---


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, capsys, monkeypatch):
    real = Path.rmdir

    def rmdir(path):
        if "step-2" in path.name:
            raise OSError(errno.EBUSY, "busy", str(path))
        real(path)

    save(tmp_path, 2)
    save(tmp_path, 4)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    save(tmp_path, 6)
    printed = capsys.readouterr().err
    assert "warning" in printed
    assert "step-2" in printed
    assert {"step-6", "step-4"} <= set(valid(tmp_path))


def anothers(folder):
    """What somebody else keeps at checkpoints/step-N."""
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_text("theirs")


@pytest.mark.parametrize("keep_last", [1, 2])
def test_what_is_no_checkpoint_of_ours_is_never_deleted(keep_last, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("step-1", "step-99", "step-4.backup", ".step-4", "epoch-3"):
        anothers(checkpoints / name)
    (checkpoints / "step-0").write_text("a file")
    (checkpoints / "step-98").symlink_to(save(tmp_path / "other", 98))
    before = contents(tmp_path)
    for step in (2, 4, 6, 8):
        save(tmp_path / "run", step, keep_last)
    assert before.items() <= contents(tmp_path).items()
    assert (checkpoints / "step-98").is_symlink()
    own = [path.name for path in checkpoint.steps_on_disk(tmp_path / "run") if path.name not in ("step-98", "step-99")]
    assert own == [*["step-8", "step-6"][:keep_last], "step-1", "step-0"]  # the control: ours do go


@pytest.mark.parametrize("name", ["step-4", ".step-4.writing"])
@pytest.mark.parametrize("kind", ["directory", "link", "file"])
def test_what_is_in_the_place_of_a_checkpoint_is_set_aside(kind, name, tmp_path, capsys):
    place, theirs = tmp_path / "run" / "checkpoints" / name, tmp_path / "theirs"
    place.parent.mkdir(parents=True)
    anothers(theirs)
    (theirs / "notes.txt").write_text("kept")
    if kind == "directory":
        shutil.copytree(theirs, place)
    elif kind == "link":
        place.symlink_to(theirs)
    else:
        place.write_text("kept")
    before = contents(theirs)
    checkpoint.verify(save(tmp_path / "run", 4))
    aside = place.with_name("step-4.aside")
    assert f"{place} is not as sslctl wrote it: not deleted, now {aside.name}" in capsys.readouterr().err
    assert contents(theirs) == before
    assert (aside if kind == "file" else aside / "notes.txt").read_text() == "kept"
    assert aside.is_symlink() == (kind == "link")


def test_a_file_that_was_put_into_a_checkpoint_outlives_it(tmp_path):
    (save(tmp_path, 2) / "notes.txt").write_text("kept")
    for step in (4, 6, 8):
        save(tmp_path, step)
    assert contents_only(contents(tmp_path / "checkpoints" / "step-2.aside")) == {"notes.txt": b"kept"}
    assert valid(tmp_path) == ["step-8", "step-6"]


@pytest.mark.parametrize(
    "kind", ["link", "directory", "notes in a directory", "directory of notes", "file of notes", ""]
)
def test_what_is_in_the_place_of_the_last_ones_name_is_replaced_if_it_is_ours(kind, tmp_path, capsys):
    last = tmp_path / "last"
    save(tmp_path, 2)
    if "notes" not in kind:
        copy_with_links_followed(tmp_path)
    if kind == "link":
        shutil.rmtree(last)
        last.symlink_to("checkpoints/step-2")
    elif kind == "file of notes":
        last.write_text("mine")
    elif kind == "directory of notes":
        last.unlink()
        write_notes(last)
    elif kind == "notes in a directory":
        copy_with_links_followed(tmp_path)
        write_notes(last)
    checkpoint.remove_leftovers(tmp_path)
    save(tmp_path, 4)
    assert last.read_text() == "checkpoints/step-4\n"
    aside = {name: content for name, content in contents_only(contents(tmp_path)).items() if "aside" in name}
    if "notes" not in kind:
        assert aside == {}
    else:
        assert list(aside.values()) == [b"mine"]
        assert "last is not as sslctl wrote it: not deleted, now last.aside" in capsys.readouterr().err.replace(
            ".last.removing", "last"
        )
    assert hidden(tmp_path) == []


def write_notes(folder):
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("mine")


def test_checkpoints_that_are_needed_no_more_leave_what_is_not_theirs(tmp_path):
    save(tmp_path / "own", 2)
    checkpoint.remove_all(tmp_path / "own")
    assert list((tmp_path / "own").iterdir()) == []
    save(tmp_path / "mixed", 2)
    anothers(tmp_path / "mixed" / "checkpoints" / "step-7")
    checkpoint.remove_all(tmp_path / "mixed")
    assert list(contents(tmp_path / "mixed")) == ["checkpoints/step-7/weights.safetensors"]


def test_one_checkpoint_alone_is_refused(tmp_path, capsys):
    assert pretrain(tmp_path / "run", *SIMCLR, "trainer.keep_last=1") == 2
    assert "trainer.keep_last=1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_damaged_newer_checkpoints_do_not_push_out_the_one_just_written(tmp_path):
    for step in (20, 30):
        (save(tmp_path, step) / "weights.safetensors").write_bytes(b"")
    save(tmp_path, 5, keep_last=2)
    assert checkpoint.newest_valid(tmp_path).name == "step-5"
    save(tmp_path, 6, keep_last=2)
    assert checkpoint.newest_valid(tmp_path).name == "step-6"


def test_evaluating_a_living_run_leaves_its_unfinished_checkpoint(tmp_path):
    claim.describe(tmp_path, CONFIG, {}, FACTS, PREPROCESS, "")
    save(tmp_path, 2)
    lock, unfinished = claim.Lock(tmp_path), tmp_path / "checkpoints" / ".step-4.writing"
    unfinished.mkdir()
    (unfinished / "weights.safetensors").write_bytes(b"half")
    assert resolve_runs(str(tmp_path)) == [(tmp_path, tmp_path / "checkpoints" / "step-2")]
    assert (unfinished / "weights.safetensors").exists(), "the process that writes it has lost it"
    lock.release()


# --- State that no checkpoint can hold ---


def test_an_optimizer_with_numpys_values_continues_exactly(tmp_path):
    words = (*SIMCLR, *own_optimizer("NumpySGD"))
    run = finish(tmp_path / "run", *words, stops=(4,))
    assert differences(tensors(run), tensors(finish(tmp_path / "straight", *words))) == []


def refused_after_the_first_step(run_dir, words, capsys):
    """What a run says that is refused before anything is saved."""
    assert pretrain(run_dir, *words) == 1
    assert metrics_of(run_dir) == []
    assert not (run_dir / "checkpoints").exists()
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


def metrics_of(run_dir):
    return metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []


def test_an_optimizers_state_that_is_not_plain_is_refused_by_name(tmp_path, capsys):
    printed = refused_after_the_first_step(tmp_path / "run", (*SIMCLR, *own_optimizer("HistorySGD")), capsys)
    parameter = "backbone.network.conv1.weight"
    assert f"optimizer state 'norms' of parameter {parameter} is a deque, which no checkpoint can hold" in printed


def test_a_buffer_that_grows_is_refused_by_name(tmp_path, capsys):
    printed = refused_after_the_first_step(tmp_path / "run", (*SIMCLR, *own("GrowingSimCLR")), capsys)
    assert "1 tensors of another shape: losses: (1,) found, (0,) expected" in printed


# --- Whole runs that are killed; scripts/kill_campaign kills more of them ---


def run_and_die(run_dir, words, how, value):
    """A run that dies as a case says."""
    real = checkpoint.save

    def save_and_die(run_dir, step, *arguments, **keywords):
        if step == 6 and how == "byte of a save":
            die_at_byte(value)
        return real(run_dir, step, *arguments, **keywords)

    checkpoint.save = save_and_die
    if how == "operation":
        die_at_operation(value, run_dir)
    with signal_at(value if how == "step" else None, signal.SIGKILL):
        main(command(run_dir, *words))


def continued_equals(run_dir, words, straight):
    """A killed run's checkpoints are all valid, and the same command ends as the straight run did."""
    valid(run_dir)
    finish(run_dir, *words)
    assert differences(tensors(run_dir), tensors(straight)) == []
    assert metrics(run_dir) == metrics(straight)
    assert hidden(run_dir) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["byte of a save", "operation", "step"])
def test_a_killed_run_continues_exactly(how, tmp_path):
    words = [*MOCO, "trainer.save_every_steps=2", "evaluation.knn_every_epochs=1"]
    straight = finish(tmp_path / "straight", *words)
    random.seed(0)
    values = {
        "byte of a save": [0, 50, 1000, 5000, 10000, 20000],
        "operation": sorted(random.sample(range(1, 90), 10)),
        "step": [1, 2, 4, 7, 10],
    }[how]
    cases = [(tmp_path / f"{how}-{value}", words, how, value) for value in values]
    ended = [ended_by(run_and_die, *case) for case in cases]
    assert set(ended) == {signal.SIGXFSZ if how == "byte of a save" else signal.SIGKILL}
    for run_dir, *_ in cases:
        run_dir.mkdir(exist_ok=True)  # killed before it made anything
        continued_equals(run_dir, words, straight)


# --- Loss and gradient that are not numbers ---


@pytest.mark.parametrize(
    ("fault", "at"),
    [
        *(("nan loss", 3), ("inf loss", 3), ("nan gradient", 3), ("nan loss", 0)),
        *(slow("inf loss", 0), slow("nan gradient", 0), slow("nan loss", 9), slow("nan gradient", 9)),
    ],
)
def test_a_bad_number_stops_before_anything_sees_it(fault, at, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEST_FAULT", f"{fault}@{at}")
    words = (*MOCO, *own("FailingMoCo"), "trainer.save_every_steps=1", "scheduler=constant")
    assert pretrain(tmp_path / "run", *words) == 1
    printed = capsys.readouterr().err
    assert f"step {at} " in printed
    assert "lr 0.03" in printed
    assert "digits train image " in printed
    assert fault.split()[1] in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "backbone.safetensors").exists()
    logged = metrics(tmp_path / "run") if at else []
    assert [m["step"] for m in logged] == list(range(1, at + 1))

    alive = FailingMoCo.alive
    for name, tensor in alive.state_dict().items():
        assert torch.isfinite(tensor).all(), f"{name} is spoilt"
    assert alive.queue_pointer == at * 256 % len(alive.queue)
    if not at:
        assert not (tmp_path / "run" / "checkpoints").exists()
        return
    assert valid(tmp_path / "run")[0] == f"step-{at}"
    stored = checkpoint.load_tensors(newest(tmp_path / "run") / "weights.safetensors")
    kept = [n for n, _ in alive.named_parameters() if not n.startswith("teacher")] + ["queue", "queue_index"]
    assert [n for n in kept if not torch.equal(stored[n], alive.state_dict()[n])] == []


def test_the_images_of_a_bad_step_are_those_it_was_made_of(tmp_path, capsys, monkeypatch):
    from sslctl.data.sampler import batch_indices

    monkeypatch.setenv("TEST_FAULT", "nan loss@3")
    assert pretrain(tmp_path / "run", *MOCO, *own("FailingMoCo")) == 1
    first = batch_indices(3, 1438, 256, seed=0)[0]
    assert f"begin with digits train image {first}," in capsys.readouterr().err


def test_a_run_that_stopped_at_a_bad_number_continues_once_it_is_gone(tmp_path, monkeypatch):
    words = (*MOCO, *own("FailingMoCo"), "trainer.save_every_steps=2")
    monkeypatch.setenv("TEST_FAULT", "nan loss@5")
    assert pretrain(tmp_path / "run", *words) == 1
    monkeypatch.setenv("TEST_FAULT", "nan loss@-1")
    finish(tmp_path / "run", *words)
    assert differences(tensors(tmp_path / "run"), tensors(finish(tmp_path / "straight", *words))) == []


# --- Logs ---


@pytest.fixture
def event_files(monkeypatch):
    """Event files of this process count from 0: those of one second are read in the order of their names, 10 before 9."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def events(run_dir):
    """tag -> the steps that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loaded = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    loaded.Reload()
    return {tag: [e.step for e in loaded.Scalars(tag)] for tag in loaded.Tags()["scalars"]}


WITH_EVENTS = (*SIMCLR, "trainer.tensorboard=true", "evaluation.knn_every_epochs=1")
ALL_STEPS = list(range(1, STEPS + 1))


@pytest.mark.usefixtures("event_files")
@pytest.mark.parametrize("stops", [slow(()), slow((4,)), (5,), (3, 4), slow((10,))])
def test_tensorboard_shows_every_step_once(stops, tmp_path):
    run = finish(tmp_path / "run", *WITH_EVENTS, stops=stops)
    actual = events(run)
    assert actual["loss"] == ALL_STEPS
    assert actual["knn"] == [m["step"] for m in metrics(run) if "knn" in m]


@pytest.mark.usefixtures("event_files")
@pytest.mark.parametrize("saved_every", [1000, 2], ids=["without a checkpoint", "with one"])
def test_tensorboard_shows_every_step_once_after_a_failure(saved_every, tmp_path, monkeypatch):
    words = (*MOCO, *own("FailingMoCo"), "trainer.tensorboard=true", f"trainer.save_every_steps={saved_every}")
    monkeypatch.setenv("TEST_FAULT", "nan loss@5")
    assert pretrain(tmp_path / "run", *words) == 1
    assert events(tmp_path / "run")["loss"] == [1, 2, 3, 4, 5]
    monkeypatch.setenv("TEST_FAULT", "nan loss@-1")
    finish(tmp_path / "run", *words)
    assert events(tmp_path / "run")["loss"] == ALL_STEPS
    assert [m["step"] for m in metrics(tmp_path / "run")] == ALL_STEPS


@pytest.mark.usefixtures("event_files")
def test_a_cut_off_event_record_is_tolerated(tmp_path):
    run = tmp_path / "run"
    assert pretrain(run, *WITH_EVENTS, stop_after=4) == 143
    (file,) = run.glob("events.*")
    file.write_bytes(file.read_bytes()[:-7])
    finish(run, *WITH_EVENTS)
    shown = events(run)["loss"]
    assert shown[-6:] == [5, 6, 7, 8, 9, 10]
    assert len(set(shown)) == len(shown)


@pytest.mark.slow
def test_tensorboard_shows_every_saved_step_once_after_a_kill(tmp_path):
    words = [*WITH_EVENTS, "trainer.save_every_steps=4"]
    assert ended_by(run_and_die, tmp_path / "run", words, "step", 7) == signal.SIGKILL
    assert [m["step"] for m in metrics(tmp_path / "run") if "loss" in m] == [1, 2, 3, 4, 5, 6]
    time.sleep(1.1)  # another process begins in another second: its event file comes later
    finish(tmp_path / "run", *words)
    assert events(tmp_path / "run")["loss"] == ALL_STEPS
    assert [m["step"] for m in metrics(tmp_path / "run") if "loss" in m] == ALL_STEPS
