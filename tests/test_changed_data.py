"""Images that change while a run is on its way: repaired or removed ones, others, more epochs, and each way on that is named."""

import json
import re
import shlex
import shutil

import pytest
import torch
import yaml
from PIL import Image

from sslctl.data import packed, packing
from sslctl.data.folders import FolderKeys
from sslctl.data.frames import frames
from sslctl.data.sources import folder
from sslctl.data.text import text
from sslctl.errors import InputError
from sslctl.runs import claim, continuing
from sslctl.runs import directory as rundir
from sslctl.runs.checkpoint import load_tensors
from sslctl.runs.directory import find_runs
from sslctl.runs.file_list import FILES, Changes, FileList, mark_unreadable
from sslctl.runs.segments import current_hashes, data_changes
from tests.conftest import QUICK, write_images
from tests.runs import CONFIG, FACTS, PREPROCESS, differences, newest, results, signal_at, tensors, unsigned

WORDS = ("pretrain", *QUICK, "dataset=folder", "dataset.root=images", "trainer.batch_size=4", "trainer.epochs=2")
SKIP = ("dataset.on_error=skip", "dataset.max_bad=4")
BAD = "003.png"


@pytest.fixture
def images(workdir):
    """16 images, the fourth of which is cut short; whole/ has it as it was. Of two sizes, so that they are not held in memory."""
    write_images(workdir / "images", count=16)
    write_images(workdir / "other", count=1, size=(20, 18))
    shutil.copy(workdir / "other" / "000.png", workdir / "images" / "000.png")
    shutil.copytree(workdir / "images", workdir / "whole")
    (workdir / "images" / BAD).write_bytes((workdir / "whole" / BAD).read_bytes()[:200])
    return workdir / "images"


def run_below(folder):
    (run,) = find_runs(folder / "runs")
    return run


def test_a_removed_image_keeps_its_row_and_the_run_its_weights(cli, images, workdir):
    assert cli(*WORDS, *SKIP, "run_dir=straight").status == 0
    with signal_at(4):
        assert cli(*WORDS, *SKIP).status == 143
    (images / BAD).unlink()
    refused = cli(*WORDS, f"run_dir={run_below(workdir)}")
    assert refused.status == 2
    assert f"1 removed: {BAD}" in refused.err
    assert "dataset.on_error=skip dataset.max_bad=1 goes on" in refused.err
    continued = cli(*WORDS, *SKIP)  # and finds the run, whose directory is named by the images as they were
    assert continued.status == 0, continued.err
    assert f"since the run began 1 removed: {BAD}" in continued.out
    assert "resuming at step 4" in continued.out
    assert differences(tensors(run_below(workdir)), tensors(workdir / "straight")) == []


def test_an_image_that_stopped_a_run_is_read_once_it_is_repaired(cli, images, workdir):
    stopped = cli(*WORDS, "trainer.save_every_epochs=null", "run_dir=run")
    assert stopped.status == 1
    assert f"cannot read images/{BAD}" in stopped.err
    saved = re.search(r"saved at step (\d)\n", stopped.out)  # what was trained before it, though no checkpoint was due
    assert newest(workdir / "run").name == f"step-{saved[1]}"
    assert FileList.read(workdir / "run").unreadable == {3}
    shutil.copy(workdir / "whole" / BAD, images)
    continued = cli(*WORDS, "run_dir=run")
    assert continued.status == 0, continued.err
    assert f"since the run began 1 repaired: {BAD}" in continued.out
    assert f"resuming at step {saved[1]} of 8" in continued.out
    assert cli(*WORDS, "run_dir=straight").status == 0
    assert differences(tensors(workdir / "run"), tensors(workdir / "straight")) == []


def test_other_images_are_refused_by_name_and_each_way_on_works(cli, images, workdir):
    shutil.copy(workdir / "whole" / BAD, images)
    with signal_at(4):
        assert cli(*WORDS).status == 143
    run = run_below(workdir)
    shutil.copy(workdir / "whole" / BAD, images / "new.png")
    shutil.copy(workdir / "other" / "000.png", images / "005.png")
    (images / "007.png").unlink()
    noted = cli(*WORDS, "plan_only=true")  # the default directory is another one
    assert noted.status == 0, noted.err
    assert f"note       {run.relative_to(workdir)} is this run on other images" in noted.out
    with pytest.raises(InputError) as caught:
        claim.refuse_another_config(
            run,
            claim.saved_description(run),
            claim.saved_description(run)["config"],
            {"data": "other"},
            FileList(("new.png",), (1,)),
        )
    refused = cli(*WORDS, f"run_dir={run}")
    assert refused.status == 2
    for line in ("1 added: new.png", "1 removed: 007.png", "1 changed: 005.png"):
        assert f"sslctl:   {line}\n" in refused.err
    way, command = caught.value.advice
    assert way in refused.err
    assert command in refused.err

    # A new run from this one, by the command as it is printed: all weights are those of the other at its last step.
    began = cli(*shlex.split(command)[1:], "run_dir=new", "trainer.epochs=1", "optimizer.base_lr=1e-30")
    assert began.status == 0, began.err
    assert "begins with" in began.out
    before, after = (load_tensors(newest(path) / "weights.safetensors") for path in (run, workdir / "new"))
    weights = [name for name in before if name.endswith(("weight", "bias"))]
    assert weights
    assert all(torch.allclose(after[name], before[name]) for name in weights)

    # The same run with other images: every later result says so.
    assert cli(*WORDS, f"run_dir={run}", way).status == 0
    environment = unsigned(run / "environment.json")
    assert data_changes(environment) == "step 4: 1 added, 1 removed, 1 changed"
    assert current_hashes(environment)["data"] == json.loads((run / "data.json").read_text())["train"]["content_hash"]
    write_images(workdir / "labelled", "train/a", "train/b", "test/a", "test/b")
    words = ("dataset=imagefolder", "dataset.root=labelled", "cache=false", "device=cpu")
    judged = cli("knn-eval", str(run), *words)
    assert judged.status == 0, judged.err
    changed = {result["subject"]: result.get("data_changed") for result in results(run / "results.jsonl")}
    assert changed == {"trained": data_changes(environment), "random": None}


def test_a_finished_run_asked_for_more_epochs_names_the_command_that_trains_them(cli, images, workdir):
    shutil.copy(workdir / "whole" / BAD, images)
    assert cli(*WORDS).status == 0
    run = run_below(workdir).relative_to(workdir)
    command = f"sslctl pretrain continue_run={run} trainer.epochs=1"
    more = cli(
        *WORDS, "trainer.epochs=3", "plan_only=true"
    )  # by default another directory, where it would begin at step 0
    assert f"{run} has finished 2 epochs of this; {command} goes on from it" in more.out
    refused = cli(*WORDS, "trainer.epochs=3", f"run_dir={run}")
    assert refused.status == 2
    assert f"it is finished; a new run from all that this one has learned: {command}" in refused.err
    (workdir / "below").mkdir()  # the images are found from another directory, too
    began = cli(
        "pretrain", f"continue_run={workdir / run}", "trainer.epochs=1", "continue_optimizer=true", "run_dir=new"
    )
    assert began.status == 0, began.err
    assert "steps      4 = 1 epochs × 4 steps" in began.out
    config = yaml.safe_load((workdir / "new" / "config.yaml").read_text())
    assert (config["trainer"]["epochs"], config["dataset"]["root"]) == (1, str(images))
    again = cli(*shlex.split(unsigned(workdir / "new" / "environment.json")["command"])[1:])
    assert "already finished: new" in again.out, again.err


def test_words_of_a_run_that_name_code_are_not_taken_over(tmp_path):
    describe(tmp_path)
    environment = unsigned(tmp_path / "environment.json")
    words = [
        "method=moco",
        "hydra.callbacks.x=1",
        "+hydra.launcher.y=2",
        "hydra/launcher=joblib",
        "trainer.epochs=3",
        "run_dir=x",
        "backbone.normalization=weights",
    ]
    environment["command"] = shlex.join(["sslctl", "pretrain", *words])
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    assert continuing.words_of(tmp_path, ["trainer.epochs=4"]) == ["method=moco"]
    environment["command"] = "sslctl pretrain 'allow=[mine]' method=moco"
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(InputError, match=r"was started with 'allow=\[mine\]'") as caught:
        continuing.words_of(tmp_path, [])
    assert continuing.words_of(tmp_path, caught.value.advice[0].strip("'").split()) == ["method=moco"]


def test_another_model_or_a_run_without_checkpoints_cannot_be_continued(cli, images, workdir):
    shutil.copy(workdir / "whole" / BAD, images)
    assert cli(*WORDS, "run_dir=run").status == 0
    other = cli("pretrain", "continue_run=run", "backbone.widths=[6]", "run_dir=new")
    assert other.status == 2
    assert "continue_run=run has learned another model" in other.err
    assert cli("pretrain", "continue_run=nowhere").err == "sslctl: continue_run=nowhere: no such run\n"
    shutil.rmtree(workdir / "run" / "checkpoints")
    assert "it has no valid checkpoint" in cli("pretrain", "continue_run=run").err


def describe(run_dir, **changes):
    asked = {
        "config": CONFIG,
        "hashes": {"data": "abc"},
        "facts": FACTS,
        "preprocess": PREPROCESS,
        "command": "sslctl pretrain",
    }
    run_dir.mkdir(exist_ok=True)
    return claim.describe(run_dir, **asked | changes)


def test_another_torch_is_recorded_from_its_step_on_and_said_once(tmp_path, capsys, monkeypatch):
    describe(tmp_path)
    monkeypatch.setattr("sslctl.runs.segments.versions", lambda: rundir.versions() | {"torch": "9.9"})
    there = describe(tmp_path)
    printed = capsys.readouterr().err
    assert f"torch {rundir.versions()['torch']} → 9.9" in printed
    (segment,) = there["environment"]["segments"]
    assert (segment["step"], segment["versions"]["torch"]) == (0, "9.9")
    assert describe(tmp_path) == there
    assert capsys.readouterr().err == ""
    assert unsigned(tmp_path / "environment.json")["versions"] == rundir.versions()


def test_a_list_of_files_comes_back_and_is_small(tmp_path):
    names = tuple(f"class {n % 7}/photograph of the {n}\udce4.jpg" for n in range(5_000))
    listed = FileList(names, tuple(range(20_000, 25_000)), frozenset({3, 9}))
    listed.write(tmp_path)
    assert FileList.read(tmp_path) == listed
    assert (tmp_path / FILES).stat().st_size < 10 * len(names)
    mark_unreadable(tmp_path, f"cannot read /a/{names[11]}: cut short")
    assert FileList.read(tmp_path).unreadable == {3, 9, 11}
    (tmp_path / FILES).write_bytes(b"\x1f\x8b")
    assert FileList.read(tmp_path) is None


def changed(sources, run_dir):
    """What is refused where the second of two sources is what a run finds instead of the first."""
    first, second = sources
    run_dir.mkdir()
    first.file_list.write(run_dir)
    describe(run_dir, hashes={"data": first.content_hash}, files=first.file_list)
    with pytest.raises(InputError) as caught:
        claim.refuse_another_config(
            run_dir, claim.saved_description(run_dir), CONFIG, {"data": second.content_hash}, second.file_list
        )
    return caught.value


def of_tiles(root):
    return folder("train", FolderKeys(str(root), None, 3, 1.0, tiles={"size": 8}))


def of_a_pack(root):
    pytest.importorskip("datasets")
    with packing.new_folder(root / "pack") as inside:
        packing.write_pack(inside, {"train": folder("train", FolderKeys(str(root), None, 3, 0))}, lambda done: None)
    source = packed.hf("train", str(root / "pack"), None, 3, 1.0)
    shutil.rmtree(root / "pack")
    return source


@pytest.mark.parametrize(
    ("read", "change", "line"),
    [
        (of_tiles, lambda root: (root / "003.png").unlink(), "1 removed: 003.png"),
        (of_tiles, lambda root: shutil.copy(root / "003.png", root / "004.png"), "1 changed: 004.png"),
        (of_a_pack, lambda root: (root / "003.png").unlink(), "1 changed: train/data-00000-of-00001.arrow"),
    ],
    ids=["a scene fewer", "another scene", "a pack"],
)
def test_files_that_are_no_samples_are_named_too_and_have_no_stand_ins(tmp_path, read, change, line):
    root = write_images(tmp_path / "images", count=6)
    Image.new("RGB", (16, 16)).save(root / "003.png")  # of another size in bytes
    before = read(root)
    change(root)
    refusal = changed((before, read(root)), tmp_path / "run")
    assert line in str(refusal)
    assert "on_data_change=continue" in refusal.advice
    assert not any("on_error" in words for words in refusal.advice)


def test_videos_and_texts_are_named_by_their_own_names(tmp_path):
    for number in range(3):
        write_images(tmp_path / "videos", f"v{number}", count=6, size=(8, 8), seed=number)
    before = frames("train", str(tmp_path / "videos"), None, 3, 5)
    write_images(tmp_path / "videos", "v3", count=6, size=(8, 8))
    assert "1 added: v3" in str(
        changed((before, frames("train", str(tmp_path / "videos"), None, 3, 5)), tmp_path / "run")
    )

    pytest.importorskip("tokenizers")
    (tmp_path / "texts").mkdir()
    for number in range(2):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"word {number} and others " * 40)
    before = text("train", str(tmp_path / "texts"), 16, 300, None)
    (tmp_path / "texts" / "0.txt").write_text("other words " * 50)
    assert "1 changed: 0.txt" in str(
        changed((before, text("train", str(tmp_path / "texts"), 16, 300, None)), tmp_path / "b")
    )


def test_every_kind_of_change_is_told_apart():
    older = FileList(tuple("abcdef"), (1, 2, 3, 4, 5, 6), frozenset({3, 4}))
    newer = FileList(tuple("abdeg"), (1, 9, 9, 5, 7))
    changes = Changes.between(older, newer)
    assert changes == Changes(added=["g"], removed=["c", "f"], changed=["b"], repaired=["d"])
    assert list(changes.lines()) == ["1 added: g", "2 removed: c, f", "1 changed: b", "1 repaired: d"]
