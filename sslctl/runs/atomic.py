"""Files that are whole or not there, wherever a kill falls: written beside their place, synced, renamed."""

import contextlib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from sslctl.errors import InputError, say

# The names of temporary files, each with the number of the process that writes it.
PROBE = r"\.writable-\d+"  # of `make_folder`
UNFINISHED = r"\.\d+\.writing"  # what `replacing` adds, behind a dot and the file's own name
_TEMPORARY = re.compile(rf"{PROBE}|\..+{UNFINISHED}", re.ASCII)
NOT_OFFERED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)  # by SMB, FUSE, clouds


def sync(path: Path) -> None:
    """Waits until a file, or which names a folder holds, is on the disk. Where the file system cannot tell, says so once."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        _announce_unsynced("folders" if path.is_dir() else "files")


@functools.cache  # once a process
def _announce_unsynced(kind: str) -> None:
    say(
        f"sslctl: this file system cannot sync {kind}: after a loss of power the newest checkpoint may be missing; a kill"
        " loses nothing",
        file=sys.stderr,
    )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a sibling to write to; it takes the place of `path` when the block ends, and is removed when that raises.

    Its name has the process's number, so that two may write the same path: the last one's file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        yield temporary
        sync(temporary)
        if path.is_dir() and not path.is_symlink():
            raise InputError(f"{path}: a directory stands where this file belongs; move it away")
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Deletes the temporary files that a kill has left, by their names. Only for whoever alone writes into the folder."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def point(link: Path, target: Path) -> None:
    """Makes a symbolic link, or replaces the one that is there, in one step; where there are none, a file that holds the path."""
    temporary = link.with_name(f".{link.name}")
    if temporary.is_symlink():  # of a kill; a file of this name is somebody's
        temporary.unlink()
    try:
        temporary.symlink_to(target)
    except OSError:
        write_text(link, f"{target}\n")
    else:
        temporary.replace(link)


def why_unwritable(path: Path) -> str | None:
    """Says why a file or directory could not be made or written at `path`, None where it could; makes nothing."""
    existing = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        return f"{existing} is not a directory"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} is not writable"


def why_unwritable_file(path: Path) -> str | None:
    """Says why nothing could be written to a file, or a file be made at `path`, None where it could; makes nothing."""
    if not os.path.lexists(path):
        return why_unwritable(path.parent)
    return None if os.access(path, os.W_OK) else f"{path} is not writable"


def make_folder(folder: Path) -> None:
    """Makes a folder, and tries whether it takes files. Raises OSError where it does not."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable-{os.getpid()}"
    probe.touch()
    probe.unlink()


def make_folder_of(out: Path) -> None:
    """Makes the folder that a file named by out= goes to. Raises InputError where no file can be written there."""
    if out.is_dir():
        raise InputError(f"out={out} is a directory: name a file in it")
    try:
        make_folder(out.parent)
    except OSError as error:
        raise InputError(f"out={out} cannot be written: {error.strerror}") from error


def refuse_others_file(out: Path, verb: str, is_own: Callable[[Path], bool]) -> None:
    """Raises InputError where something is at out= that a verb has not written: it would be replaced."""
    own = False
    with contextlib.suppress(OSError):
        own = out.is_file() and is_own(out)
    if os.path.lexists(out) and not own:
        raise InputError(
            f"out={out}: there is a file already, that sslctl {verb} did not write: move it away, or name another"
        )


def move_aside(path: Path) -> Path:
    """Renames what is at a path, and returns its new name."""
    return path.rename(free_name(path))


def free_name(path: Path) -> Path:
    """Returns path.aside, or the first free one of path.aside-2, -3, …"""
    aside, number = path.with_name(f"{path.name}.aside"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.aside-{number}")
    return aside
