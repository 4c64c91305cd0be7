"""What is no file, where one is to be read: pipes, sockets and devices, whose reader may wait for ever."""

import errno
import os
import stat
from pathlib import Path


class SpecialFile(OSError):
    """A pipe, a socket or a device in the place of a file."""

    def __init__(self, path: Path | str):
        super().__init__(errno.EINVAL, "a pipe, a socket or a device is in its place", os.fspath(path))


def refuse_special(path: Path | str) -> None:
    """Raises SpecialFile, or the OSError of what is not there, before a file is opened. A directory is left to its reader.

    /dev/null is an empty file, to which results may go.
    """
    status = os.stat(path)
    is_ordinary = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    if not (is_ordinary or os.path.samestat(status, os.stat(os.devnull))):
        raise SpecialFile(path)
