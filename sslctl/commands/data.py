"""sslctl data: what a folder of images holds, before any training."""

import json
from collections import Counter
from typing import Any

from sslctl.config.command_line import as_typed, shell_words, task_overrides, with_plain_paths
from sslctl.config.targets import target_of
from sslctl.data import sources
from sslctl.data.audit import Audit, audit, headers_of
from sslctl.data.description import describe
from sslctl.data.layout import Layout, NoTestSplit, class_folders, without_labels
from sslctl.data.pixels import Reading
from sslctl.errors import InputError, shown, user_path
from sslctl.runs.atomic import make_folder_of, write_text
from sslctl.training.progress import Progress

_LISTED = 5  # files and groups of them


def data(config: Any) -> None:
    """Looks at every image of a folder, and says what would go wrong, with the key that answers it."""
    node = config.dataset
    target = target_of(node, "dataset")
    if target not in (sources.folder, sources.imagefolder):
        raise InputError(
            "sslctl data looks at folders of images: dataset=folder or dataset=imagefolder, dataset.root=FOLDER"
        )
    out = user_path(config.out) if config.out else None
    if out:
        make_folder_of(out)
    layouts = lay_out(node, labelled=target is sources.imagefolder or node.label is not None)
    result = None
    total = sum(len(layout.names) for layout in layouts.values())
    with Progress(total, transient=True) as progress:
        for step in audit(layouts):
            if isinstance(step, Audit):
                result = step
            else:
                progress.update(step, f"{step:,} of {total:,} images")
    print("\n".join(map(shown, lines_of(result, node))), flush=True)
    if out:
        write_text(out, json.dumps(as_json(result), indent=1) + "\n")
        print(f"{out}: all of it")


def lay_out(node: Any, *, labelled: bool) -> dict[str, Layout]:
    """Returns the splits of the folder, "train" and perhaps "test"."""
    if not labelled:
        return {"train": without_labels(node.root, node.splits)}
    layouts = {"train": class_folders("train", node.root, node.splits, node.label)}
    try:
        layouts["test"] = class_folders("test", node.root, node.splits, node.label)
    except NoTestSplit as error:
        layouts["train"].warnings.append(str(error))
    return layouts


def lines_of(result: Audit, node: Any) -> list[str]:
    """Returns what is printed: a line a subject, and what can be done about it."""
    lines = []
    for split, layout in result.layouts.items():
        looks = result.looks[split]
        headers, bad = headers_of(looks), sum(bool(look.error) for look in looks)
        if not headers.looked_at:
            raise InputError(
                f"none of the {len(looks):,} images in {layout.listing.base} can be read: {looks[0].error}"
            )
        described = describe(
            layout, headers, None, Reading(node.channels), node.image_size or headers.sizes.most_common(1)[0][0][0]
        )
        origin, sizes, *left_out = described.lines()
        lines += [f"{split:<12}{len(looks):,} images{f', {bad:,} of them cannot be read' if bad else ''}: {origin}"]
        lines += [f"            {line}" for line in (sizes.partition(", 0–255")[0], *left_out)]
        if layout.classes:
            lines += _balance(layout)
        lines += [f"doubt       {warning}" for warning in described.warnings]
    bad = result.unreadable
    lines += [f"unreadable  {look.path}: {look.error}" for look in bad[:_LISTED]]
    if bad:
        more = f"{len(bad) - _LISTED:,} others; " if len(bad) > _LISTED else ""
        lines.append(
            f"            {more}dataset.on_error=skip dataset.max_bad={len(bad)} lets others stand in for them"
        )
    for name, groups in (("copies", result.copies), ("near", result.near)):
        lines.append(f"{name:<12}{_amount(groups)}")
        lines += [
            f"            {' = '.join(group[:3])}{' = …' if len(group) > 3 else ''}" for group in groups[:_LISTED]
        ]
    if "test" in result.layouts:
        lines.append(f"shared      {result.shared():,} groups of alike images lie in both splits")
    given = [with_plain_paths(as_typed(word)) for word in task_overrides() if not word.startswith(("out=", "seed="))]
    words = shell_words(["sslctl", "pretrain", *([] if "dataset" in _keys(given) else ["dataset=folder"]), *given])
    lines.append(f"next        {words} plan_only=true")
    lines.append("            says time, memory and all defaults; without plan_only=true it trains")
    return lines


def _keys(overrides: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in overrides]


def _balance(layout: Layout) -> list[str]:
    """Returns a line for each of the largest and smallest classes, with a bar as long as it is large."""
    counts = Counter(layout.labels).most_common()
    shown_ = counts if len(counts) <= 2 * _LISTED else [*counts[:_LISTED], *counts[-_LISTED:]]
    width = max(len(layout.classes[label]) for label, _ in shown_)
    bars = [
        f"            {layout.classes[label]:<{width}} {count:>7,} {'█' * max(1, round(30 * count / counts[0][1]))}"
        for label, count in shown_
    ]
    return (
        [*bars[:_LISTED], f"            … {len(counts) - 2 * _LISTED} others", *bars[_LISTED:]]
        if len(counts) > 2 * _LISTED
        else bars
    )


def _amount(groups: list[list[str]]) -> str:
    return f"{len(groups):,} groups, {sum(map(len, groups)) - len(groups):,} images too many" if groups else "none"


def as_json(result: Audit) -> dict[str, Any]:
    """Returns plain values of all that was seen."""
    splits = {
        split: {
            "folder": str(layout.listing.base),
            "images": len(layout.names),
            "classes": {name: layout.labels.count(number) for number, name in enumerate(layout.classes)},
            "left_out": layout.listing.left_out,
            "doubts": layout.warnings,
        }
        for split, layout in result.layouts.items()
    }
    unreadable = {look.path: look.error for look in result.unreadable}
    return {"format": 1, "splits": splits, "unreadable": unreadable, "copies": result.copies, "near": result.near}
