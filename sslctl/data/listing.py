"""Which images a folder holds, and which of them are for testing. Nothing here imports torch."""

import hashlib
import os
from pathlib import Path

from sslctl.errors import InputError, user_path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def existing_folder(root: str | None, may_be_made: bool = False) -> Path:
    """Returns the folder that dataset.root names; raises InputError where there is none."""
    if not root:
        raise InputError("dataset.root is not set: dataset.root=/path/to/images")
    path = user_path(root)
    if may_be_made and not path.exists():
        path.mkdir(parents=True)
    if not path.is_dir():
        raise InputError(f"dataset.root={path}: {'not a folder' if path.exists() else 'no such folder'}")
    return path


def scan(base: Path) -> list[str]:
    """Lists the images below a folder, as sorted relative POSIX paths."""
    names, others, visited = [], 0, set()
    for directory, below, entries in os.walk(base, followlinks=True):
        visited.add(os.path.realpath(directory))  # a link to a parent is not entered again
        below[:] = sorted(d for d in below if os.path.realpath(os.path.join(directory, d)) not in visited)
        inside = os.path.relpath(directory, base).replace(os.sep, "/") + "/"
        for entry in entries:
            if entry.lower().endswith(EXTENSIONS):
                names.append(inside.removeprefix("./") + entry)
            else:
                others += 1
    if not names:
        raise InputError(f"no images in {base} ({others} other files); looked for {' '.join(EXTENSIONS)}")
    return sorted(names)


def held_out(name: str) -> bool:
    """Tells whether a file is in the fixed fifth that is a test split where nobody made one."""
    return (
        int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=4).digest(), "little") % 5
        == 0
    )


def count_training_images(root: str, in_classes: bool) -> int:
    """Counts the images that a folder gives for training. in_classes: one folder a class, of which a part may be for testing."""
    base = existing_folder(root)
    if not in_classes:
        return len(scan(base))
    if (base / "train").is_dir():
        return len(scan(base / "train"))
    return sum(not held_out(name) for name in scan(base))
