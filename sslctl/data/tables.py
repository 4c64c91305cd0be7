"""Images that a CSV or Parquet file lists, with their labels, splits and groups."""

import functools

from sslctl.data.folders import TableKeys, from_files
from sslctl.data.sources import Source
from sslctl.data.table_layout import table_rows
from sslctl.errors import user_path


def csv(split: str, keys: TableKeys) -> Source:
    """Reads the images that a table lists, a row each, by paths from the table's folder on. keys.root: the file."""
    lay_out = functools.partial(
        table_rows, root=keys.root, columns=keys.columns, splits=keys.splits, separator=keys.separator
    )
    return from_files(user_path(keys.root).stem if keys.root else "", split, lay_out, keys)
