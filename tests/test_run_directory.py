"""Run directories: who holds one, what it was started with, what it has logged."""

import json
import os
import socket
import subprocess
import sys

import pytest

from sslctl.errors import InputError
from sslctl.evaluation.trained_classifier import lock_directory
from sslctl.runs import atomic, checkpoint, claim, reading
from sslctl.runs import directory as rundir
from sslctl.runs.fingerprint import fingerprint, fingerprint_keys
from sslctl.runs.metrics import append_metrics, cut_metrics
from sslctl.runs.ownership import MARKER, is_checkpoint, mark, refuse_other
from tests.runs import CONFIG, FACTS, PREPROCESS, contents


def start(run_dir, config=CONFIG, hashes=None):
    run_dir.mkdir(exist_ok=True)
    claim.describe(run_dir, config, hashes or {"data": "abc"}, FACTS, PREPROCESS, "sslctl pretrain")


# --- The lock ---


def test_a_second_holder_is_refused_with_pid_and_host(tmp_path):
    lock = claim.Lock(tmp_path)
    with pytest.raises(InputError) as caught:
        claim.Lock(tmp_path)
    assert f"pid {os.getpid()} on {socket.gethostname()}" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    lock.release()


def test_a_refused_holder_does_not_disturb_the_first(tmp_path):
    lock = claim.Lock(tmp_path)
    before = (tmp_path / "lock").read_bytes()
    for _ in range(3):
        with pytest.raises(InputError):
            claim.Lock(tmp_path)
    assert claim.is_held(tmp_path)
    assert (tmp_path / "lock").read_bytes() == before
    lock.release()


def test_a_released_lock_can_be_taken_again(tmp_path):
    claim.Lock(tmp_path).release()
    assert not claim.is_held(tmp_path)
    lock = claim.Lock(tmp_path)
    assert claim.is_held(tmp_path)
    lock.release()


@pytest.mark.slow
def test_a_lock_left_by_a_dead_process_is_taken_over(tmp_path):
    script = "import sys, os; from pathlib import Path; from sslctl.runs.claim import Lock; Lock(Path(sys.argv[1]));"
    dead = subprocess.run([sys.executable, "-c", script + "os.kill(os.getpid(), 9)", str(tmp_path)], check=False)
    assert dead.returncode == -9
    assert (tmp_path / "lock").read_text().startswith("pid ")
    lock = claim.Lock(tmp_path)
    assert (tmp_path / "lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"
    lock.release()


def test_looking_whether_a_lock_is_held_changes_nothing(tmp_path):
    assert not claim.is_held(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- Whose a directory is ---


def manifest(step, **changes):
    entry = {"bytes": 1, "sha256": "0" * 64}
    return json.dumps({"step": step, "files": {"weights.safetensors": entry, "state.pt": entry}} | changes)


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


ANOTHERS = {
    "of another tool": {"config.yaml": "a: 1", "metrics.jsonl": "{}", "checkpoints/step-5/model.pt": "theirs"},
    "with both files of a run": {"config.yaml": "a: 1", "environment.json": "{}"},
    "with other manifests": {"checkpoints/step-5/manifest.json": '{"step": 5, "files": {"model.pt": {}}}'},
    "with a manifest of another step": {"checkpoints/step-5/manifest.json": manifest(6)},
    "with a manifest of a later version": {"checkpoints/step-5/manifest.json": manifest(5, format=3)},
    "of notes": {"thesis.tex": "all of it"},
    "of a hidden file": {".git/HEAD": "ref"},
    "with a folder called lock": {"lock/file": ""},
    "with a damaged marker": {MARKER: "{", "config.yaml": "a: 1"},
    "of a run of a later version": {MARKER: '{"format": 2}', "config.yaml": "a: 1"},
}


def take_for_a_classifier(folder):
    with lock_directory(folder):
        pass


@pytest.mark.parametrize("take", [claim.take, take_for_a_classifier])
@pytest.mark.parametrize("files", ANOTHERS.values(), ids=ANOTHERS)
def test_a_directory_of_anything_else_is_refused_untouched(files, take, tmp_path):
    write(tmp_path, files)
    before, times = contents(tmp_path), tmp_path.stat().st_mtime_ns
    with pytest.raises(InputError, match=str(tmp_path)):
        take(tmp_path)
    assert contents(tmp_path) == before
    assert tmp_path.stat().st_mtime_ns == times


OURS = {
    "empty": {},
    "killed before it was marked": {"lock": "", ".writable-12": "", f".{MARKER}.12.writing": '{"for'},
    "marked": {MARKER: '{"format": 1, "version": "0.2.0"}', "config.yaml": "a: 1"},
    "from before there were markers": {"checkpoints/step-5/manifest.json": manifest(5), "config.yaml": "a: 1"},
    "of a checkpoint of today": {"checkpoints/step-5/manifest.json": manifest(5, format=2)},
    "whose marker is damaged": {"checkpoints/step-5/manifest.json": manifest(5, format=1), MARKER: ""},
}


@pytest.mark.parametrize("files", OURS.values(), ids=OURS)
def test_a_run_and_what_a_kill_leaves_of_one_are_taken(files, tmp_path):
    write(tmp_path, files)
    claim.take(tmp_path).release()
    assert json.loads((tmp_path / MARKER).read_text()) == {"format": 1, "version": rundir.versions()["sslctl"]}
    refuse_other(tmp_path)


def test_checkpoints_that_lie_outside_of_the_run_are_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    mark(tmp_path / "run")
    claim.take(tmp_path / "run").release()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="checkpoints is a link"):
        claim.take(tmp_path / "run")


@pytest.mark.parametrize("text", ["[]", "1", "null", '{"step": 5}', '{"step": 5, "files": []}', "\x00", manifest("5")])
def test_what_is_no_manifest_makes_no_checkpoint(text, tmp_path):
    write(tmp_path, {"step-5/manifest.json": text, "step-6/manifest.json": manifest(6)})
    assert not is_checkpoint(tmp_path / "step-5")
    assert is_checkpoint(tmp_path / "step-6")


@pytest.mark.parametrize("name", ["step-", "step-x", "step-05", "step-5.aside", "step-²", "step-٣", ".step-5.writing"])
def test_other_names_are_no_checkpoints(name, tmp_path):
    for each in (name, "step-7"):
        (tmp_path / "checkpoints" / each).mkdir(parents=True)
    assert [path.name for path in checkpoint.steps_on_disk(tmp_path)] == ["step-7"]


def test_the_link_to_the_latest_run_takes_nobodys_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"runs/latest": "mine", "runs/digits/run/file": ""})
    claim.point_latest(tmp_path / "runs" / "digits" / "run")
    assert (tmp_path / "runs" / "latest").read_text() == "mine"
    (tmp_path / "runs" / "latest").unlink()
    for _ in range(2):
        claim.point_latest(tmp_path / "runs" / "digits" / "run")
    assert (tmp_path / "runs" / "latest").resolve() == tmp_path / "runs" / "digits" / "run"


# --- Making and starting ---


def test_a_directory_below_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/run"):
        claim.make(tmp_path / "file" / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused_by_name(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="Permission denied"):
        claim.make(tmp_path / "run")
    tmp_path.chmod(0o755)


def test_making_a_directory_leaves_it_empty(tmp_path):
    claim.make(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_started_run_knows_its_configuration(tmp_path):
    start(tmp_path)
    assert rundir.is_run(tmp_path)
    assert reading.read_config(tmp_path) == {**CONFIG, "run_dir": str(tmp_path)}
    environment = reading.read_environment(tmp_path)
    assert environment["hashes"] == {"data": "abc"}
    assert environment["facts"] == FACTS
    assert {"torch", "python", "sslctl"} <= environment["versions"].keys()
    assert reading.read_preprocess(tmp_path) == PREPROCESS


def test_the_same_configuration_again_rewrites_nothing(tmp_path):
    start(tmp_path)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    start(tmp_path, {**CONFIG, "dataset": {"root": "/moved", "image_size": 8}})  # the data may lie elsewhere
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("config", "hashes", "line"),
    [
        ({**CONFIG, "method": {"size": 4}}, None, "method.size: 3 → 4"),
        ({**CONFIG, "method": {"size": 3, "new": True}}, None, "method.new: None → True"),
        ({**CONFIG, "seed": 1}, None, "seed: 0 → 1"),
        ({**CONFIG, "trainer": {"epochs": 5}}, None, "trainer.epochs: 2 → 5"),
        (CONFIG, {"data": "xyz"}, "content of data: abc → xyz"),
    ],
)
def test_another_configuration_is_refused_with_what_differs(config, hashes, line, tmp_path):
    start(tmp_path)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    with pytest.raises(InputError) as caught:
        start(tmp_path, config, hashes)
    listed = [text.strip() for text in caught.value.messages if "→" in text and "asked for" not in text]
    assert listed == [line]
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["", "- a\n- b\n", "a: [", "\x00"])
def test_a_damaged_configuration_is_named(damage, tmp_path):
    start(tmp_path)
    (tmp_path / "config.yaml").write_text(damage)
    with pytest.raises(InputError, match=r"config\.yaml"):
        start(tmp_path)


@pytest.mark.parametrize("damage", ["", "{", "[1"])
def test_a_damaged_environment_is_named(damage, tmp_path):
    start(tmp_path)
    (tmp_path / "environment.json").write_text(damage)
    with pytest.raises(InputError, match=r"environment\.json"):
        start(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    atomic.write_text(tmp_path / "f", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"


def test_two_processes_may_write_one_file_at_once(tmp_path, monkeypatch):
    with atomic.replacing(tmp_path / "f") as temporary:
        temporary.write_text("first, done last")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        atomic.write_text(tmp_path / "f", "second")
        assert (tmp_path / "f").read_text() == "second"
    assert (tmp_path / "f").read_text() == "first, done last"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_what_a_kill_left_unfinished_is_removed_before_training_goes_on(tmp_path):
    mine = [".mine", ".notes.writing", ".writable-", "file.123.writing"]
    write(tmp_path, dict.fromkeys([*mine, ".config.yaml.123.writing", ".writable-123"], "text"))
    checkpoint.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)


# --- Lines ---


def lines(*steps):
    return "".join(json.dumps({"step": step, "epoch": step / 4, "loss": step / 2}) + "\n" for step in steps)


def test_lines_come_back(tmp_path):
    for step in (1, 2):
        append_metrics(tmp_path / "m.jsonl", {"step": step})
    assert reading.read_lines(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert reading.read_lines(tmp_path / "none.jsonl") == []


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_text(lines(1, 2) + '{"step": 3, "lo')
    assert [r["step"] for r in reading.read_lines(tmp_path / "m.jsonl")] == [1, 2]


@pytest.mark.parametrize("more", ["}", ' {"step": 4', "0"])
def test_a_last_line_with_more_behind_it_was_not_cut_off(more, tmp_path):
    (tmp_path / "m.jsonl").write_text(lines(1, 2) + '{"step": 3}' + more)
    with pytest.raises(InputError, match=r"m\.jsonl line 3"):
        reading.read_lines(tmp_path / "m.jsonl")


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text(lines(1) + "garbage\n" + lines(2))
    with pytest.raises(InputError, match=r"m\.jsonl line 2"):
        reading.read_lines(tmp_path / "m.jsonl")


@pytest.mark.parametrize("cut", [0, 3, 5, 99])
def test_metrics_are_cut_after_the_step_that_is_resumed(cut, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(lines(1, 2, 3, 3, 4, 5) + '{"step": 6, "lo')
    kept = [step for step in (1, 2, 3, 3, 4, 5) if step <= cut]
    assert [r["step"] for r in cut_metrics(tmp_path, cut)] == kept
    assert (tmp_path / "metrics.jsonl").read_text() == lines(*kept)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_are_cut_by_a_rename(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text(lines(1, 2, 3))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tmp_path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cut_metrics(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == lines(1, 2, 3)


# --- Finding ---


def test_runs_are_found_once_and_in_order(tmp_path):
    for name in ("b", "a"):
        start(tmp_path / name)
    (tmp_path / "latest").symlink_to("b")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("{}")
    assert rundir.find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert rundir.find_runs(tmp_path / "latest") == [tmp_path / "b"]
    assert rundir.find_runs(tmp_path / "other") == []


def test_the_size_of_a_run_counts_no_link_twice(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").symlink_to("a")
    assert rundir.total_size(tmp_path) == 5


# --- The fingerprint ---


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"seed": 7}, True),
        ({"dataset": {"root": "/b", "image_size": 8}}, True),
        ({"dataset": {"root": "/a", "image_size": 9}}, False),
        ({"trainer": {"epochs": 2, "workers": 8}}, True),
        ({"trainer": {"epochs": 2, "precision": "bf16"}}, False),
        ({"run_dir": "/elsewhere"}, True),
        ({"evaluation": {"knn": {"k": 5}}}, True),
        ({"method": {"size": 4}}, False),
    ],
)
def test_the_fingerprint_depends_on_what_can_change_a_weight(change, same):
    marks = [fingerprint(fingerprint_keys(c, {"data": "abc"})) for c in (CONFIG, CONFIG | change)]
    assert (marks[0] == marks[1]) == same


def test_the_fingerprint_depends_on_the_data():
    marks = {fingerprint(fingerprint_keys(CONFIG, {"data": digest})) for digest in ("abc", "abd")}
    assert len(marks) == 2
