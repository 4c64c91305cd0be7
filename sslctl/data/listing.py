"""Which images a folder holds, what is left out, and which are for testing. Nothing here imports torch."""

import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sslctl.errors import InputError, user_path
from sslctl.runs.ownership import MARKER

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
)
EXTENSIONS += (".gif", ".avif", ".jp2", ".tga")
ARRAYS = (".npy", ".npz", ".dcm", ".dicom")  # images where a folder has none of the usual kinds
_SETTLED = 10**9  # nanoseconds since the last change of a folder, after which its listing is kept
_listings: dict[str, tuple["Listing", dict[str, int]]] = {}
_HIDDEN = ("__MACOSX", "@eaDir")  # what archives and storage boxes put beside images; else names that begin with a dot


@dataclass(frozen=True)
class Listing:
    """The images below a folder, as sorted relative POSIX paths, and how many entries of which kind are none."""

    base: Path
    names: list[str]
    left_out: dict[str, int]


def existing_folder(root: str | None, may_be_made: bool = False) -> Path:
    """Returns the folder that dataset.root names; raises InputError where there is none. may_be_made: by a download."""
    if not root:
        raise InputError("dataset.root is not set: dataset.root=/path/to/images")
    path = user_path(root)
    if may_be_made and not path.exists():
        return path
    if not path.is_dir():
        raise InputError(f"dataset.root={path}: {'not a folder' if path.exists() else 'no such folder'}")
    return path


def scan(base: Path) -> Listing:
    """Lists the images below a folder. Hidden entries and runs of sslctl are left out, and counted.

    One command asks several times, for the scale and for each split: a listing serves while no folder below has changed.
    """
    place = os.path.abspath(base)
    listing, times = _listings.get(place, (None, {}))
    if listing is None or listing.base != base or any(_changed(folder) != then for folder, then in times.items()):
        listing, folders = _scan(base)
        times = {folder: _changed(folder) for folder in folders}
        if max(times.values()) < time.time_ns() - _SETTLED:  # within a clock's tick a second change would not be seen
            _listings[place] = listing, times
    return listing


def _changed(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


def _scan(base: Path) -> tuple[Listing, set[str]]:
    """Lists the images below a folder. Returns the folders that were looked into, too."""
    names, arrays, left_out, visited = [], [], Counter(), set()
    for directory, below, entries in os.walk(base, followlinks=True):
        visited.add(os.path.realpath(directory))  # a link to a parent is not entered again
        if directory != str(base) and MARKER in entries:
            left_out["runs of sslctl"] += 1
            below[:] = []
            continue
        left_out["hidden folders"] += sum(map(is_hidden, below))
        below[:] = sorted(d for d in below if _is_entered(os.path.join(directory, d), visited))
        inside = os.path.relpath(directory, base).replace(os.sep, "/") + "/"
        for entry in entries:
            if is_hidden(entry):
                left_out["hidden files"] += 1
            elif entry.lower().endswith((*EXTENSIONS, *ARRAYS)):
                of_kind = arrays if entry.lower().endswith(ARRAYS) else names
                of_kind.append(inside.removeprefix("./") + entry)
            else:
                left_out[os.path.splitext(entry)[1].lower() or "without extension"] += 1
    if names:  # beside images, arrays are masks or features of them
        left_out.update(os.path.splitext(name)[1].lower() for name in arrays)
    left_out, names = {kind: count for kind, count in left_out.most_common() if count}, names or arrays
    if not names:
        looked_for = " ".join((*EXTENSIONS, *ARRAYS))
        raise InputError(f"no images in {base} ({_counts(left_out)}); looked for {looked_for}")
    return Listing(base, sorted(names), left_out), visited


def is_hidden(name: str) -> bool:
    """Tells whether a file or folder is not meant to be seen: .git, .ipynb_checkpoints, ._photo.jpg, __MACOSX."""
    return name.startswith(".") or name in _HIDDEN


def _is_entered(directory: str, visited: set[str]) -> bool:
    return not is_hidden(os.path.basename(directory)) and os.path.realpath(directory) not in visited


def _counts(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in left_out.items()) or "it is empty"


def name_hash(name: str) -> int:
    """Returns a number of 32 bits for a name, which draws the fixed fifth for testing where nobody made a test split."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=4).digest(), "little")
