"""The list of the files that a run is trained on, kept beside it: what of them has come, gone or changed can then be named."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from sslctl.runs.atomic import replacing

FILES = "files.json.gz"
FORMAT = 1
_LISTED = 5  # names of a kind in a message


@dataclass(frozen=True)
class FileList:
    """names: below the split's folder, in the order of a run's rows; sizes: bytes of each; unreadable: rows that others stand
    in for. are_rows: whether each file is one sample, for which another can stand in; not so of texts, videos, tiles and files
    that hold many images. It is not written."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    unreadable: frozenset[int] = frozenset()
    are_rows: bool = field(default=True, compare=False)

    def write(self, run_dir: Path) -> None:
        """Writes files.json.gz: some five bytes a file."""
        lists = {"names": self.names, "sizes": self.sizes, "unreadable": sorted(self.unreadable)}
        content = json.dumps({"format": FORMAT} | lists, separators=(",", ":")).encode()
        with replacing(run_dir / FILES) as temporary:
            temporary.write_bytes(gzip.compress(content, 6, mtime=0))

    @classmethod
    def read(cls, run_dir: Path) -> "FileList | None":
        """Reads a run's list; None where it has none that can be read, as the runs of earlier versions."""
        try:
            saved = json.loads(gzip.decompress((run_dir / FILES).read_bytes()))
            names, sizes = tuple(map(str, saved["names"])), tuple(map(int, saved["sizes"]))
            intact = saved["format"] == FORMAT and len(names) == len(sizes)
            return cls(names, sizes, frozenset(map(int, saved["unreadable"]))) if intact else None
        except (OSError, EOFError, ValueError, LookupError, TypeError, zlib.error):
            return None


def mark_unreadable(run_dir: Path, message: str) -> None:
    """Notes in a run's list the file that a message names, as it could not be read: once repaired, the run goes on with it."""
    files = FileList.read(run_dir)
    if files is None:
        return
    rows = {
        row
        for row, name in enumerate(files.names)
        if (f" {name}: " if name.startswith("/") else f"/{name}: ") in message
    }
    if rows:
        replace(files, unreadable=files.unreadable | rows).write(run_dir)


@dataclass(frozen=True)
class Changes:
    """Names of files that are in the newer of two lists alone, in the older alone, in both with another size; and those whose
    images could not be read, and are of another size now."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    @classmethod
    def between(cls, older: FileList, newer: FileList) -> "Changes":
        before, now = dict(zip(older.names, older.sizes, strict=True)), dict(zip(newer.names, newer.sizes, strict=True))
        broken = {older.names[row] for row in older.unreadable}
        resized = [name for name in older.names if name in now and now[name] != before[name]]
        return cls(
            added=[name for name in newer.names if name not in before],
            removed=[name for name in older.names if name not in now],
            changed=[name for name in resized if name not in broken],
            repaired=[name for name in resized if name in broken],
        )

    def lines(self) -> Iterator[str]:
        """Yields '2 added: a.png, b.png' for each kind of change."""
        for kind, names in vars(self).items():
            if names:
                more = len(names) - _LISTED
                yield f"{len(names):,} {kind}: {', '.join(names[:_LISTED])}{f' and {more:,} others' if more > 0 else ''}"

    def summary(self) -> str:
        """Returns '2 added, 1 removed'."""
        return ", ".join(f"{len(names):,} {kind}" for kind, names in vars(self).items() if names) or "other content"
