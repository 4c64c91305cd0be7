"""Faults that a run finds: damaged, incomplete, foreign and malicious files, and directories of another run."""

import argparse
import fractions
import json
import os
import pickle
import shutil
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sslctl.cli import main
from sslctl.errors import InputError
from sslctl.factory.from_run import resolve_runs
from sslctl.models.weights import read_weights
from sslctl.runs import checkpoint, claim
from sslctl.runs.reading import read_lines
from tests.runs import (
    MOCO,
    PROBE,
    SIMCLR,
    STEPS,
    contents,
    differences,
    edit,
    finish,
    forget_run,
    image_folder,
    metrics,
    newest,
    pretrain,
    results,
    sign,
    slow,
    tensors,
    without_checksum,
)

WORDS = (*MOCO, "trainer.save_every_steps=2", "trainer.keep_last=3")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("straight") / "run", *WORDS)


@pytest.fixture(scope="module")
def _stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    assert pretrain(folder / "run", *WORDS, stop_after=6) == 143
    assert [p.name for p in checkpoint.steps_on_disk(folder / "run")] == ["step-6", "step-4", "step-2"]
    return folder


@pytest.fixture
def stopped(_stopped, tmp_path, capsys):
    """A run with checkpoints of steps 2, 4 and 6 of 10; a copy, to be damaged."""
    shutil.copytree(_stopped, tmp_path / "copy", symlinks=True)
    capsys.readouterr()
    return tmp_path / "copy" / "run"


@pytest.fixture(scope="module")
def _finished(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("finished") / "run", *CLOSING)


@pytest.fixture
def finished(_finished, tmp_path, capsys):
    """A run with its closing results; a copy."""
    shutil.copytree(_finished, tmp_path / "run", symlinks=True)
    capsys.readouterr()
    return tmp_path / "run"


CLOSING = (*SIMCLR, "evaluation.closing=true", "evaluation.knn_every_epochs=1", *PROBE)


def equals(run_dir, straight):
    assert differences(tensors(run_dir), tensors(straight)) == []
    assert metrics(run_dir) == metrics(straight)


# --- Damaged checkpoints ---


def zero(path):
    path.write_bytes(b"")


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One bit of the last tensor or number: the layout of the file stays right."""
    content = bytearray(path.read_bytes())
    content[-1 if path.suffix == ".safetensors" else len(content) // 2] ^= 1
    path.write_bytes(content)


def gone(path):
    path.unlink()


DAMAGES = [
    *((zero, "weights.safetensors"), (half, "state.pt"), (flip, "weights.safetensors"), (gone, "manifest.json")),
    *(slow(zero, "state.pt"), slow(zero, "manifest.json"), slow(half, "weights.safetensors")),
    *(slow(half, "manifest.json"), slow(flip, "state.pt"), slow(gone, "weights.safetensors"), slow(gone, "state.pt")),
]


@pytest.mark.parametrize(("damage", "name"), DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(damage, name, stopped, straight, capsys):
    damage(stopped / "checkpoints" / "step-6" / name)
    finish(stopped, *WORDS)
    printed = capsys.readouterr()
    (warning,) = [line for line in printed.err.splitlines() if "warning" in line]
    assert f"step-6/{name}" in warning
    assert " bytes)" in warning
    assert "resuming at step 4 " in printed.out
    equals(stopped, straight)


def test_two_damaged_checkpoints_fall_back_to_the_third(stopped, straight, capsys):
    for step in (4, 6):
        half(stopped / "checkpoints" / f"step-{step}" / "state.pt")
    finish(stopped, *WORDS)
    printed = capsys.readouterr()
    assert printed.err.count("warning") == 2
    assert "resuming at step 2 " in printed.out
    equals(stopped, straight)


def test_flipping_a_bit_is_seen_by_nothing_but_the_manifest(stopped):
    path = stopped / "checkpoints" / "step-6" / "weights.safetensors"
    before = {name: tensor.clone() for name, tensor in checkpoint.load_tensors(path).items()}
    flip(path)
    after = checkpoint.load_tensors(path)
    assert sum(not torch.equal(before[name], after[name]) for name in before) == 1


@pytest.mark.parametrize("verb", ["knn-eval", "linear-eval"])
@pytest.mark.parametrize(("damage", "name"), [(zero, "weights.safetensors"), (flip, "weights.safetensors")])
def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(damage, name, verb, stopped, capsys):
    path = stopped / "checkpoints" / "step-6"
    damage(path / name)
    assert main([verb, str(path), "device=cpu", "cache=false"]) == 2
    printed = capsys.readouterr().err
    assert str(path / name) in printed
    assert f"({(path / name).stat().st_size} bytes)" in printed
    assert len(printed.splitlines()) <= 2
    assert not (stopped / "results.jsonl").exists()


@pytest.mark.parametrize("verb", ["knn-eval", slow("linear-eval"), slow("pictures"), slow("export")])
def test_a_run_whose_weights_are_not_finite_is_not_measured(verb, stopped, capsys):
    edit(newest(stopped), weights=lambda stored: stored["backbone.network.conv1.weight"][0].fill_(torch.nan))
    before = contents(stopped)
    assert main([verb, str(stopped), *(["device=cpu", "cache=false"] if verb.endswith("eval") else [])]) == 2
    assert "step-6/weights.safetensors: 1 tensors hold values that are not finite numbers" in capsys.readouterr().err
    assert contents(stopped) == before


def test_results_are_not_appended_to_another_file(stopped, tmp_path, capsys):
    words = ["knn-eval", str(stopped), "device=cpu", "cache=false", "subjects=[trained]"]
    for text in ("all of my thesis", "first\nlast", '{"a": 1}\n', "[1]\n"):
        (tmp_path / "mine").write_text(text)
        assert main([*words, f"out={tmp_path / 'mine'}"]) == 2
        assert str(tmp_path / "mine") in capsys.readouterr().err
        assert (tmp_path / "mine").read_text() == text
    (tmp_path / "cut").write_text('{"format": 1, "proto')
    assert main([*words, f"out={tmp_path / 'cut'}"]) == 0
    assert {r["protocol"] for r in results(tmp_path / "cut")} == {"knn"}


@pytest.mark.parametrize("damage", [zero, half])
@pytest.mark.parametrize("suffix", ["safetensors", "pt", slow("pth"), slow("ckpt")])
def test_damaged_weights_to_start_from_are_an_error(damage, suffix, tmp_path, capsys):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        checkpoint.save_tensors(path, {"conv1.weight": torch.zeros(64, 64)})
    else:
        torch.save({"conv1.weight": torch.zeros(64, 64)}, path)
    damage(path)
    assert pretrain(tmp_path / "run", *SIMCLR, f"backbone.weights={path}") == 2
    printed = capsys.readouterr().err
    assert f"{path} ({path.stat().st_size} bytes)" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


# --- No valid checkpoint ---


def damage_all(run_dir):
    for path in checkpoint.steps_on_disk(run_dir):
        half(path / "weights.safetensors")


def remove_all(run_dir):
    shutil.rmtree(run_dir / "checkpoints")


def remove_each(run_dir):
    for path in checkpoint.steps_on_disk(run_dir):
        shutil.rmtree(path)


@pytest.mark.parametrize("how", [damage_all, remove_all, remove_each])
def test_without_a_valid_checkpoint_a_resume_that_must_be_one_is_refused(how, stopped, capsys):
    how(stopped)
    before = contents(stopped, without=("lock",))
    assert pretrain(stopped, *WORDS, "trainer.resume=must") == 2
    printed = capsys.readouterr()
    assert "resume=must" in printed.err
    assert str(stopped) in printed.err
    assert contents(stopped, without=("lock",)) == before


def test_a_resume_that_must_be_one_needs_a_run(tmp_path, capsys):
    assert pretrain(tmp_path / "run", *WORDS, "trainer.resume=must") == 2
    assert "resume=must" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_resume_that_must_be_one_is_one(stopped, straight):
    finish(stopped, *WORDS, "trainer.resume=must")
    equals(stopped, straight)


@pytest.mark.parametrize("how", [damage_all, remove_all, remove_each])
def test_without_a_valid_checkpoint_the_run_starts_afresh_and_says_so(how, stopped, straight, capsys):
    how(stopped)
    finish(stopped, *WORDS)
    assert [line for line in capsys.readouterr().out.splitlines() if "step 0" in line]
    equals(stopped, straight)


def test_a_fresh_start_beside_damaged_checkpoints_keeps_what_it_saves(stopped, straight, capsys):
    damage_all(stopped)
    assert pretrain(stopped, *WORDS, "trainer.keep_last=2", stop_after=1) == 143
    assert checkpoint.newest_valid(stopped).name == "step-1"
    capsys.readouterr()
    finish(stopped, *WORDS, "trainer.keep_last=2")
    assert "resuming at step 1 " in capsys.readouterr().out
    equals(stopped, straight)


# --- Pointers and strays ---


def dangling(link):
    link.unlink()
    link.symlink_to("checkpoints/step-99")


def old(link):
    link.unlink()
    link.symlink_to("checkpoints/step-2")


@pytest.mark.parametrize("damage", [gone, dangling, old])
def test_a_wrong_pointer_to_the_last_checkpoint_does_not_matter(damage, stopped, straight, capsys):
    damage(stopped / "last")
    finish(stopped, *WORDS)
    assert "resuming at step 6 " in capsys.readouterr().out
    equals(stopped, straight)
    assert (stopped / "last").read_text() == f"checkpoints/step-{STEPS}\n"


def test_a_run_that_was_copied_with_links_followed_goes_on(stopped, straight, tmp_path, capsys):
    (stopped / "last").unlink()
    (stopped / "last").symlink_to("checkpoints/step-6")  # as 0.1.0 made it
    run = tmp_path / "copied"
    shutil.copytree(stopped, run)
    assert (run / "last" / "state.pt").exists()
    for last in (stopped / "last", run / "last"):
        assert resolve_runs(str(last)) == [(last.parent, last.parent / "checkpoints" / "step-6")]
    finish(run, *WORDS)
    assert "aside" not in capsys.readouterr().err
    equals(run, straight)
    assert (run / "last").read_text() == f"checkpoints/step-{STEPS}\n"
    assert resolve_runs(str(run / "last")) == [(run, newest(run))]


@pytest.mark.parametrize("name", [".step-8.writing", "step-8.bak", slow("step-x"), slow("notes"), slow("step-")])
def test_what_is_no_checkpoint_is_not_taken_for_one(name, stopped, straight, capsys):
    shutil.copytree(stopped / "checkpoints" / "step-4", stopped / "checkpoints" / name)
    finish(stopped, *WORDS)
    printed = capsys.readouterr()
    assert "resuming at step 6 " in printed.out
    assert "warning" not in printed.err
    equals(stopped, straight)


def test_a_file_in_the_place_of_a_checkpoint_is_passed_over(stopped, straight, capsys):
    (stopped / "checkpoints" / "step-7").write_text("")
    finish(stopped, *WORDS)
    assert "step-7" in capsys.readouterr().err
    equals(stopped, straight)


@pytest.mark.parametrize("text", ['{"step": 7, "lo', "{", '{"step": 99}\n{"step'])
def test_a_log_line_cut_off_by_a_kill_is_dropped(text, stopped, straight):
    with (stopped / "metrics.jsonl").open("a") as opened:
        opened.write(text)
    finish(stopped, *WORDS)
    equals(stopped, straight)


def test_a_lost_log_does_not_stop_the_run(stopped, straight):
    (stopped / "metrics.jsonl").unlink()
    finish(stopped, *WORDS)
    assert differences(tensors(stopped), tensors(straight)) == []
    assert [m["step"] for m in metrics(stopped)] == [7, 8, 9, 10]


# --- Incomplete checkpoints ---


@pytest.mark.parametrize(
    "parts",
    [
        *(("optimizer",), ("generators",), ("optimizer", "generators"), ("generators.0.torch",)),
        *(slow(("step",)), slow(("threads",)), slow(("scaler",))),
    ],
    ids=" and ".join,
)
def test_a_checkpoint_without_a_part_is_an_error_that_lists_it(parts, stopped, capsys):
    def remove(state):
        for part in parts:
            *outer, last = part.split(".")
            inner = state
            for name in outer:
                inner = inner[int(name) if name.isdigit() else name]
            del inner[last]

    edit(newest(stopped), state=remove)
    before = contents(stopped, without=("lock",))
    assert pretrain(stopped, *WORDS) == 2
    printed = capsys.readouterr().err
    assert str(newest(stopped) / "state.pt") in printed
    assert all(part.split(".")[-1] in printed for part in parts)
    assert "backbone.weights=" in printed
    assert contents(stopped, without=("lock",)) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stored: stored.pop("queue"), "missing: queue"),
        (lambda stored: stored.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda stored: stored.update(queue=torch.zeros(5, 16)), "queue: (5, 16) found, (600, 16) expected"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_a_checkpoint_with_other_tensors_is_an_error_that_lists_them(change, words, stopped, capsys):
    edit(newest(stopped), weights=change)
    before = contents(stopped, without=("lock",))
    assert pretrain(stopped, *WORDS) == 2
    assert words in capsys.readouterr().err
    assert contents(stopped, without=("lock",)) == before


# --- Another configuration in the same directory ---


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("method.temperature=0.3", "method.temperature: 0.2 → 0.3"),
        ("backbone.widths=[4,16]", "backbone.widths: [4, 8] → [4, 16]"),
        ("dataset.image_size=12", "dataset.image_size: 8 → 12"),
        slow("trainer.batch_size=128", "trainer.batch_size: 256 → 128"),
        slow("trainer.epochs=3", "trainer.epochs: 2 → 3"),
        slow("trainer.precision=bf16", "trainer.precision: fp32 → bf16"),
        slow("optimizer.base_lr=0.1", "optimizer.base_lr: 0.03 → 0.1"),
        slow("optimizer=adamw", "optimizer._target_: torch.optim.SGD → torch.optim.AdamW"),
        ("method=simclr", "method._target_: sslctl.methods.moco.MoCo → sslctl.methods.simclr.SimCLR"),
        ("seed=1", "seed: 0 → 1"),
    ],
)
def test_another_configuration_is_refused_with_what_differs(override, line, stopped, capsys):
    words = (*SIMCLR, *WORDS[len(MOCO) :]) if override == "method=simclr" else (*WORDS, override)
    before = contents(stopped, without=("lock",))
    assert pretrain(stopped, *words) == 2
    printed = capsys.readouterr()
    assert line in printed.err
    assert "resuming" not in printed.out
    assert contents(stopped, without=("lock",)) == before


def test_another_dataset_is_refused(stopped, capsys, tmp_path):
    for split in ("train", "test"):
        image_folder(tmp_path / "images" / split, images=4)
    words = ("dataset=imagefolder", f"dataset.root={tmp_path / 'images'}", "trainer.batch_size=4")
    assert pretrain(stopped, *WORDS, *words) == 2
    printed = capsys.readouterr().err
    assert "dataset._target_: sslctl.data.sources.digits → sslctl.data.sources.imagefolder" in printed
    assert "content of data" in printed


@pytest.mark.parametrize(
    "override",
    [
        *("trainer.save_every_steps=5", "trainer.keep_last=2"),
        *map(slow, ("trainer.workers=0", "trainer.tensorboard=true", "evaluation.cache_gb=1")),
    ],
)
def test_a_setting_that_changes_no_weight_may_be_another(override, stopped, straight):
    finish(stopped, *WORDS, override)
    equals(stopped, straight)


def test_a_directory_in_use_is_refused_with_its_holder(stopped, straight, capsys):
    lock = claim.Lock(stopped)
    before = contents(stopped)
    assert pretrain(stopped, *WORDS) == 2
    assert f"pid {os.getpid()} on " in capsys.readouterr().err
    assert contents(stopped) == before
    lock.release()
    finish(stopped, *WORDS)
    equals(stopped, straight)


# --- Beyond the end, and finished ---


def test_a_checkpoint_beyond_the_end_is_an_error(stopped, capsys):
    edit(newest(stopped), state=lambda state: state.update(step=99))
    assert pretrain(stopped, *WORDS) == 2
    printed = capsys.readouterr().err
    assert "step 99" in printed
    assert "10 steps" in printed


def test_a_finished_run_with_its_results_is_left_as_it_is(finished, capsys):
    before = contents(finished, without=("lock",))
    assert len(results(finished / "results.jsonl")) > 0
    assert pretrain(finished, *CLOSING) == 0
    assert "already finished" in capsys.readouterr().out
    assert contents(finished, without=("lock",)) == before


@pytest.mark.parametrize("lost", ["results.jsonl", "backbone.safetensors", slow("both")])
def test_only_what_is_missing_from_a_finished_run_is_made_again(lost, finished, capsys):
    kept = contents(finished / "checkpoints")
    logged, measured = metrics(finished), _values(finished)
    weights = {n: t.clone() for n, t in checkpoint.load_tensors(finished / "backbone.safetensors").items()}
    for name in ("results.jsonl", "backbone.safetensors"):
        if lost in (name, "both"):
            (finished / name).unlink()
    assert pretrain(finished, *CLOSING) == 0
    printed = capsys.readouterr().out
    assert ("evaluating" in printed) == (lost != "backbone.safetensors")
    assert contents(finished / "checkpoints") == kept
    assert metrics(finished) == logged
    assert _values(finished) == measured
    assert differences(checkpoint.load_tensors(finished / "backbone.safetensors"), weights) == []


def test_results_of_another_step_are_not_those_of_the_end(finished, capsys):
    path = finished / "results.jsonl"
    path.write_text("".join(json.dumps({**record, "step": 3}) + "\n" for record in results(path)))
    assert pretrain(finished, *CLOSING) == 0
    assert "evaluating" in capsys.readouterr().out
    assert {record["step"] for record in results(path) if record["subject"] == "trained"} == {3, STEPS}


def test_a_run_that_ended_without_evaluation_can_be_evaluated(tmp_path, capsys):
    run = finish(tmp_path / "run", *CLOSING, "evaluation.closing=false")
    kept = contents(run / "checkpoints")
    assert not (run / "results.jsonl").exists()
    assert pretrain(run, *CLOSING) == 0
    assert {r["protocol"] for r in results(run / "results.jsonl")} == {"knn", "linear-cached"}
    assert contents(run / "checkpoints") == kept


@pytest.mark.parametrize("keep", [0.5, 0.97], ids=["records are missing", "the last record is cut"])
def test_results_cut_off_by_a_kill_are_measured_again(keep, finished):
    measured = _values(finished)
    path = finished / "results.jsonl"
    path.write_text(path.read_text()[: int(keep * path.stat().st_size)])
    (finished / "backbone.safetensors").unlink()
    assert pretrain(finished, *CLOSING) == 0
    assert set(measured) <= set(_values(finished)), "a result is lost"
    read_lines(path)


def test_results_can_be_appended_behind_a_cut_off_line(finished):
    path = finished / "results.jsonl"
    path.write_text(path.read_text()[:-20])
    assert main(["knn-eval", str(finished), "device=cpu", "cache=false", "subjects=[trained]", "knn.k=3"]) == 0
    actual = [r for r in read_lines(path) if r["params"].get("k") == 3]
    assert [r["metric"] for r in actual] == ["top1", "top5"]


def _values(run_dir):
    return [
        (r["subject"], r["protocol"], r["metric"], r["value"], r["step"]) for r in read_lines(run_dir / "results.jsonl")
    ]


# --- Files that would run code ---


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def as_torch(path, content):
    torch.save(content, path)


def as_legacy(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(path, content):
    path.write_bytes(pickle.dumps(content))


def as_tar(path, content):
    inner = path.with_name("pickle")
    inner.write_bytes(pickle.dumps(content))
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.add(inner, name)
    inner.unlink()


@pytest.mark.parametrize("write", [as_torch, as_legacy, as_pickle, as_tar])
@pytest.mark.parametrize("name", ["weights.pt", "weights.ckpt", "weights.pth.tar", "weights.safetensors"])
def test_reading_a_malicious_file_of_weights_runs_nothing(name, write, tmp_path):
    write(tmp_path / name, {"conv1.weight": torch.zeros(1), "extra": Canary(tmp_path / "canary")})
    with pytest.raises(InputError, match=name):
        read_weights(tmp_path / name)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("write", [as_torch, as_legacy])
def test_settings_beside_weights_are_read_without_their_classes(write, tmp_path, monkeypatch):
    numbers = {
        "best": np.float64(0.5),
        "seen": np.int64(3),
        "curve": np.arange(3.0),
        "counts": defaultdict(list, a=[1]),
    }
    settings = OmegaConf.create({"optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}, "name": "${optimizer.lr}"})
    content = {
        "model": {"conv1.weight": torch.ones(2)},
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
        **numbers,
    }
    content |= {"hyper_parameters": settings, "node": settings._get_node("name"), "place": Path("a")}
    write(tmp_path / "f.pth", content)
    assert list(read_weights(tmp_path / "f.pth")) == ["model.conv1.weight"]

    # Even a class that stands under an allowed name is not the one that is used.
    used = []
    other = type("Namespace", (), {"__module__": "argparse", "__setstate__": lambda self, state: used.append(state)})
    monkeypatch.setattr(argparse, "Namespace", other)
    there = other()
    there.lr = 0.1
    write(tmp_path / "g.pth", {"conv1.weight": torch.ones(2), "args": there})
    assert list(read_weights(tmp_path / "g.pth")) == ["conv1.weight"]
    assert not used
    torch.load(tmp_path / "g.pth", weights_only=False)
    assert used  # the control


def test_a_class_that_is_not_on_the_list_is_named(tmp_path):
    as_torch(tmp_path / "f.pth", {"conv1.weight": torch.ones(2), "extra": fractions.Fraction(1, 2)})
    with pytest.raises(InputError, match=r"it holds fractions\.Fraction; .*save its tensors alone"):
        read_weights(tmp_path / "f.pth")


@pytest.mark.parametrize(("name", "write"), [("weights.pt", as_torch), ("weights.ckpt", as_tar)])
def test_a_run_from_a_malicious_file_of_weights_is_refused(name, write, tmp_path, capsys):
    canary = tmp_path / "canary"
    write(tmp_path / name, {"conv1.weight": torch.zeros(1), "extra": Canary(canary)})
    assert pretrain(tmp_path / "run", *SIMCLR, f"backbone.weights={tmp_path / name}") == 2
    printed = capsys.readouterr().err
    assert name in printed
    assert "Traceback" not in printed
    assert not canary.exists()
    assert not (tmp_path / "run").exists()


def test_the_canary_would_sing(tmp_path):
    as_torch(tmp_path / "f", Canary(tmp_path / "canary"))
    torch.load(tmp_path / "f", weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("write", [as_torch, as_legacy, slow(as_pickle), slow(as_tar)])
def test_a_malicious_checkpoint_runs_nothing(write, stopped, tmp_path, capsys):
    path = newest(stopped) / "state.pt"
    write(path, {"step": 6, "optimizer": Canary(tmp_path / "canary"), "generators": [], "threads": 1})
    sign(newest(stopped))
    assert pretrain(stopped, *WORDS) == 2
    assert str(path) in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("text", ["seed: !!python/object/apply:pathlib.Path.touch [{}]", "!!python/name:os.system"])
def test_a_malicious_configuration_runs_nothing(text, stopped, tmp_path, capsys):
    forget_run(stopped)  # else config.yaml would be restored from a checkpoint
    (stopped / "config.yaml").write_text(text.format(tmp_path / "canary"))
    assert pretrain(stopped, *WORDS) == 2
    assert str(stopped / "config.yaml") in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()


def test_a_run_cannot_name_code_of_its_own(stopped, capsys):
    forget_run(stopped)
    path = stopped / "config.yaml"
    path.write_text(without_checksum(path).replace("sslctl.methods.moco.MoCo", "antigravity.fly"))
    assert main(["knn-eval", str(stopped), "device=cpu", "cache=false"]) == 2
    assert "antigravity.fly is not sslctl's own" in capsys.readouterr().err


# --- Reading in Python ---


def test_the_same_command_writes_a_damaged_backbone_again(finished, capsys):
    import sslctl

    path = finished / "backbone.safetensors"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-2] ^= 1  # in a tensor: safetensors sees nothing
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"backbone\.safetensors .* is not as it was written: its checksum differs"):
        sslctl.load(finished)
    assert pretrain(finished, *CLOSING) == 0
    printed = capsys.readouterr()
    assert f"{path} ({len(whole)} bytes) is not as it was written" in printed.err
    assert "set aside as backbone.safetensors.aside" in printed.err
    assert "evaluating" not in printed.out
    assert path.read_bytes() == whole
    assert (finished / "backbone.safetensors.aside").read_bytes() == damaged


def test_a_damaged_backbone_is_not_loaded(finished):
    import sslctl

    size = (finished / "backbone.safetensors").stat().st_size
    half(finished / "backbone.safetensors")
    with pytest.raises(InputError, match=rf"backbone\.safetensors \({size // 2} bytes\)"):
        sslctl.load(finished)
