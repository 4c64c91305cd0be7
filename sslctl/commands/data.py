"""sslctl data: what a folder of images holds, before any training."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sslctl.config.command_line import Prepared, as_typed, prepare, shell_words, task_overrides, with_plain_paths
from sslctl.config.targets import target_of
from sslctl.data import sources
from sslctl.data.audit import Audit, audit, headers_of
from sslctl.data.description import Description, describe, refuse_bands
from sslctl.data.layout import Layout, NoTestSplit, base_name, class_folders, without_labels
from sslctl.data.listing import existing_folder
from sslctl.data.pixels import Reading
from sslctl.data.unreadable import write_list
from sslctl.errors import InputError, say, user_path
from sslctl.factory.from_config import build_source
from sslctl.report.data_page import Suggestion, data_page
from sslctl.runs.atomic import make_folder_of, refuse_others_file, why_unwritable, write_text
from sslctl.training.progress import Progress
from sslctl.training.suggestion import measure, suggest

_LISTED = 5  # files and groups of them
_CONTENTS = {"format", "splits", "unreadable", "copies", "near"}  # of what out= holds


def data(config: Any) -> None:
    """Looks at every image of a folder, and says what would go wrong, with the key that answers it."""
    node = config.dataset
    target = target_of(node, "dataset")
    if target not in (sources.folder, sources.imagefolder):
        raise InputError(
            "sslctl data looks at folders of images: dataset=folder or dataset=imagefolder, dataset.root=FOLDER"
        )
    outputs = files_for(config)

    # Every file once; what of them is said on the terminal, on the page and in the .json comes from this.
    layouts = lay_out(node, labelled=target is sources.imagefolder or node.label is not None)
    total = sum(len(layout.names) for layout in layouts.values())
    with Progress(total, transient=True) as progress:
        seen = audit(layouts, lambda done: progress.update(done, f"{done:,} of {total:,} images"))
    described = {split: described_split(seen, split, node) for split in layouts}
    skipping = skip_list(seen, outputs)
    say(*lines_of(seen, described, shell_words(skipping)))

    # The command that goes on, and what a few of its steps take here.
    suggestion = first_command(config, seen, described["train"], skipping)
    say(f"next        {suggestion.command}", *(f"            {line}" for line in suggestion.measured))

    # The page shows images, so a source reads them once more; bad ones have stand-ins there, tiles cannot.
    for out in outputs:
        if out.suffix == ".json":
            write_text(out, json.dumps(as_json(seen), indent=1) + "\n")
        else:
            lenient = {} if node.get("tiles") is not None else {"on_error": "skip", "max_bad": total}
            source = build_source(OmegaConf.merge(node, {**lenient, "memory_gb": 0}), "train")
            write_text(out, data_page(seen, described, source, base_name(node.root), suggestion, shell_words(skipping)))
        say(f"{out}: all of it")


def skip_list(seen: Audit, outputs: list[Path]) -> list[str]:
    """Writes the files that cannot be read beside the first output, as a list; returns the words that let others stand in."""
    bad = [look.path for look in seen.unreadable]
    if not bad:
        return []
    if not outputs:
        return ["dataset.on_error=skip", f"dataset.max_bad={len(bad)}"]
    file = outputs[0].with_suffix(".skip.txt")
    write_list(file, bad)
    return [f"dataset.skip={file}"]


def files_for(config: Any) -> list[Path]:
    """Returns where the page and the .json go: out=, a name or several; else a page in the current directory, unless that lies
    in the folder of images. Raises InputError for other names, or places that cannot be written."""
    if config.out is None:
        folder, page = (
            existing_folder(config.dataset.root).resolve(),
            Path(f"data-{base_name(config.dataset.root)}.html"),
        )
        inside = page.resolve().is_relative_to(folder)
        if inside or why_unwritable(page.resolve().parent):
            say(
                f"no page: the current directory {'is among the images' if inside else 'cannot be written'}; out=FILE.html"
            )
            return []
        return [writable(page)]
    outputs = [user_path(word) for word in ([config.out] if isinstance(config.out, str) else config.out)]
    for out in outputs:
        if out.suffix not in (".json", ".html"):
            raise InputError(f"out={out}: expected a .html or a .json file")
        writable(out)
    return outputs


def first_command(config: Any, seen: Audit, described: Description, skipping: list[str]) -> Suggestion:
    """Returns the command that trains on the folder, and what its first steps take, measured for `seconds` at most; 0: not."""
    overrides = [word for word in task_overrides() if not word.startswith(("out=", "seed=", "seconds="))]
    overrides = overrides if any(word.startswith("dataset=") for word in overrides) else ["dataset=folder", *overrides]
    overrides += prepare(skipping).overrides
    images, (size, _) = len(seen.layouts["train"].names), described.sizes.most_common(1)[0]
    words = suggest(
        [with_plain_paths(as_typed(word)) for word in overrides], images, size, Prepared(overrides=overrides)
    )
    measured = measure(words, config.seconds) if config.seconds else []
    return Suggestion(shell_words(words), f"{images:,} images, most of {size[0]}×{size[1]}", measured)


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


def described_split(seen: Audit, split: str, node: Any) -> Description:
    """Describes a split by what its readable images show. Raises InputError where none can be read."""
    layout, looks = seen.layouts[split], seen.looks[split]
    headers = headers_of(looks)
    if not headers.looked_at:
        raise InputError(f"none of the {len(looks):,} images in {layout.listing.base} can be read: {looks[0].error}")
    size = node.image_size or headers.sizes.most_common(1)[0][0][0]
    reading = Reading(node.channels, None, None if node.get("bands") is None else tuple(node.bands))
    refuse_bands(headers.kinds, reading)
    return describe(layout, headers, None, reading, size)


def lines_of(seen: Audit, described: dict[str, Description], skipping: str) -> list[str]:
    """Returns what is printed: a line a subject, and what can be done about it. skipping: the words that let bad images be."""
    lines = []
    for split, description in described.items():
        looks, layout = seen.looks[split], seen.layouts[split]
        bad = sum(bool(look.error) for look in looks)
        origin, sizes, *left_out = description.lines()
        lines += [f"{split:<12}{len(looks):,} images{f', {bad:,} of them cannot be read' if bad else ''}: {origin}"]
        lines += [f"            {line}" for line in (sizes.partition(", 0–255")[0], *left_out)]
        lines += _balance(layout) if layout.classes else []
        lines += [f"doubt       {warning}" for warning in description.warnings]
    bad = seen.unreadable
    lines += [f"unreadable  {look.path}: {look.error}" for look in bad[:_LISTED]]
    if bad:
        more = f"{len(bad) - _LISTED:,} others; " if len(bad) > _LISTED else ""
        lines.append(f"            {more}{skipping} lets others stand in for them")
    for name, groups in (("copies", seen.copies), ("near", seen.near)):
        lines.append(f"{name:<12}{_amount(groups)}")
        lines += [
            f"            {' = '.join(group[:3])}{' = …' if len(group) > 3 else ''}" for group in groups[:_LISTED]
        ]
    if "test" in seen.layouts:
        lines.append(f"shared      {seen.shared():,} groups of alike images lie in both splits")
    return lines


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


def writable(out: Path) -> Path:
    """Returns where the audit goes. Raises InputError for another file that is there, or a folder that cannot be made."""
    make_folder_of(out)
    refuse_others_file(out, "data", _is_own)
    return out


def _is_own(path: Path) -> bool:
    if path.suffix == ".html":
        with path.open("rb") as opened:
            return b"sslctl data</title>" in opened.read(4096)
    try:
        return json.loads(path.read_text()).keys() >= _CONTENTS
    except (ValueError, AttributeError, RecursionError):
        return False


def as_json(seen: Audit) -> dict[str, Any]:
    """Returns plain values of all that was seen."""
    splits = {
        split: {
            "folder": str(layout.listing.base),
            "images": len(layout.names),
            "classes": {name: layout.labels.count(number) for number, name in enumerate(layout.classes)},
            "left_out": layout.listing.left_out,
            "doubts": layout.warnings,
        }
        for split, layout in seen.layouts.items()
    }
    unreadable = {look.path: look.error for look in seen.unreadable}
    return {"format": 1, "splits": splits, "unreadable": unreadable, "copies": seen.copies, "near": seen.near}
