"""Where downloads go, and what is said where the network gives none."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sslctl.errors import InputError, first_line, user_path


def data_home() -> Path:
    """Returns where downloads go: $SSLCTL_DATA, or sslctl/ in the user's cache folder."""
    cache = user_path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    return user_path(os.environ.get("SSLCTL_DATA", cache / "sslctl" / "data"))


def download_by(what: str, folder: Path, fetch: Callable[[], Any]) -> None:
    """Downloads by a call of torchvision's, which raises whatever the network does; folders that it made are taken back then."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        fetch()
    except (OSError, RuntimeError, ValueError) as error:
        for made in (folder / "FashionMNIST" / "raw", folder / "FashionMNIST", *missing):
            with contextlib.suppress(OSError):
                made.rmdir()  # only where it is empty
        raise InputError(
            f"dataset.download=true: {what} cannot be fetched ({first_line(error)}): put its files into a folder,"
            " dataset.root=FOLDER"
        ) from error
