"""Where downloads go, and what is said where the network gives none."""

import contextlib
import http.client
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sslctl.errors import InputError, first_line, user_path


def data_home() -> Path:
    """Returns where downloads go: $SSLCTL_DATA, or sslctl/ in the user's cache folder."""
    cache = user_path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    return user_path(os.environ.get("SSLCTL_DATA", cache / "sslctl" / "data"))


def download_by(what: str, folder: Path, fetch: Callable[[Path], Any]) -> None:
    """Downloads by a call of torchvision's into a folder of its own, and moves what is whole to where it belongs.

    fetch: takes that folder; it raises whatever the network does. Folders that were made are taken back then.
    """
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as name:
            fetch(Path(name))
            for path in [path for path in Path(name).rglob("*") if path.is_file()]:
                place = folder / path.relative_to(name)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only where it is empty
        raise InputError(
            f"dataset.download=true: {what} cannot be fetched ({first_line(error)}): put its files into a folder,"
            " dataset.root=FOLDER"
        ) from error
