"""Files of predictions, written a batch at a time: csv and parquet with the same columns."""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslctl.evaluation.feature_files import import_pyarrow

PROBABILITY = "probability_"  # and the class, of several classes an image
_GROUP = 65_536  # rows of a row group of parquet


@dataclass(frozen=True)
class About:
    """What a file says of all its rows. columns: name -> str, int or float. origin: where its predictions come from, as JSON."""

    columns: dict[str, type]
    origin: dict[str, Any]


Writer = Callable[
    [dict[str, list]], None
]  # column -> values of some rows, None where there is none; others are left out


def columns_of(classes: list[str], *, several: bool, tiled: bool, labelled: bool, neighbours: int) -> dict[str, type]:
    """Returns the columns of a file: name -> str, int or float.

    classes: of the classifier; of several an image each has a column. tiled: rows have places in their images. labelled: the
    images have labels of their own. neighbours: how many labelled images are named in each row, the nearest first.
    """
    columns = {"name": str} | ({"top": int, "left": int} if tiled else {}) | ({"label": str} if labelled else {})
    columns |= {PROBABILITY + name: float for name in classes} if several else {"class": str, "probability": float}
    for number in range(1, neighbours + 1):
        columns |= {f"near_{number}": str, f"near_{number}_class": str, f"near_{number}_similarity": float}
    return columns | {"error": str}


@contextmanager
def comma_separated(path: Path, about: About) -> Iterator[Writer]:
    """Writes a header and a line a row: numbers with the nine digits that give a float32 back, nothing for None."""
    with path.open("w", newline="", encoding="utf-8") as opened:
        lines = csv.writer(opened)
        lines.writerow(about.columns)
        texts = {float: lambda value: f"{value:.9g}", int: str, str: str}

        def write(rows: dict[str, list]) -> None:
            parts = [
                ["" if value is None else texts[kind](value) for value in _values(rows, name)]
                for name, kind in about.columns.items()
            ]
            lines.writerows(zip(*parts, strict=True))

        yield write


@contextmanager
def parquet(path: Path, about: About) -> Iterator[Writer]:
    """Writes the same columns, null for None, with the origin in the metadata."""
    arrow, files = import_pyarrow("format=csv")
    types = {str: arrow.string(), int: arrow.int64(), float: arrow.float32()}
    origin = json.dumps(about.origin, ensure_ascii=False)
    schema = arrow.schema([(name, types[kind]) for name, kind in about.columns.items()], metadata={"predict": origin})
    waiting: list[Any] = []  # batches, until they fill a row group

    with path.open("wb") as opened, files.ParquetWriter(opened, schema) as writer:

        def flush() -> None:
            writer.write_table(arrow.Table.from_batches(waiting, schema), row_group_size=2**30)
            waiting.clear()

        def write(rows: dict[str, list]) -> None:
            columns = [arrow.array(_values(rows, field.name), field.type) for field in schema]
            waiting.append(arrow.record_batch(columns, schema=schema))
            if sum(map(len, waiting)) >= _GROUP:
                flush()

        yield write
        if waiting:
            flush()


def _values(rows: dict[str, list], column: str) -> list:
    """Returns a column of some rows: None in each where nothing is predicted of any of them."""
    return rows.get(column) or [None] * len(rows["name"])


def is_own(path: Path, kind: str) -> bool:
    """Tells whether a file is one of predictions, as the writer of its kind writes them."""
    if kind == "csv":
        try:
            with path.open(newline="", encoding="utf-8", errors="replace") as opened:
                header = next(csv.reader(opened), [])
        except csv.Error:  # of binary files
            return False
        middle = "probability" in header or any(name.startswith(PROBABILITY) for name in header)
        return middle and header[0] == "name" and header[-1] == "error"
    arrow, files = import_pyarrow("format=csv")
    try:
        return b"predict" in (files.read_schema(path).metadata or {})
    except (arrow.ArrowInvalid, OSError):
        return False


WRITERS: dict[str, Callable[[Path, About], AbstractContextManager[Writer]]] = {
    "csv": comma_separated,
    "parquet": parquet,
}
