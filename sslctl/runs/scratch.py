"""Temporary folders of which none stays for ever: the kernel says whose owner is dead, and a later start removes those."""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"sslctl\.(?:processes|sweep)\.\w{8}", re.ASCII)


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Makes a folder, sslctl.PURPOSE.…, below the temporary one (TMPDIR), and removes it when the block ends.

    First it removes those that killed processes of this user have left.
    """
    _remove_abandoned()
    folder, descriptor = _make(f"sslctl.{purpose}.")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _make(prefix: str) -> tuple[Path, int | None]:
    """Makes a folder and locks it for as long as this process lives; None where the file system knows no such lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # not inherited by what this process starts
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another start takes it for abandoned, and removes it
            os.close(descriptor)
            continue
        except OSError:
            os.close(descriptor)
            return folder, None
        if folder.exists():
            return folder, descriptor
        os.close(descriptor)


def _remove_abandoned() -> None:
    """Removes the folders of this user and of these names that nobody holds."""
    for folder in Path(tempfile.gettempdir()).iterdir():
        if not _NAME.fullmatch(folder.name):
            continue
        with contextlib.suppress(OSError):  # another user's, held, on a file system without locks, or gone meanwhile
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)
