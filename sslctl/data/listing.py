"""Which images a folder holds, what is left out, and which are for testing. Nothing here imports torch."""

import hashlib
import os
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
    """Lists the images below a folder. Hidden entries and runs of sslctl are left out, and counted."""
    names, left_out, visited = [], Counter(), set()
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
            elif entry.lower().endswith(EXTENSIONS):
                names.append(inside.removeprefix("./") + entry)
            else:
                left_out[os.path.splitext(entry)[1].lower() or "without extension"] += 1
    left_out = {kind: count for kind, count in left_out.most_common() if count}
    if not names:
        raise InputError(f"no images in {base} ({_counts(left_out)}); looked for {' '.join(EXTENSIONS)}")
    return Listing(base, sorted(names), left_out)


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
