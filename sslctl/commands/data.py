"""sslctl data: what a folder, table or pack of images holds, before any training."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from sslctl.config.command_line import Prepared, as_typed, prepare, shell_words, task_overrides, with_plain_paths
from sslctl.config.targets import target_of
from sslctl.data import packed, sources, tables
from sslctl.data.audit import Audit, audit, headers_of, look_at, look_at_header
from sslctl.data.description import Description, describe, refuse_bands
from sslctl.data.encoded import ImageFile
from sslctl.data.layout import Layout, NoTestSplit, base_name, class_folders, without_labels
from sslctl.data.listing import existing_folder
from sslctl.data.pixels import Reading
from sslctl.data.source import Source
from sslctl.data.table_layout import table_rows
from sslctl.data.tiles import Tiling, count_tiles
from sslctl.data.unreadable import write_list
from sslctl.errors import InputError, say, user_path
from sslctl.factory.from_config import build_source
from sslctl.ops.image_size import image_size_of
from sslctl.report.data_page import Suggestion, data_page
from sslctl.runs.atomic import make_folder_of, refuse_others_file, why_unwritable, write_text
from sslctl.training.progress import Progress
from sslctl.training.suggestion import measure, suggest

_LISTED = 5  # files and groups of them
_CONTENTS = {"format", "splits", "unreadable", "copies", "near"}  # of what out= holds


def data(config: Any) -> None:
    """Looks at every image of a dataset of files, and says what would go wrong, with the key that answers it."""
    node = config.dataset
    if target_of(node, "dataset") not in (sources.folder, sources.imagefolder, tables.csv, packed.hf):
        raise InputError(
            "sslctl data looks at images: dataset=folder or dataset=imagefolder, dataset.root=FOLDER; dataset=csv,"
            " dataset.root=TABLE; dataset=hf, dataset.root=PACK"
        )

    # Where the page goes is settled first: a name that cannot be written is not found out after an hour of decoding.
    outputs = files_for(config)

    # Every file once; what of them is said on the terminal, on the page and in the .json comes from this.
    layouts, images = lay_out(node)
    total, look = sum(map(len, images.values())), look_at_header if is_tiled(node) else look_at
    with Progress(total, transient=True) as progress:
        seen = audit(layouts, images, lambda done: progress.update(done, f"{done:,} of {total:,} images"), look_at=look)
    described = {split: described_split(seen, split, node) for split in layouts}
    skipping = skip_list(seen, outputs, node)
    say(*lines_of(seen, described, shell_words(skipping)))

    # The command that goes on, and what a few of its steps take here.
    suggestion = first_command(config, seen, described["train"], skipping)
    say(f"next        {suggestion.command}", *(f"            {line}" for line in suggestion.measured))

    # The page shows pictures, for which it opens images once more; the .json is what was seen and no more.
    for out in outputs:
        if out.suffix == ".json":
            write_text(out, json.dumps(as_json(seen), indent=1) + "\n")
        elif (source := shown_images(seen, node)) is None:
            say("no page: tiles of images that cannot be read have no stand-ins")
            continue
        else:
            write_text(out, data_page(seen, described, source, base_name(node.root), suggestion, shell_words(skipping)))
        say(f"{out}: all of it")


def is_tiled(node: Any) -> bool:
    """Tells whether the samples are tiles of the images."""
    return node.get("tiles") is not None


def shown_images(seen: Audit, node: Any) -> Source | None:
    """Returns the training images as a source, which reads them once more: bad ones have stand-ins, or are left out of a pack.
    Tiles have neither: None where one is bad."""
    if is_tiled(node) and seen.unreadable:
        return None
    lenient = {"on_error": "skip", "max_bad": len(seen.looks["train"])} if stands_in(node) else {}
    source = build_source(OmegaConf.merge(node, {**lenient, "memory_gb": 0}), "train")
    if lenient or is_tiled(node):
        return source
    return source.subset(torch.tensor([row for row, look in enumerate(seen.looks["train"]) if not look.error]))


def stands_in(node: Any) -> bool:
    """Tells whether images can stand in for others that cannot be read: those of files, but not their tiles."""
    return "on_error" in node and not is_tiled(node)


def skip_list(seen: Audit, outputs: list[Path], node: Any) -> list[str]:
    """Writes the files that cannot be read beside the first output, as a list; returns the words that let others stand in."""
    bad = [look.path for look in seen.unreadable]
    if not bad or not stands_in(node):
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
        root = config.dataset.root
        is_table = bool(root) and user_path(root).is_file()  # which names its images: a page beside them is none
        folder, page = None if is_table else existing_folder(root).resolve(), Path(f"data-{base_name(root)}.html")
        inside = folder is not None and page.resolve().is_relative_to(folder)
        if inside or why_unwritable(page.resolve().parent):
            say(
                f"no page: the current directory {'is among the images' if inside else 'cannot be written'}; out=FILE.html"
            )
            return []
        return [writable(page)]
    outputs = [user_path(word) for word in (config.out if OmegaConf.is_list(config.out) else [config.out])]
    for out in outputs:
        if out.suffix not in (".json", ".html"):
            raise InputError(f"out={out}: expected a .html or a .json file")
        writable(out)
    return outputs


def first_command(config: Any, seen: Audit, described: Description, skipping: list[str]) -> Suggestion:
    """Returns the command that trains on the folder, and what its first steps take, measured for `seconds` at most; 0: not."""
    # The words of this command, without its own keys, name the same images to pretrain.
    overrides = [word for word in task_overrides() if not word.startswith(("out=", "seed=", "seconds="))]
    overrides = overrides if any(word.startswith("dataset=") for word in overrides) else ["dataset=folder", *overrides]
    overrides += prepare(skipping).overrides

    # What a step takes depends on how many samples there are and on their size, which are tiles' where images are cut.
    count, kind, (size, _) = len(seen.layouts["train"].names), "images, most", described.sizes.most_common(1)[0]
    if is_tiled(config.dataset):
        tiling, kind = Tiling.of(config.dataset.tiles), "tiles"
        size = (tiling.size, tiling.size)
        count = count_tiles([look.path for look in seen.looks["train"] if not look.error], tiling)
    words = suggest(
        [with_plain_paths(as_typed(word)) for word in overrides], count, size, Prepared(overrides=overrides)
    )
    measured = measure(words, config.seconds) if config.seconds else []
    return Suggestion(shell_words(words), f"{count:,} {kind} of {size[0]}×{size[1]}", measured)


def lay_out(node: Any) -> tuple[dict[str, Layout], dict[str, Sequence[ImageFile]]]:
    """Returns the splits, "train" and perhaps "test", and the images of each."""
    target, packs = target_of(node, "dataset"), {}

    def of_pack(split: str) -> Layout:
        layout, packs[split] = packed.packed_files(split, node.root, node.columns, node.splits)
        return layout

    if target is packed.hf:
        layouts = _splits_of(of_pack)
    elif target is tables.csv:
        layouts = _splits_of(lambda split: table_rows(split, node.root, node.columns, node.splits, node.separator))
    elif target is sources.imagefolder or node.label is not None:
        layouts = _splits_of(lambda split: class_folders(split, node.root, node.splits, node.label))
    else:
        layouts = {"train": without_labels(node.root, node.splits)}
    return layouts, packs or {split: layout.paths() for split, layout in layouts.items()}


def _splits_of(lay_out_split: Callable[[str], Layout]) -> dict[str, Layout]:
    """Lays out the training split and, where there is one, the test split; that there is none is a doubt."""
    layouts = {"train": lay_out_split("train")}
    try:
        layouts["test"] = lay_out_split("test")
    except NoTestSplit as error:
        layouts["train"].warnings.append(str(error))
    return layouts


def described_split(seen: Audit, split: str, node: Any) -> Description:
    """Describes a split by what its readable images show. Raises InputError where none can be read."""
    layout, looks = seen.layouts[split], seen.looks[split]
    headers = headers_of(looks)
    if not headers.looked_at:
        raise InputError(f"none of the {len(looks):,} images in {layout.listing.base} can be read: {looks[0].error}")
    asked = node.image_size
    size = image_size_of(asked, "dataset.image_size") if asked else headers.sizes.most_common(1)[0][0][0]
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
        way = f"{skipping} lets others stand in for them" if skipping else "tiles and packs can only do without them"
        lines.append(f"            {more}{way}")
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
    counts = sorted(enumerate(layout.class_sizes()), key=lambda pair: -pair[1])
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
            "classes": dict(zip(layout.classes, layout.class_sizes(), strict=True)),
            "left_out": layout.listing.left_out,
            "doubts": layout.warnings,
        }
        for split, layout in seen.layouts.items()
    }
    unreadable = {look.path: look.error for look in seen.unreadable}
    return {"format": 1, "splits": splits, "unreadable": unreadable, "copies": seen.copies, "near": seen.near}
