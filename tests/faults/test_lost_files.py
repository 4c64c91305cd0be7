"""Runs whose config.yaml or environment.json are lost or damaged: restored from the checkpoints, or refused."""

import json
import shutil

import pytest
import yaml

from sslctl.cli import main
from sslctl.errors import InputError
from sslctl.runs import checkpoint, claim, manifest
from tests import runs
from tests.runs import MOCO, contents, differences, finish, metrics, newest, pretrain, tensors
from tests.test_checkpoint import linear, state_at

CONFIG = runs.CONFIG | {"seed": 0, "method": runs.CONFIG["method"] | {"size": 3}}
FILES = ("config.yaml", "environment.json")


def start(run_dir, **changes):
    asked = {"config": CONFIG, "hashes": {"data": "abc"}, "facts": runs.FACTS, "preprocess": runs.PREPROCESS}
    return claim.describe(run_dir, **asked | {"command": "sslctl pretrain method=moco"} | changes)


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of two steps."""
    description = start(tmp_path)
    for step in (2, 4):
        checkpoint.save(tmp_path, step, linear(), state_at(step), keep_last=2, run=description)
    return tmp_path


def lose(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[:9])


def scramble(path):
    path.write_bytes(b"\xff\x00[")


def as_another(path):
    text = path.read_text()
    path.write_text(text.replace("seed: 0", "seed: 1").replace("abc", "xyz"))
    assert path.read_text() != text


@pytest.mark.parametrize("damage", [lose, empty, cut, scramble, as_another])
@pytest.mark.parametrize("names", [FILES[:1], FILES[1:], FILES], ids=" and ".join)
def test_what_is_lost_is_restored_from_the_newest_checkpoint(names, damage, run, capsys):
    before = {name: (run / name).read_bytes() for name in FILES}
    for name in names:
        damage(run / name)
    damaged = {name: (run / name).read_bytes() for name in names if (run / name).exists()}
    description = start(run)
    assert {name: (run / name).read_bytes() for name in FILES} == before
    assert description == manifest.read_manifest(run / "checkpoints" / "step-4")["run"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"sslctl: restored {' and '.join(names)} of {run} from {run}/checkpoints/step-4/manifest.json"
    )
    assert {path.name.removesuffix(".aside"): path.read_bytes() for path in run.glob("*.aside")} == damaged
    start(run)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"config": CONFIG | {"seed": 1}}, "seed: 0 → 1"),
        ({"config": CONFIG | {"method": CONFIG["method"] | {"size": 4}}}, "method.size: 3 → 4"),
        ({"hashes": {"data": "xyz"}}, "content of data: abc → xyz"),
    ],
)
@pytest.mark.parametrize("damage", [lose, empty, as_another])
def test_another_run_is_refused_by_what_the_checkpoints_say(damage, asked, line, run):
    for name in FILES:
        damage(run / name)
    before = contents(run)
    with pytest.raises(InputError) as caught:
        start(run, **asked)
    assert [text.strip() for text in caught.value.messages[1:] if "→" in text] == [line]
    assert contents(run) == before


def test_the_newest_manifest_that_is_as_it_was_written_counts(run, capsys):
    lose(run / "config.yaml")
    cut(run / "checkpoints" / "step-4" / "manifest.json")
    start(run)
    assert "step-2/manifest.json" in capsys.readouterr().err


def test_what_a_user_changed_that_decides_nothing_stays(run, capsys):
    path = run / "config.yaml"
    lines = [line for line in path.read_text().splitlines() if "crc32" not in line]  # as who edits it has to
    path.write_text("\n".join([*lines, "# mine\n"]).replace("root: /a", "root: /moved"))
    before = contents(run)
    start(run)
    assert contents(run) == before
    assert capsys.readouterr().err == ""
    lose(run / "environment.json")
    start(run)
    assert (run / "environment.json").read_bytes() == before["environment.json"][1]
    assert path.read_bytes() == before["config.yaml"][1]


def test_a_lost_preprocessing_is_written_again(run):
    before = (run / "preprocess.json").read_bytes()
    for damage in (lose, empty):
        damage(run / "preprocess.json")
        start(run)
        assert (run / "preprocess.json").read_bytes() == before


def test_a_run_that_has_lost_both_is_listed_and_repaired(run, capsys):
    before = {name: (run / name).read_bytes() for name in FILES}
    for name in FILES:
        lose(run / name)
    assert main(["runs", str(run)]) == 0
    assert f"{run / 'config.yaml'}: missing" in capsys.readouterr().out
    assert main(["runs", str(run), "repair=true"]) == 0
    assert "restored config.yaml and environment.json of" in capsys.readouterr().out
    assert {name: (run / name).read_bytes() for name in FILES} == before


def make_format_1(run):
    for path in checkpoint.steps_on_disk(run):
        old = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({"format": 1, "step": old["step"], "files": old["files"]}))


def lose_checkpoints(run):
    shutil.rmtree(run / "checkpoints")
    (run / "backbone.safetensors").touch()


@pytest.mark.parametrize("holds_nothing", [make_format_1, lose_checkpoints])
@pytest.mark.parametrize("damage", [lose, empty, scramble])
@pytest.mark.parametrize("name", FILES)
def test_what_no_checkpoint_holds_is_refused_with_advice(name, damage, holds_nothing, run):
    damage(run / name)
    holds_nothing(run)
    before = contents(run)
    with pytest.raises(InputError, match=rf"{run / name}.*put it back from a copy.*backbone\.weights="):
        start(run)
    assert contents(run) == before


# --- Whole runs ---


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that is stopped after step 2."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    assert pretrain(run, *MOCO, stop_after=2) == 143
    return run


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("straight") / "run", *MOCO)


def test_the_same_command_continues_a_run_that_has_lost_its_files(stopped, straight, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    lose(run / "config.yaml")
    empty(run / "environment.json")
    before = contents(run, without=("lock",))
    assert main(["knn-eval", str(run), "device=cpu", "cache=false"]) == 2
    printed = capsys.readouterr().err
    assert "config.yaml and environment.json are lost, damaged, or not of its checkpoints: sslctl runs" in printed
    assert f"{run} repair=true restores them from {run}/checkpoints/step-2/manifest.json" in printed
    assert pretrain(run, *MOCO, "seed=1") == 2
    assert "seed: 0 → 1" in capsys.readouterr().err
    assert contents(run, without=("lock",)) == before
    finish(run, *MOCO)
    assert "sslctl: restored config.yaml and environment.json of" in capsys.readouterr().err
    assert yaml.safe_load((run / "config.yaml").read_text()) == config | {"run_dir": str(run)}  # where it is now
    assert differences(tensors(run), tensors(straight)) == []
    assert metrics(run) == metrics(straight)


def test_a_run_of_format_1_is_continued(stopped, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    make_format_1(run)
    (run / "last").unlink()
    (run / "last").symlink_to("checkpoints/step-2")
    finish(run, *MOCO)
    assert differences(tensors(run), tensors(straight)) == []
    assert manifest.read_manifest(newest(run))["run"]["config"]["seed"] == 0
