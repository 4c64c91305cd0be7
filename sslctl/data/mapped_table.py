"""The rows of Arrow files, mapped into memory: what reading them has touched is given back, so that it does not add up."""

import json
import mmap
from pathlib import Path
from typing import Any

_KEPT = 64  # reads whose pages stay mapped: each maps some 64 KiB around what it touches, or more


class MappedTable:
    """A split on disk as Dataset.save_to_disk and `sslctl pack` write it.

    Resident memory counts the pages of a mapped file that were touched, also where they are the system's to take. They are given
    back every few reads; what the system still has of them is mapped again at no cost.
    """

    def __init__(self, folder: Path):
        """Raises OSError, ValueError, LookupError or pyarrow's own errors for files that are none of Arrow's."""
        import datasets  # noqa: F401  whose types the columns may have
        import pyarrow

        names = [file["filename"] for file in json.loads((folder / "state.json").read_text())["_data_files"]]
        self._maps = [_mapped(folder / name) for name in names]
        tables = [pyarrow.ipc.open_stream(pyarrow.py_buffer(own)).read_all() for own in self._maps]
        self._table, self._reads = pyarrow.concat_tables(tables), 0
        self._give_back()  # the headers of all batches were read

    def rows(self, start: int, stop: int) -> Any:
        """Returns rows as a pyarrow table."""
        self._reads += 1
        if self._reads % _KEPT == 0:
            self._give_back()
        return self._table.slice(start, stop - start)

    def _give_back(self) -> None:
        for own in self._maps:
            own.madvise(mmap.MADV_DONTNEED)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
