"""Images that a CSV or Parquet file lists, with their labels, splits and groups."""

import functools
from collections.abc import Mapping
from typing import Any

from sslctl.data.downloads import data_home
from sslctl.data.sources import Source, from_files
from sslctl.data.table import AUTO
from sslctl.data.table_layout import table_rows
from sslctl.data.unreadable import readable
from sslctl.errors import user_path


def csv(
    split: str,
    root: str | None,
    image_size: int | None,
    channels: int,
    memory_gb: float,
    columns: Mapping[str, Any] | None = None,
    splits: Mapping[str, Any] | None = None,
    separator: str | None = AUTO,
    range: int | list[float] | None = None,
    on_error: str = "raise",
    max_bad: float = 0.01,
) -> Source:
    """Reads the images that a table lists, a row each, by paths from the table's folder on.

    root: the file. columns, splits, separator: see `table_layout.table_rows`; the others are those of `imagefolder`.
    """
    lay_out = functools.partial(table_rows, root=root, columns=columns, splits=splits, separator=separator)
    lay_out = readable(lay_out, on_error, max_bad, data_home() / "checked")
    return from_files(user_path(root).stem if root else "", split, lay_out, image_size, channels, memory_gb, range)
