"""Damaged files of a run: each is named with line and reason, hides no other run, and is repaired by the command it names."""

import ctypes
import json
import os
import random
import shlex
import shutil
import stat
import sys
from collections import Counter
from pathlib import Path

import fuzz_files
import pytest

import sslctl
from sslctl.cli import main
from sslctl.data.sources import digits
from sslctl.errors import InputError
from sslctl.evaluation import subjects as who
from sslctl.evaluation.results import make_result
from sslctl.factory.from_run import resolve_runs, run_preprocess
from sslctl.runs import checkpoint, claim
from sslctl.runs.checksums import check_json, check_yaml, sign_json, sign_yaml
from sslctl.runs.metrics import read_metrics
from sslctl.runs.reading import Damaged, read_config, read_environment, read_lines, read_preprocess
from sslctl.runs.repair import damages, repair
from sslctl.runs.results import read_results
from tests.runs import PROBE, SIMCLR, contents, differences, finish, metrics, pretrain, results, slow, tensors

CLOSING = (*SIMCLR, "evaluation.closing=true", "evaluation.knn_every_epochs=1", *PROBE)
KNN = ("device=cpu", "cache=false", "subjects=[trained]")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with metrics and results. To be read only."""
    return finish(tmp_path_factory.mktemp("whole") / "run", *CLOSING)


@pytest.fixture(scope="module")
def _stopped(tmp_path_factory):
    run = tmp_path_factory.mktemp("stopped") / "run"
    assert pretrain(run, *CLOSING, stop_after=6) == 143
    return run


@pytest.fixture
def stopped(_stopped, tmp_path, capsys):
    """A run that was stopped at step 6 of 10; a copy."""
    shutil.copytree(_stopped, tmp_path / "run", symlinks=True)
    capsys.readouterr()
    return tmp_path / "run"


@pytest.fixture
def run(whole, tmp_path, capsys):
    """The finished run; a copy."""
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    capsys.readouterr()
    return tmp_path / "run"


def directory(path):
    path.unlink()
    path.mkdir()


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(content):
    return lambda path: path.write_text(content)


def line(number, change):
    """Another line in the place of one; `change` takes what it holds and returns that, or a text."""

    def damage(path):
        lines = path.read_bytes().splitlines(keepends=True)
        value = json.loads(lines[number - 1])
        value.pop("crc32")
        new = change(value)
        lines[number - 1] = new if isinstance(new, bytes) else json.dumps(new).encode() + b"\n"
        path.write_bytes(b"".join(lines))

    return damage


def values(**changes):
    return lambda value: {k: v for k, v in (value | changes).items() if v is not ...}


def edited(change):
    """A JSON file with other values, and no checksum."""

    def damage(path):
        value = json.loads(path.read_text())
        value.pop("crc32")
        change(value)
        path.write_text(json.dumps(value))

    return damage


def flip_a_digit(path):
    """One bit of a digit: the file can be read, its number is another."""
    content = bytearray(path.read_bytes())
    places = [i for i, c in enumerate(content) if chr(c).isdigit() and chr(content[i - 1]) in ".0123456789"]
    content[places[len(places) // 2]] ^= 1
    path.write_bytes(content)


DAMAGES = {  # name -> (file, damage, what is said behind the file's name)
    "config cut": ("config.yaml", half, ": not as it was written"),
    "config empty": ("config.yaml", text(""), ": empty"),
    "config no yaml": ("config.yaml", text("a: 1\nb: [\n"), " line 3: "),
    "config a list": ("config.yaml", text("- 1\n"), ": expected an object, found a list"),
    "config of others": ("config.yaml", text("seed: 0\n"), ": without backbone, dataset, method, names, scheduler"),
    "config a date": ("config.yaml", text("seed: 2001-99-99\n"), ": month must be in 1..12"),
    "config a directory": ("config.yaml", directory, ": a directory is in its place"),
    "config lost": ("config.yaml", Path.unlink, ": missing; the command that started"),
    "config a bomb": (
        "config.yaml",
        text("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))),
        ": more than 100,000 values",
    ),
    "config of itself": ("config.yaml", text("a: &a [*a]\n"), ": "),
    "config flipped": ("config.yaml", flip_a_digit, ": not as it was written"),
    "environment empty": ("environment.json", text(""), ": empty"),
    "environment lost": ("environment.json", Path.unlink, ": missing"),
    "environment flipped": ("environment.json", flip_a_digit, ": not as it was written"),
    "environment of 0.1": (
        "environment.json",
        edited(lambda e: e["known"].update(blind_loss=1.0)),
        ": known with unknown blind_loss",
    ),
    "no steps": (
        "environment.json",
        edited(lambda e: e["facts"].update(steps_per_epoch=0)),
        "steps_per_epoch: expected at",
    ),
    "preprocess flipped": ("preprocess.json", flip_a_digit, ": not as it was written"),
    "preprocess a text": (
        "preprocess.json",
        edited(lambda p: p.update(mean="0.5")),
        ": mean: expected a list, found '0.5'",
    ),
    "stopped of others": ("stopped.json", text('{"why": 1}'), ": without reason and with unknown why"),
    "metrics no utf-8": ("metrics.jsonl", line(2, lambda _: b'{"step": 2, "\xff": 1}\n'), " line 2: no UTF-8"),
    "metrics a list": ("metrics.jsonl", line(3, lambda _: [1]), " line 3: expected an object, found a list"),
    "metrics without a step": ("metrics.jsonl", line(1, values(step=...)), " line 1: without step"),
    "metrics of step NaN": (
        "metrics.jsonl",
        line(1, values(step=float("nan"))),
        "step: expected a whole number, found nan",
    ),
    "metrics a text": ("metrics.jsonl", line(4, values(loss="0.5")), "loss: expected a finite number, found '0.5'"),
    "metrics nested": ("metrics.jsonl", line(4, lambda _: b"[" * 99999 + b"\n"), " line 4: maximum recursion depth"),
    "metrics zeroed": ("metrics.jsonl", line(4, lambda _: b"\0" * 80 + b"\n"), " line 4: Expecting value"),
    "metrics flipped": ("metrics.jsonl", flip_a_digit, ": not as it was written"),
    "metrics a directory": ("metrics.jsonl", directory, ": a directory is in its place"),
    "results flipped": ("results.jsonl", flip_a_digit, ": not as it was written"),
    "results of others": ("results.jsonl", line(2, lambda _: {"loss": 1}), " line 2: no result of format 1: without"),
    "results NaN": ("results.jsonl", line(1, values(value=float("nan"))), "value: expected a finite number, found nan"),
    "results past all": ("results.jsonl", line(1, values(value=2.0)), "value: expected a share, from 0 to 1"),
    "results a directory": ("results.jsonl", directory, ": a directory is in its place"),
}


def damage(run, name):
    file, do, words = DAMAGES[name]
    do(run / file)
    return run / file, words


# --- Among others ---


@pytest.fixture(scope="module")
def many(whole, tmp_path_factory):
    """A folder with a run of every damage, and one that is whole, with a name like a pattern and a command of others."""
    folder = tmp_path_factory.mktemp("many")
    for name in DAMAGES:
        shutil.copytree(whole, folder / name, symlinks=True)
        damage(folder / name, name)
    shutil.copytree(whole, folder / "[x]*", symlinks=True)
    edited(lambda environment: environment.update(command="rm -rf ~"))(folder / "[x]*" / "environment.json")
    return folder


def test_every_damaged_run_is_listed_with_file_line_and_reason_beside_the_others(many, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["runs", str(many)]) == 0
    output = capsys.readouterr().out
    for name, (file, _, words) in DAMAGES.items():
        (message,) = [text for text in output.splitlines() if text.startswith(f"  {many / name / file}")]
        assert words in message
        command = f"  {shlex.join(['sslctl', 'runs', str(many / name), 'repair=true'])}\n"
        assert (command in output) == ("missing" not in words)
    (row,) = [text for text in output.splitlines() if "finished" in text]
    assert "[x]*" in row
    assert output.count(" damaged ") == len(DAMAGES)


def test_a_report_shows_the_others_and_names_what_it_leaves_out(many, capsys, tmp_path):
    words = ["report", *map(str, sorted(many.iterdir())), f"out={tmp_path / 'r.html'}", "images=1", "neighbours=1"]
    assert main([*words, "map_images=10", "rows=20", "cache=false", "device=cpu"]) == 0
    output, page = capsys.readouterr().out, (tmp_path / "r.html").read_text()
    assert "1 run, " in output
    for name, (file, _, _) in DAMAGES.items():
        assert f"left out: {many / name / file}" in output
        assert f"left out: {many / name / file}" in page
    assert "# none: recorded command &#39;rm -rf ~&#39;: expected sslctl VERB …" in page


def test_evaluations_of_a_folder_leave_damaged_runs_out(many, capsys, tmp_path):
    assert main(["knn-eval", str(many), *KNN, f"out={tmp_path / 'r.jsonl'}"]) == 0
    output = capsys.readouterr().out
    assert output.count("left out: ") == len(DAMAGES)
    assert {r["run"] for r in results(tmp_path / "r.jsonl")} == {str(many / "[x]*")}


# --- By itself ---


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_refused_in_a_line_whose_advice_works(name, run, capsys):
    path, words = damage(run, name)
    with pytest.raises(InputError) as caught:
        resolve_runs(str(run))
    advice = shlex.join(["sslctl", "runs", str(run), "repair=true"])
    assert len(caught.value.messages) == 1
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)
    lost = "missing" in words
    assert ("the command that started the run writes it again" in str(caught.value)) == lost
    restored = path.name in ("config.yaml", "environment.json")
    does = f"{advice} {'restores it from' if restored else 'sets aside what cannot be read'}"
    assert does in str(caught.value)
    before = contents(run)
    (sentence,) = repair(run)
    kept = {file: content for file, (_, content) in contents(run).items()}
    assert all(content in kept.values() for _, content in before.values()), "something is lost"
    assert repair(run) == []
    if path.name != "preprocess.json":
        assert f"{path.name}.aside" in sentence or lost
        assert damages(run) == []
        assert resolve_runs(str(run))[0][0] == run


def test_the_commands_refuse_with_status_2_and_the_repair_is_told_file_by_file(run, capsys):
    for name in ("metrics a text", "results NaN"):
        damage(run, name)
    kept = [json.loads(text) for text in (run / "results.jsonl").read_text().splitlines()[1:]]
    for verb in ("knn-eval", "evaluate", "export"):
        assert main([verb, str(run)]) == 2
        output = capsys.readouterr().err
        assert output.startswith(
            f"sslctl: {run / 'metrics.jsonl'} line 4: loss: expected a finite number, found '0.5'; "
        )
        assert len(output.splitlines()) == 1
    assert main(shlex.split(output.split("; sslctl ")[1].split(" sets aside")[0])) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert f"{run / 'metrics.jsonl'}: 1 line cannot be read (line 4: " in first
    assert first.endswith("the whole file is set aside as metrics.jsonl.aside")
    assert f"{run / 'results.jsonl'}: 1 line cannot be read (line 1: " in second
    assert main(["runs", str(run), "repair=true"]) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert [json.loads(text) for text in (run / "results.jsonl").read_text().splitlines()] == kept
    damage(run, "metrics a list")
    repair(run)
    assert (run / "metrics.jsonl.aside-2").exists()


def test_a_run_in_use_is_not_repaired(run, capsys):
    damage(run, "metrics a text")
    lock = claim.Lock(run)
    before = contents(run)
    assert main(["runs", str(run), "repair=true"]) == 2
    assert f"{run} is in use by pid {os.getpid()}" in capsys.readouterr().err
    assert contents(run) == before
    lock.release()


def test_what_is_no_run_of_sslctl_is_not_repaired(tmp_path, capsys):
    for name in ("config.yaml", "environment.json"):
        (tmp_path / name).write_text("theirs")
    before = contents(tmp_path)
    assert main(["runs", str(tmp_path), "repair=true"]) == 2
    assert contents(tmp_path) == before


def test_a_damaged_checkpoint_is_set_aside_by_a_repair(run):
    half(run / "checkpoints" / "step-10" / "state.pt")
    (sentence,) = repair(run)
    assert sentence.endswith("set aside as step-10.aside")
    assert repair(run) == []


# --- Pretraining goes on ---


@pytest.mark.parametrize(
    "names",
    [
        ("metrics no utf-8", "results a directory", "preprocess flipped"),
        *map(slow, [("metrics a list",), ("metrics flipped", "results NaN"), ("metrics zeroed", "stopped of others")]),
    ],
)
def test_pretraining_keeps_what_can_be_read_says_so_and_ends_the_same(names, stopped, whole, capsys):
    (stopped / "results.jsonl").write_bytes((whole / "results.jsonl").read_bytes() if "results NaN" in names else b"")
    message = [damage(stopped, name) for name in names]
    before = (stopped / "metrics.jsonl").read_bytes()
    assert pretrain(stopped, *CLOSING) == 0
    output = capsys.readouterr()
    assert "resuming at step 6 " in output.out
    for path, words in message:
        (sentence,) = [text for text in output.err.splitlines() if str(path) in text]
        assert words.removeprefix(":").strip() in sentence
        assert f"set aside as {path.name}.aside" in sentence
    assert (stopped / "metrics.jsonl.aside").read_bytes() == before
    assert differences(tensors(stopped), tensors(whole)) == []
    logged, straight = metrics(stopped), metrics(whole)
    assert [m for m in logged if m not in straight] == []
    assert len(logged) == len(straight) - 1
    if "results a directory" in names:
        assert [r["value"] for r in results(stopped / "results.jsonl")] == [
            r["value"] for r in results(whole / "results.jsonl")
        ]
    assert damages(stopped) == []


def test_a_directory_in_the_place_of_the_lock_is_refused_before_the_first_step(stopped, capsys):
    directory(stopped / "lock")
    assert pretrain(stopped, *CLOSING) == 2
    assert f"{stopped / 'lock'} cannot be opened: Is a directory; move it away" in capsys.readouterr().err
    assert main(["runs", str(stopped)]) == 0


# --- Any damage of any file ---


@pytest.mark.parametrize(
    "name", ["config.yaml", "environment.json", "preprocess.json", "metrics.jsonl", "results.jsonl"]
)
def test_a_damaged_file_is_read_as_it_was_or_named(name, run):
    read = {
        "config.yaml": read_config,
        "environment.json": read_environment,
        "preprocess.json": read_preprocess,
        "metrics.jsonl": read_metrics,
        "results.jsonl": lambda run: read_results(run / "results.jsonl"),
    }[name]
    path, was, outcomes = run / name, read(run), Counter()
    whole = path.read_bytes()
    for number in range(60):
        draw = random.Random(f"{name}/{number}")
        change = draw.choice(fuzz_files.CHANGES)
        path.write_bytes(change(whole, draw))
        try:
            actual = read(run)
        except Damaged as damage:
            outcomes["named"] += len(damage.messages) == len(str(damage).splitlines()) == 1
            continue
        outcomes["read"] += 1
        lost = path.read_bytes() in (whole[: path.stat().st_size], b"", b"\n")  # of a log: its end, as by a kill
        assert actual == was or (name.endswith("l") and lost and actual == was[: len(actual)]), (
            number,
            change.__name__,
        )
    assert outcomes["named"] >= 20
    assert outcomes["named"] + outcomes["read"] == 60


@pytest.mark.parametrize(
    "name", ["config.yaml", "environment.json", "preprocess.json", "metrics.jsonl", "results.jsonl", "stopped.json"]
)
def test_a_pipe_in_the_place_of_a_file_is_named_and_not_waited_for(name, run):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    (damaged,) = damages(run)
    assert damaged.describe() == f"{run / name}: a pipe, a socket or a device is in its place"
    assert repair(run)
    assert stat.S_ISFIFO((run / f"{name}.aside").stat().st_mode)


def test_pipes_in_a_checkpoint_and_beside_are_no_files(run):
    (newest,) = checkpoint.steps_on_disk(run)[:1]
    for path in (newest / "manifest.json", run / "lock", run / "backbone.safetensors"):
        path.unlink()
        os.mkfifo(path)
    assert checkpoint.newest_valid(run) != newest
    assert not claim.is_held(run)
    with pytest.raises(InputError, match=r"backbone\.safetensors .*a pipe, a socket or a device is in its place"):
        sslctl.load(run)
    assert any("backbone.safetensors.aside" in sentence for sentence in repair(run))


# --- Without the right to write ---


def without_privileges(words, folder):
    """Runs sslctl in a forked process that may write only where the modes of files let it, root or not; returns (status, what
    it printed)."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            if os.getuid() == 0:
                header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # of version 3, this process
                assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0
            printed = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            os.chdir(folder / "here")
            status = main(words)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, (folder / "printed").read_text()


@pytest.fixture
def read_only(run, tmp_path):
    """A run that nobody may write to."""
    (tmp_path / "here").mkdir()
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (run, *run.rglob("*")) if not path.is_symlink()}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    yield run
    for path, mode in modes.items():
        path.chmod(mode)


def test_results_of_a_read_only_run_go_to_the_current_directory_which_is_said_first(read_only, tmp_path):
    before = contents(read_only)
    status, output = without_privileges(["knn-eval", str(read_only), *KNN], tmp_path)
    assert status == 0, output
    first = output.index(
        f"{read_only / 'results.jsonl'} is not writable: results go to results-run.jsonl; out=FILE names"
    )
    assert first < output.index("top1")
    assert [r["metric"] for r in results(tmp_path / "here" / "results-run.jsonl")] == ["top1", "top5"]
    assert contents(read_only) == before
    (tmp_path / "here" / "results-run.jsonl").unlink()
    (tmp_path / "here").chmod(0o555)
    status, output = without_privileges(["knn-eval", str(read_only), *KNN], tmp_path)
    (tmp_path / "here").chmod(0o755)
    assert status == 0, output
    assert "results are printed only; out=FILE keeps them" in output
    assert "top1" in output


@pytest.mark.parametrize("words", [("pretrain",), ("runs", "repair=true")])
def test_what_must_write_to_a_read_only_run_is_refused_by_name(words, read_only, tmp_path):
    words = [*words, *CLOSING, f"run_dir={read_only}"] if words == ("pretrain",) else [*words, str(read_only)]
    status, output = without_privileges(words, tmp_path)
    assert status == 2
    assert str(read_only) in output
    assert len(output.splitlines()) == 1


def test_files_that_cannot_be_read_are_named_and_hide_no_other_run(run, tmp_path):
    (tmp_path / "here").mkdir()
    shutil.copytree(run, tmp_path / "other", symlinks=True)
    (run / "metrics.jsonl").chmod(0)
    status, output = without_privileges(["runs", str(tmp_path)], tmp_path)
    assert status == 0, output
    assert f"{run / 'metrics.jsonl'}: cannot be read: Permission denied; ask its owner, or work with a copy" in output
    assert "finished" in output
    status, output = without_privileges(["knn-eval", str(run)], tmp_path)
    assert status == 2
    assert len(output.splitlines()) == 1
    status, output = without_privileges(["knn-eval", str(tmp_path / "other"), *KNN, "out=/proc/r.jsonl"], tmp_path)
    assert status == 2
    assert "/proc" in output
    assert "is not writable" in output


# --- Results and checksums ---


def test_a_value_that_is_no_number_is_no_result(whole):
    subject = who.pixels(run_preprocess(whole))
    with pytest.raises(
        InputError, match=r"mine top1 of pixels weights is not recorded: .*expected a finite number, found nan"
    ):
        make_result(
            subject, digits("test", 8), protocol="mine", metric="top1", values=[float("nan")], labels="all", params={}
        )


def test_a_whole_last_line_without_its_end_is_kept(run):
    path = run / "results.jsonl"
    before = results(path)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert main(["knn-eval", str(run), *KNN]) == 0
    assert results(path)[: len(before)] == before
    assert len(results(path)) == len(before) + 2


@pytest.mark.parametrize("value", [{"a": 1}, {"a": {"crc32": "0"}, "b": [1.5, "}"]}])
def test_a_checksum_comes_off_again_and_sees_every_changed_byte(value, tmp_path):
    for text in (json.dumps(value), json.dumps(value, indent=1)):
        signed = sign_json(text)
        assert json.loads(signed).keys() == {*value, "crc32"}
        assert check_json(signed) == text
        for place in range(len(signed)):
            path = tmp_path / "f"
            path.write_text(signed[:place] + chr(ord(signed[place]) ^ 1) + signed[place + 1 :] + "\n")
            try:
                (read,) = read_lines(path) if "\n" not in text else [json.loads(check_json(path.read_text()))]
            except (InputError, ValueError):
                continue
            assert read == value or not read.keys() <= value.keys()  # a schema knows no such key


@pytest.mark.parametrize(
    ("old", "new"), [("# crc32", "  crc32"), ("# crc32", "# crc33"), ("# crc32", "\x00 crc\x0012")]
)
def test_a_damaged_checksum_is_none_that_somebody_took_out(old, new):
    """Of the line's three parts one is left: its first sign, its key, its end."""
    with pytest.raises(ValueError, match="checksum"):
        check_yaml(sign_yaml("a: 1\n").replace(old, new))


def test_yaml_without_its_checksum_is_taken_as_it_is(whole, tmp_path):
    check_yaml("a: 1\n")
    check_yaml(sign_yaml("a: 1\n"))
    for text in ("a: 2\n", "a: 1", "a: 1\n "):
        with pytest.raises(ValueError, match="checksum"):
            check_yaml(sign_yaml("a: 1\n").replace("a: 1\n", text))
    shutil.copy(whole / "config.yaml", tmp_path)
    lines = (tmp_path / "config.yaml").read_text().splitlines(keepends=True)
    (tmp_path / "config.yaml").write_text("".join(lines[1:]).replace("seed: 0", "seed: 7"))
    assert read_config(tmp_path)["seed"] == 7
