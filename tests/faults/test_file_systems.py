"""File systems that offer less: no symbolic links, no fsync of a folder, no locks, names that are no UTF-8."""

import errno
import fcntl
import os
import shutil
import stat

import pytest

from sslctl.runs import atomic, claim
from sslctl.runs.atomic import point, write_text
from tests.conftest import QUICK


@pytest.fixture
def bare(monkeypatch):
    """A file system as SMB's and some of FUSE's."""
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    def not_offered(*_, **__):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "symlink", not_offered)
    monkeypatch.setattr(fcntl, "flock", not_offered)
    atomic._announce_unsynced.cache_clear()
    yield
    atomic._announce_unsynced.cache_clear()


@pytest.mark.usefixtures("bare")
def test_a_run_is_trained_and_found_without_links_syncs_and_locks(cli, labelled_images, workdir):
    words = ("pretrain", *QUICK, "dataset=imagefolder", f"dataset.root={labelled_images}")
    result = cli(*words)
    assert result.status == 0, result.err
    notices = [line for line in result.err.splitlines() if "file system" in line]
    assert [notice.split(":")[1] for notice in notices] == [
        " this file system has no locks",
        " this file system cannot sync folders",
    ]
    latest = workdir / "runs" / "latest"
    assert latest.is_file()
    for name in ("runs/latest", "runs/latest/last"):
        result = cli("knn-eval", name, "device=cpu", "cache=false", "subjects=[trained]")
        assert result.status == 0, result.err
    assert "already finished" in cli(*words).out
    assert latest.is_file()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_sync_that_fails_is_an_error(number, tmp_path, monkeypatch):
    def failing(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_text(tmp_path / "file", "text")


def test_a_link_that_can_be_made_again_takes_the_place_of_a_file(tmp_path):
    (tmp_path / "link").write_text("target\n")
    point(tmp_path / "link", "target")
    assert os.readlink(tmp_path / "link") == "target"
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_copy_in_the_place_of_the_link_to_the_latest_run_stays_and_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("latest", "digits/run"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    claim.point_latest(tmp_path / "runs" / "digits" / "run")
    assert (tmp_path / "runs" / "latest").is_dir()
    assert f"{tmp_path}/runs/latest is no link: it stays as it is" in capsys.readouterr().err


# --- Names that are no UTF-8 ---


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
