"""Temporary folders: removed at the end, after a kill by whoever starts next, and nobody else's ever."""

import fcntl
import os
import signal
import tempfile

import pytest

from sslctl.runs.scratch import scratch_folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def killed_in_one():
    """The process id of a process that was killed with a folder of its own."""
    pid = os.fork()
    if not pid:
        with scratch_folder("sweep") as folder:
            (folder / "file").write_text("of a killed process")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_folder_is_there_for_the_block_and_gone_after_it(temporary):
    with scratch_folder("processes") as folder:
        (folder / "below").mkdir()
        assert list(temporary.iterdir()) == [folder]
    assert list(temporary.iterdir()) == []


def test_a_killed_process_leaves_a_folder_that_the_next_start_removes(temporary):
    killed_in_one()
    assert len(list(temporary.iterdir())) == 1
    with scratch_folder("processes") as folder:
        assert list(temporary.iterdir()) == [folder]


def test_a_living_process_keeps_its_folder(temporary):
    with scratch_folder("sweep") as outer:
        with scratch_folder("processes") as inner:
            assert set(temporary.iterdir()) == {outer, inner}
        assert outer.is_dir()


@pytest.mark.parametrize(
    "name",
    [
        "sslctl-sweep.abcdefgh",
        "sslctl.sweep-abcdefgh",
        "sslctl.other.abcdefgh",
        "sslctl.sweep.abcdefg",
        "pytest-of-root",
    ],
)
def test_what_has_another_name_stays(name, temporary):
    (temporary / name).mkdir()
    with scratch_folder("sweep"):
        pass
    assert [path.name for path in temporary.iterdir()] == [name]


def test_links_files_and_folders_of_others_stay(temporary, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "file").write_text("kept")
    (temporary / "sslctl.sweep.aaaaaaaa").symlink_to(elsewhere)
    (temporary / "sslctl.sweep.bbbbbbbb").write_text("a file")
    kept = {"sslctl.sweep.aaaaaaaa", "sslctl.sweep.bbbbbbbb"}
    if os.getuid() == 0:
        (temporary / "sslctl.sweep.cccccccc").mkdir()
        os.chown(temporary / "sslctl.sweep.cccccccc", 12345, 12345)
        kept.add("sslctl.sweep.cccccccc")
    with scratch_folder("sweep"):
        pass
    assert {path.name for path in temporary.iterdir()} == kept
    assert (elsewhere / "file").exists()


def test_a_folder_that_another_start_is_about_to_remove_is_left_to_it(temporary, monkeypatch):
    real, built = tempfile.mkdtemp, []

    def mkdtemp(**arguments):
        built.append(real(**arguments))
        if len(built) == 1:  # it has no lock yet, and is taken for abandoned
            descriptor = os.open(built[0], os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        return built[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with scratch_folder("sweep") as folder:
        assert str(folder) == built[1]
