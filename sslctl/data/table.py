"""A table of images: a CSV or Parquet file with a row an image, and which of its columns means what. Imports no torch."""

import csv
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslctl.errors import InputError, nearest, user_path

# What a column is taken for by its name, in any case and with spaces for _; an earlier name before a later one.
NAMES = {
    "path": (
        *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_file", "img"),
        *("img_path", "image_name", "image_filename"),
    ),
    "label": ("label", "labels", "class", "class_name", "target", "category"),
    "split": ("split", "set", "subset", "partition"),
    "group": (
        *("group", "group_id", "patient", "patient_id", "patientid", "subject", "subject_id", "slide", "slide_id"),
        *("case", "case_id"),
    ),
}
_SEPARATORS = ("|", ";")
AUTO = "auto"
_YES, _NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no", "")


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read. label: one, several of zeros and ones, or none. separator: between the labels of a
    cell, None where each has one."""

    path: str
    label: str | tuple[str, ...] | None
    split: str | None
    group: str | None
    separator: str | None = None

    def __str__(self) -> str:
        several = f"{len(self.label)} columns of 0 and 1" if isinstance(self.label, tuple) else self.label
        label = f"{several} (separated by {self.separator})" if self.separator else several
        parts = {"path": self.path, "label": label, "split": self.split, "group": self.group}
        return ", ".join(f"{role} from {name}" if name else f"no {role}" for role, name in parts.items())


@dataclass(frozen=True)
class Table:
    """columns: name -> the rows' values; text, of Parquet also numbers, lists of labels and None."""

    path: Path
    columns: dict[str, Sequence[Any]]

    def line(self, row: int) -> str:
        """Names a row in messages."""
        return f"{self.path} row {row + 1}"

    def texts(self, column: str) -> list[str]:
        """Returns a column's values as text; nothing is an empty one."""
        return [_text(value) for value in self.columns[column]]


def read_table(root: str | None) -> Table:
    """Reads the file that dataset.root names; it is kept while it does not change. Raises InputError."""
    if not root:
        raise InputError("dataset.root is not set: dataset.root=/path/to/images.csv")
    path = user_path(root)
    if not path.is_file():
        what = "a folder; dataset=csv takes a CSV or Parquet file" if path.is_dir() else "no such file"
        raise InputError(f"dataset.root={path}: {what}")
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(2)
def _read(path: Path, size: int, time: int) -> Table:
    columns = _read_parquet(path) if path.suffix.lower() in (".parquet", ".pq") else _read_csv(path)
    if not columns or not len(next(iter(columns.values()))):
        raise InputError(f"{path} has no rows")
    return Table(path, columns)


def _read_csv(path: Path) -> dict[str, list[str]]:
    """Reads a header and rows; between them stand commas, semicolons or tabs, whichever the header has most of."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            header = opened.readline()
            delimiter = max(",;\t", key=header.count)
            opened.seek(0)
            rows = [row for row in csv.reader(opened, delimiter=delimiter, strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV file in UTF-8: {error}") from error
    # A row that is longer or shorter than the header would shift its values into other columns without a word.
    names = [name.strip() for name in rows[0]] if rows else []
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path} has two columns {twice}")
    odd = next((number for number, row in enumerate(rows) if len(row) != len(names)), None)
    if odd is not None:
        raise InputError(f"{path} row {odd}: {len(rows[odd])} values, the header names {len(names)}")
    return {name: [row[number].strip() for row in rows[1:]] for number, name in enumerate(names)}


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: Parquet needs pyarrow: pip install 'sslctl[parquet]'") from None
    try:
        return pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is no Parquet file: {error}") from error


def choose_columns(table: Table, setting: Mapping[str, Any] | None, separator: str | None = AUTO) -> Columns:
    """Returns which columns mean what: as `setting` says ({path: …, label: …, split: …, group: …}, null for none), else by NAMES.

    separator: between the labels of a cell; "auto": | or ; where cells have one. Raises InputError.
    """
    if setting is not None and not isinstance(setting, Mapping):
        raise InputError(f"dataset.columns={setting}: expected {{path: …, label: …, split: …, group: …}}")
    # A misspelt role would leave its column to be found by name, which may find another.
    setting, there = dict(setting or {}), list(table.columns)
    other = next((role for role in setting if role not in NAMES), None)
    if other is not None:
        raise InputError(f"dataset.columns.{other}: expected {', '.join(NAMES)}{nearest(str(other), NAMES)}")
    # What is named holds; what is not is found by the usual names, and stands in the plan.
    chosen = {}
    for role, names in NAMES.items():
        if role not in setting:
            by_name = {re.sub(r"[ -]", "_", name.lower()): name for name in reversed(there)}
            chosen[role] = next((by_name[name] for name in names if name in by_name), None)
            continue
        value = setting[role]
        several = isinstance(value, list | tuple) and role == "label"
        if several and (not value or None in value):
            raise InputError(f"dataset.columns.label={list(value)}: expected names of columns")
        for name in value if several else [value]:
            if name is not None and str(name) not in there:
                raise InputError(
                    f"dataset.columns.{role}={name}: {table.path} has no such column; there are {', '.join(there[:12])}"
                    f"{', …' if len(there) > 12 else ''}{nearest(str(name), there)}"
                )
        chosen[role] = tuple(map(str, value)) if several else None if value is None else str(value)
    # Without labels, splits and groups a table still lists images; without paths it lists none.
    if chosen["path"] is None:
        raise InputError(
            f"{table.path}: no column is named as paths are ({', '.join(NAMES['path'][:4])}, …); it has"
            f" {', '.join(there[:12])}: dataset.columns={{path: COLUMN}}"
        )
    # A separator anywhere makes every cell one of several labels: that is looked for in all rows, not in the first few.
    if separator == AUTO:
        cells = table.columns[chosen["label"]] if isinstance(chosen["label"], str) else []
        texts = [cell for cell in cells if isinstance(cell, str)]
        separator = next((mark for mark in _SEPARATORS if any(mark in text for text in texts)), None)
    return Columns(**chosen, separator=separator if isinstance(chosen["label"], str) else None)


def labels_of(table: Table, columns: Columns) -> tuple[list[tuple[str, ...]], bool]:
    """Returns the labels of each row, none, one or several, and whether a row may have several."""
    if columns.label is None:
        return [()] * len(table.columns[columns.path]), False
    if isinstance(columns.label, tuple):
        marks = [_marks(table, name) for name in columns.label]
        return [
            tuple(n for n, mark in zip(columns.label, row, strict=True) if mark) for row in zip(*marks, strict=True)
        ], True
    cells = table.columns[columns.label]
    if any(isinstance(cell, list) for cell in cells):
        return [tuple(dict.fromkeys(map(_text, cell or ()))) for cell in cells], True
    if columns.separator:
        parts = [[part.strip() for part in _text(cell).split(columns.separator)] for cell in cells]
        return [tuple(dict.fromkeys(part for part in row if part)) for row in parts], True
    return [(text,) if (text := _text(cell)) else () for cell in cells], False


def _marks(table: Table, column: str) -> list[bool]:
    """Returns a column of zeros and ones. Raises InputError for anything else."""
    texts = [text.lower() for text in table.texts(column)]
    odd = next((row for row, text in enumerate(texts) if text not in (*_YES, *_NO)), None)
    if odd is not None:
        raise InputError(f"{table.line(odd)}: {column} is {texts[odd]}; a label of several is 0 or 1 in each row")
    return [text in _YES for text in texts]


def _text(value: Any) -> str:
    """Returns a value as text; nothing, also where a library means it by NaN, is an empty one."""
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
