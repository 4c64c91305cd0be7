"""What a table of images means for training: the rows of a split, their classes, and groups that lie in one split alone."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sslctl.data.held_out import held_out_groups, held_out_names
from sslctl.data.layout import Layout, NoTestSplit, split_kind
from sslctl.data.listing import Listing
from sslctl.data.table import AUTO, Columns, Table, choose_columns, labels_of, read_table
from sslctl.errors import InputError, nearest


def table_rows(
    split: str,
    root: str | None,
    columns: Mapping[str, Any] | None = None,
    splits: Mapping[str, Any] | None = None,
    separator: str | None = AUTO,
) -> Layout:
    """Lays out the rows of a split. columns, separator: see `choose_columns`. splits: the values of the split's column, one or a
    list, that "train" and "test" have. Without such a column a fifth is held out, whole groups of it. split "all": every row.

    Raises InputError, also where a group lies in both splits.
    """
    table = read_table(root)
    chosen = choose_columns(table, columns, separator)
    paths, (labels, several) = table.texts(chosen.path), labels_of(table, chosen)
    groups = table.texts(chosen.group) if chosen.group else None
    if groups:  # a row without one is a group of its own
        groups = [group or f"row {row + 1}" for row, group in enumerate(groups)]
    # Which rows, and where they come from.
    if split == "all":
        split_of, left_out, groups, origin = ["all"] * len(paths), {}, None, f"all rows of {table.path}"
    elif chosen.split:
        split_of, left_out = _split_column(table, chosen, splits)
        origin = f"rows of {table.path} whose {chosen.split} is {_values(table, chosen, split_of, split)}"
    else:
        if splits:
            raise InputError(f"dataset.splits: {table.path} has no column of splits; dataset.columns={{split: COLUMN}}")
        split_of, left_out = _hold_out(paths, labels, groups), {}
        part = "a fixed fifth" if split == "test" else "four fixed fifths"
        by = f"whole groups of {chosen.group}" if groups else "by the hash of the paths"
        origin = f"{part} of the rows of {table.path}, {by}"
    origin += f"; {chosen}: dataset.columns={{path: …, label: …, split: …, group: …}} names others"
    # Before anything is read: a split without rows, a group on both sides, a file that is not there.
    rows = [row for row, own in enumerate(split_of) if own == split]
    if not rows and split == "test":
        raise NoTestSplit(
            f"{table.path} has no rows to test on: dataset.splits={{train: VALUE, test: VALUE}} names values of the"
            " split's column, dataset.columns={split: null} holds out a fifth, eval_dataset=… names other images"
        )
    if not rows:
        raise InputError(f"{table.path} has too few rows for a {split} split of a fifth")
    if groups:
        _refuse_shared(table, chosen, groups, split_of)
    _refuse_missing(table, [paths[row] for row in rows], rows)
    # Labels are numbers of the training rows' classes.
    classes = _classes({label for row, own in enumerate(split_of) if own in ("train", "all") for label in labels[row]})
    number = {name: i for i, name in enumerate(classes)}
    for row in rows:
        unknown = next((label for label in labels[row] if label not in number), None)
        if unknown is not None:
            raise InputError(f"{table.line(row)}: class {unknown} has no training row{nearest(unknown, classes)}")
    own = [tuple(number[label] for label in labels[row]) for row in rows]
    return Layout(
        Listing(table.path.parent, [paths[row] for row in rows], left_out),
        [paths[row] for row in rows],
        [-1 if several or not numbers else numbers[0] for numbers in own],
        classes,
        origin,
        _doubts(table, paths, rows, own, several, classes) if split == "train" else [],
        targets=own if several else None,
        groups=[groups[row] for row in rows] if groups else None,
        labels_apart=True,
    )


def _split_column(
    table: Table, columns: Columns, splits: Mapping[str, Any] | None
) -> tuple[list[str | None], dict[str, int]]:
    """Returns each row's split, None for one that is in neither, and how many of those have which value."""
    values = table.texts(columns.split)
    counts = Counter(values)
    if splits:
        other = next((name for name in splits if name not in ("train", "test")), None)
        if other is not None or "train" not in splits:
            raise InputError(
                f"dataset.splits={dict(splits)}: expected {{train: VALUE, test: VALUE}}, or lists of values"
            )
        split_of_value = {}
        for kind, own in splits.items():
            for value in map(str, own if isinstance(own, Sequence) and not isinstance(own, str) else [own]):
                if value not in counts:
                    raise InputError(
                        f"dataset.splits.{kind}={value}: no row of {table.path} has this {columns.split}; there are"
                        f" {_listed(counts)}{nearest(value, counts)}"
                    )
                split_of_value[value] = kind
    else:
        kinds = {value: split_kind(value) for value in counts}
        test = "test" if "test" in kinds.values() else "val"
        split_of_value = {
            value: "train" if kind == "train" else "test" for value, kind in kinds.items() if kind in ("train", test)
        }
        if "train" not in split_of_value.values():
            raise InputError(
                f"{table.path}: no {columns.split} is called train; there are {_listed(counts)}: dataset.splits={{train:"
                " VALUE, test: VALUE} names values, dataset.columns={split: null} holds out a fifth"
            )
    left_out = {
        f"rows whose {columns.split} is {value or 'empty'}": count
        for value, count in counts.items()
        if value not in split_of_value
    }
    return [split_of_value.get(value) for value in values], left_out


def _values(table: Table, columns: Columns, split_of: list[str | None], split: str) -> str:
    own = {value: None for value, kind in zip(table.texts(columns.split), split_of, strict=True) if kind == split}
    return " or ".join(own)


def _hold_out(paths: list[str], labels: list[tuple[str, ...]], groups: list[str] | None) -> list[str]:
    number = {label: i for i, label in enumerate(sorted({label for row in labels for label in row}))}
    classes = [[number[label] for label in row] for row in labels]
    is_test = held_out_groups(groups, classes) if groups else held_out_names(paths, classes)
    return ["test" if test else "train" for test in is_test]


def _refuse_shared(table: Table, columns: Columns, groups: list[str], split_of: list[str | None]) -> None:
    """Raises InputError where images of a group are trained on and others of it judged by."""
    first: dict[str, dict[str, int]] = {}
    for row, (group, split) in enumerate(zip(groups, split_of, strict=True)):
        if split:
            first.setdefault(group, {}).setdefault(split, row)
    shared = {group: rows for group, rows in first.items() if len(rows) > 1}
    if shared:
        group, rows = next(iter(shared.items()))
        paths = table.columns[columns.path]
        raise InputError(
            f"{table.path}: {len(shared):,} of {len(first):,} groups lie in both splits, {columns.group}={group} with"
            f" {paths[rows['train']]} to train on and {paths[rows['test']]} to test: dataset.columns={{split: null}} holds"
            " whole groups out, dataset.columns={group: null} takes the splits as they are"
        )


def _refuse_missing(table: Table, names: list[str], rows: list[int]) -> None:
    # All are looked for: that one of many is missing and that the folder is another one are different mistakes.
    missing = [i for i, name in enumerate(names) if not os.path.exists(os.path.join(table.path.parent, name))]
    if missing:
        first = missing[0]
        raise InputError(
            f"{table.line(rows[first])}: no file {names[first] or '(empty)'} in {table.path.parent}; {len(missing):,} of"
            f" {len(names):,} are missing"
        )


def _classes(labels: set[str]) -> tuple[str, ...]:
    """Returns class names in order: that of numbers where all are whole ones."""
    return tuple(sorted(labels, key=(lambda name: (int(name), name)) if all(map(str.isdecimal, labels)) else None))


def _doubts(
    table: Table, paths: list[str], rows: list[int], own: list[tuple[int, ...]], several: bool, classes: tuple[str, ...]
) -> list[str]:
    """Says what of the rows looks as if something else was meant."""
    doubts = []
    twice = len(rows) - len({paths[row] for row in rows})
    if twice:
        doubts.append(f"{twice:,} rows of {table.path.name} name an image that another row names too")
    without = sum(not numbers for numbers in own)
    if without and classes and not several:
        doubts.append(f"{without:,} of {len(rows):,} training images have no label: they are trained on, not judged by")
    if len(classes) == 1:
        doubts.append(
            f"one class ({classes[0]}): whatever is asked, every answer is right; dataset.columns={{label: COLUMN}}"
        )
    return doubts


def _listed(counts: Mapping[str, int]) -> str:
    names = [name or "(empty)" for name in counts]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
