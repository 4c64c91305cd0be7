"""Image files that cannot be read, and what stands in for them where dataset.on_error=skip lets training go on without them."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from sslctl.data.files import ImageError, read
from sslctl.data.layout import Layout
from sslctl.data.pixels import Reading
from sslctl.errors import InputError, user_path
from sslctl.runs.atomic import write_bytes, write_text

WHEN_READ = "when_read"  # of on_error, by sslctl predict alone: nothing stands in, reading such a file raises


def refuse_skipping(on_error: str, max_bad: float) -> None:
    """Raises InputError for values of dataset.on_error and dataset.max_bad that say nothing."""
    if on_error not in ("raise", "skip", WHEN_READ):
        raise InputError(f"dataset.on_error={on_error}: expected raise or skip")
    if not isinstance(max_bad, int | float) or max_bad < 0:
        raise InputError(f"dataset.max_bad={max_bad}: expected a number of images, or a share below 1")


def listed_rows(paths: list[str], skip: str | None) -> list[int]:
    """Returns the rows of files that a list names, a path a line, seen from the list's folder; none where there is no list.

    Raises InputError for a list that cannot be read.
    """
    if skip is None:
        return []
    file = user_path(skip)
    try:
        lines = file.read_text(errors="surrogateescape").splitlines()
    except OSError as error:
        raise InputError(f"dataset.skip={file}: {error.strerror}") from error
    named = {os.path.abspath(file.parent / line.strip()) for line in lines if line.strip()}
    return [row for row, path in enumerate(paths) if os.path.abspath(path) in named]


def write_list(file: Path, paths: Sequence[str]) -> None:
    """Writes the list that `listed_rows` reads."""
    folder = os.path.abspath(file.parent)
    lines = "".join(f"{os.path.relpath(path, folder)}\n" for path in paths)
    write_bytes(file, lines.encode(errors="surrogateescape"))


def with_stand_ins(layout: Layout, bad: list[int], max_bad: float) -> Layout:
    """Returns a layout with others in the place of its bad rows, and a warning that names them.

    A bad one's row, its number and place in every epoch, stays: it has image and label of the next that can be read. max_bad:
    how many may be bad, or which share of them.
    """
    if not bad:
        return layout
    # Few bad files are an accident; many say that the folder or the way of reading is wrong, and training on would hide it.
    count, examples = len(layout.names), refuse_too_many(layout.names, bad, max_bad, layout.listing.base)
    # Numbers of rows decide every draw of an epoch, so that no row may vanish: another image takes its place, labels and all.
    stand_ins = next_readable(count, bad)
    rows = [stand_ins.get(row, row) for row in range(count)]
    own = {"labels": layout.labels, "targets": layout.targets, "groups": layout.groups}
    own = {name: values and [values[row] for row in rows] for name, values in own.items()}
    warning = (
        f"{len(bad):,} of {count:,} images cannot be read, or are to be skipped, others stand in for them: {examples}"
    )
    return replace(layout, **own, stand_ins=stand_ins, warnings=[*layout.warnings, warning])


def refuse_too_many(names: Sequence[str], bad: list[int], max_bad: float, where: Path) -> str:
    """Raises InputError where more rows are bad than dataset.max_bad allows; returns the names of the first few."""
    first = [names[row] for row in bad[:3]]
    examples = ", ".join(first) + (", …" if len(bad) > 3 else "")
    allowed = int(max_bad if max_bad >= 1 else max_bad * len(names))
    if len(bad) > allowed or len(bad) == len(names) > 0:
        raise InputError(
            f"{len(bad):,} of {len(names):,} images in {where} cannot be read ({examples}), dataset.max_bad={max_bad:g} allows"
            f" {allowed:,}",
            advice=[f"dataset.max_bad={len(bad)}"] if len(bad) < len(names) else [],
        )
    return examples


def next_readable(count: int, bad: list[int]) -> dict[int, int]:
    """Returns bad row -> the next row, around the end, that is not."""
    unread, rows = set(bad), {}
    for row in bad:
        rows[row] = (row + 1) % count
        while rows[row] in unread:
            rows[row] = (rows[row] + 1) % count
    return rows


def unreadable_rows(paths: list[str], reading: Reading, cache: Path) -> list[int]:
    """Returns the rows of files that cannot be decoded; all are, once for files of these sizes and times.

    cache: the folder where the answer is kept.
    """
    # To decode all files takes as long as an epoch: the answer is kept under what it depends on.
    mark = hashlib.blake2b(f"{reading.channels} {reading.bands}\n".encode(), digest_size=16)
    for path in paths:
        try:
            stat = os.stat(path)
            mark.update(f"{path}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        except OSError:  # a link to nothing
            mark.update(f"{path}\tmissing\n".encode("utf-8", "surrogateescape"))
    answer = cache / f"{mark.hexdigest()}.json"
    try:
        return [row for row in json.loads(answer.read_text()) if type(row) is int and 0 <= row < len(paths)]
    except (OSError, ValueError, TypeError):  # never asked before, or damaged
        pass

    # Headers are not enough: most damaged files end in the middle of their pixels.

    def is_bad(path: str) -> bool:
        try:
            read(path, reading)
        except ImageError:
            return True
        return False

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for row, bad in enumerate(pool.map(is_bad, paths, chunksize=64)) if bad]
    cache.mkdir(parents=True, exist_ok=True)
    write_text(answer, json.dumps(rows))
    return rows
