"""Image files that cannot be read, and what stands in for them where dataset.on_error=skip lets training go on without them."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from sslctl.data.files import ImageError, read
from sslctl.data.layout import Layout
from sslctl.data.pixels import Reading
from sslctl.errors import InputError
from sslctl.runs.atomic import write_text


def refuse_skipping(on_error: str, max_bad: float) -> None:
    """Raises InputError for values of dataset.on_error and dataset.max_bad that say nothing."""
    if on_error not in ("raise", "skip"):
        raise InputError(f"dataset.on_error={on_error}: expected raise or skip")
    if not isinstance(max_bad, int | float) or max_bad < 0:
        raise InputError(f"dataset.max_bad={max_bad}: expected a number of images, or a share below 1")


def with_stand_ins(layout: Layout, bad: list[int], max_bad: float) -> Layout:
    """Returns a layout with others in the place of its bad rows, and a warning that names them.

    A bad one's row, its number and place in every epoch, stays: it has image and label of the next that can be read. max_bad:
    how many may be bad, or which share of them.
    """
    if not bad:
        return layout
    names, count = [layout.names[row] for row in bad], len(layout.names)
    allowed = int(max_bad if max_bad >= 1 else max_bad * count)
    listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    if len(bad) > allowed or len(bad) == count:
        raise InputError(
            f"{len(bad):,} of {count:,} images in {layout.listing.base} cannot be read ({listed}), dataset.max_bad="
            f"{max_bad:g} allows {allowed:,}"
        )
    stand_ins = _next_readable(count, bad)
    rows = [stand_ins.get(row, row) for row in range(count)]
    own = {"labels": layout.labels, "targets": layout.targets, "groups": layout.groups}
    own = {name: values and [values[row] for row in rows] for name, values in own.items()}
    warning = f"{len(bad):,} of {count:,} images cannot be read, others stand in for them: {listed}"
    return replace(layout, **own, stand_ins=stand_ins, warnings=[*layout.warnings, warning])


def _next_readable(count: int, bad: list[int]) -> dict[int, int]:
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
    except (OSError, ValueError, TypeError):
        pass

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
