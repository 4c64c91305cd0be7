"""Names of files that are no UTF-8."""

import os
import shutil

import pytest

from tests.conftest import QUICK


@pytest.fixture
def latin_names(labelled_images, workdir):
    """labelled_images with an é in the name of their folder, a class and each file, as Latin-1 writes it."""
    root = workdir / os.fsdecode(b"images\xe9")
    shutil.copytree(labelled_images, root)
    for path in [*root.rglob("*.png")]:
        path.rename(os.fsdecode(os.fsencode(path.parent / path.stem) + b"\xe9.png"))
    for path in [*root.rglob("a")]:
        path.rename(os.fsdecode(os.fsencode(path) + b"\xe9"))
    return root


def test_images_whose_names_are_no_utf8_work_from_training_to_the_report(latin_names, cli):
    words = [word for word in QUICK if not word.startswith(("evaluation.closing", "evaluation.cache", "trainer.tens"))]
    steps = (
        ("pretrain", *words, "dataset=imagefolder", f"dataset.root={latin_names}", "run_dir=run", "probe.epochs=1"),
        ("knn-eval", "run", "device=cpu"),
        *(("embed", "run", "device=cpu", f"format={kind}") for kind in ("npz", "csv", "parquet")),
        ("report", "run", "images=4"),
    )
    for step in steps:
        result = cli(*step)
        assert result.status == 0, f"{step}: {result.err}"
    page = (latin_names.parent / "run" / "report.html").read_bytes().decode()  # as UTF-8
    assert "a\\udce9" in page


def test_a_message_shows_a_name_that_is_no_utf8_escaped(latin_names, cli):
    next((latin_names / "train" / "b").iterdir()).write_bytes(b"no image")
    result = cli("pretrain", *QUICK, "dataset=imagefolder", f"dataset.root={latin_names}", "run_dir=run")
    assert result.status == 2
    assert r"\udce9.png" in result.err
