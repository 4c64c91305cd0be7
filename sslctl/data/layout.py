"""What a folder of images means: which part is for training, which for testing, and what the labels are. Imports no torch.

Nothing is inferred without a sentence for the plan, with the key that decides otherwise.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslctl.data.held_out import held_out_names
from sslctl.data.listing import ARRAYS, EXTENSIONS, Listing, existing_folder, is_hidden, scan
from sslctl.errors import InputError, nearest, user_path

# A folder of this name, in any spelling (Training, TEST_SET, val-images), holds a split; of test and val, test is preferred.
_SPLIT = re.compile(
    r"(?:(train|training|trn)|(test|testing|tst)|(val|valid|validation|dev|eval))[ _-]?(?:set|split|data|images?)?",
    re.I,
)
# A folder of this name holds labels of pixels, where its pictures have the names of those in a folder beside it.
_MASKS = re.compile(
    r"(?:(?:seg(?:mentation)?|pixel)[ _-]?)?(?:masks?|labels?|annotations?|annots?)|segmentations?|gt|ground[ _-]?truth",
    re.I,
)


class NoTestSplit(InputError):
    """Labelled images for training, and none to judge by."""


@dataclass(frozen=True)
class Layout:
    """One split of a folder: its images below `listing.base`, and their labels.

    names: of the split's images. labels: the number of each one's class, -1 without classes. origin: where the split comes
    from. warnings: what may not be meant, each with the key that answers it. stand_ins: row -> row that is read in its place.
    targets: the numbers of each image's classes, where it may have several; its label is -1 then. groups: what each image was
    taken from (a patient, a slide, a day), where that is named. labels_apart: they stand in a table, not in the names.
    """

    listing: Listing
    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    origin: str
    warnings: list[str] = field(default_factory=list)
    stand_ins: dict[int, int] = field(default_factory=dict)
    targets: list[tuple[int, ...]] | None = None
    groups: list[str] | None = None
    labels_apart: bool = False

    def class_sizes(self) -> list[int]:
        """Counts the images of each class, all of them that have several labels."""
        own = self.targets if self.targets is not None else [(label,) for label in self.labels]
        counts = Counter(number for numbers in own for number in numbers)
        return [counts[number] for number in range(len(self.classes))]

    def paths(self) -> list[str]:
        """Returns where the split's images lie, those that stand in for others among them."""
        rows = (self.stand_ins.get(row, row) for row in range(len(self.names)))
        return [os.path.join(self.listing.base, self.names[row]) for row in rows]


def class_folders(
    split: str, root: str | None, splits: Mapping[str, str] | None = None, label: str | None = None
) -> Layout:
    """Lays out labelled images: a folder a class, or a label in each name.

    splits: the folders of "train" and "test" below root. label: a pattern whose group is the class, matched from the
    beginning of an image's path below the split's folder.
    """
    # Where the splits lie: in folders that are named, or called so; else the whole folder is divided.
    base, warnings = existing_folder(root), []
    if label is None and not splits:
        base, warnings = _inside_wrapper(base)
    folders = _split_folders(base, splits)
    if split not in folders and folders:
        raise NoTestSplit(
            f"{folders['train']} has no test split beside it: dataset.splits={{train: {folders['train'].name}, test:"
            f" FOLDER}} names one, eval_dataset=… other labelled images; dataset.root={folders['train']} holds out a fifth",
            advice=[f"dataset.root={folders['train']}"],
        )
    # Classes are those of the training images in every split, so that a number means the same in each.
    train = scan(folders.get("train", base))
    own = scan(folders["test"]) if split == "test" and folders else train
    class_of, of_training = _labels(own, label), _labels(train, label)
    classes = tuple(sorted(set(of_training.values())))
    # Which images: of a divided folder, a fifth by the hash of the names, the same for everyone who has these files.
    names, origin = _split_of(own, split, folders, class_of)
    if not names:
        raise InputError(f"{base}: too few images for a {split} split of a fifth; make train/ and test/ folders")
    unknown = next((class_of[name] for name in names if class_of[name] not in classes), None)
    if unknown is not None:
        raise InputError(f"{own.base}: class {unknown} has no images in {train.base}{nearest(unknown, classes)}")
    number = {name: i for i, name in enumerate(classes)}
    if split == "train":
        warnings = [*warnings, *_doubts(train, classes, label, folders)]
    return Layout(own, names, [number[class_of[name]] for name in names], classes, origin, warnings)


def without_labels(root: str | None, splits: Mapping[str, str] | None = None) -> Layout:
    """Lays out all images below a folder, or below the one of splits={train: …}, for training without labels."""
    base = existing_folder(root)
    folders = _split_folders(base, splits) if splits else {}
    listing, warnings = scan(folders.get("train", base)), []
    tests = sorted(
        {top for name in listing.names if (top := name.split("/")[0]) != name and split_kind(top) in ("test", "val")}
    )
    if tests and not splits:
        warnings = [
            f"{tests[0]}/ has the name of a test split, and its images are trained on: dataset.splits={{train: FOLDER}}"
            " names the part to train on"
        ]
    warnings += _mask_doubts(listing)
    origin = f"all images below {listing.base}"
    return Layout(listing, listing.names, [-1] * len(listing.names), (), origin, warnings)


def base_name(root: str) -> str:
    """Returns the name of dataset.root's folder, also where it is written as "."."""
    return user_path(root).resolve().name


def training_layout(root: str, in_classes: bool, splits: Any = None, label: str | None = None) -> Layout:
    """Lays out the images that a folder gives for training. in_classes: with labels, so that a part may be for testing."""
    labelled = in_classes or label is not None
    return class_folders("train", root, splits, label) if labelled else without_labels(root, splits)


# --- Splits ---


def _split_folders(base: Path, splits: Mapping[str, str] | None) -> dict[str, Path]:
    """Returns the folders of "train" and "test": those that are named, else those that are called so; {} where there are none.

    Without a folder for training there are no splits: a folder called test is then a class.
    """
    if splits:
        return _named(base, splits)
    below = _folders(base)
    of_kind = {kind: [d for d in below if split_kind(d.name) == kind] for kind in ("train", "test", "val")}
    for kind, folders in of_kind.items():
        exact = [d for d in folders if d.name == kind]
        if len(folders) > 1 and not exact:
            names = " and ".join(f"{d.name}/" for d in folders)
            raise InputError(
                f"{base}: {names} may both be the {kind} split: say dataset.splits={{train: FOLDER, test: FOLDER}}"
            )
        of_kind[kind] = exact or folders
    if not of_kind["train"]:
        return {}
    tests = [d for d in (*of_kind["test"], *of_kind["val"]) if _folders(d)] or [*of_kind["test"], *of_kind["val"]]
    return {"train": of_kind["train"][0]} | ({"test": tests[0]} if tests else {})


def _named(base: Path, splits: Mapping[str, str]) -> dict[str, Path]:
    """Returns the folders that dataset.splits names."""
    other = next((name for name in splits if name not in ("train", "test")), None)
    if other is not None or "train" not in splits:
        raise InputError(
            f"dataset.splits={dict(splits)}: expected {{train: FOLDER, test: FOLDER}}, or {{train: FOLDER}} alone"
        )
    for kind, name in splits.items():
        if not (base / str(name)).is_dir():
            names = [d.name for d in _folders(base)]
            raise InputError(
                f"dataset.splits.{kind}={name}: no such folder in {base}; there are {', '.join(names[:8]) or 'none'}"
                f"{nearest(str(name), names)}"
            )
    return {kind: base / str(name) for kind, name in splits.items()}


def split_kind(name: str) -> str | None:
    """Tells of which split a folder's name is: train, test, val or none."""
    match = _SPLIT.fullmatch(name)
    return ("train", "test", "val")[match.lastindex - 1] if match else None


def _split_of(
    listing: Listing, split: str, folders: dict[str, Path], class_of: dict[str, str]
) -> tuple[list[str], str]:
    """Returns the images of a split, and where it comes from: a folder of its own, or a part of the training images."""
    if folders:
        return listing.names, f"{listing.base}"
    part = "a fixed fifth" if split == "test" else "four fixed fifths"
    origin = f"{part} of {listing.base}, by the hash of the names; dataset.splits={{train: …, test: …}} names folders"
    is_test = held_out_names(listing.names, [[class_of[name]] for name in listing.names])
    return [name for name, test in zip(listing.names, is_test, strict=True) if test == (split == "test")], origin


# --- Labels ---


def _labels(listing: Listing, label: str | None) -> dict[str, str]:
    """Returns name -> class of every image: the folder that it lies in, or what a pattern finds in its path."""
    if label is None:
        loose = [name for name in listing.names if "/" not in name]
        if loose:
            raise InputError(
                f"{listing.base}: {len(loose)} images lie outside class folders (first: {loose[0]}); for images without"
                " labels say dataset=folder, for labels in file names dataset.label=PATTERN",
                advice=["dataset=folder"],
            )
        return {name: name.partition("/")[0] for name in listing.names}
    try:
        pattern = re.compile(label)
    except re.error as error:
        raise InputError(f"dataset.label={label} is no regular expression: {error}") from error
    if pattern.groups < 1:
        raise InputError(f"dataset.label={label}: expected a group in parentheses that is the label, such as (.+)_\\d+")
    matches = {name: pattern.match(name) for name in listing.names}
    without = [name for name, match in matches.items() if not (match and match[1])]
    if without:
        raise InputError(
            f"dataset.label={label} finds no label in {len(without)} of {len(matches)} images of {listing.base} (first:"
            f" {without[0]})"
        )
    return {name: match[1] for name, match in matches.items()}


# --- What may not be meant ---


def _inside_wrapper(base: Path) -> tuple[Path, list[str]]:
    """Goes down through folders that hold nothing but one folder, as archives are unpacked to, to one of several folders.

    A single folder of images is a class, however deep it lies.
    """
    inner = base
    while len(below := _folders(inner)) == 1 and not _has_images(inner):
        if split_kind(below[0].name):
            return base, []
        inner = below[0]
    if inner == base or not below:
        return base, []
    return inner, [f"{base} holds nothing but {inner.relative_to(base)}/, which is taken: dataset.root={inner}"]


def _doubts(train: Listing, classes: tuple[str, ...], label: str | None, folders: dict[str, Path]) -> list[str]:
    """Says what of the classes looks as if something else was meant."""
    doubts = []
    if len(classes) == 1:
        doubts.append(
            f"one class ({classes[0]}): whatever is asked, every answer is right; dataset=folder takes images without labels"
        )
    if label is None:
        empty = sorted({d.name for d in _folders(train.base)} - set(classes))
        if empty:
            doubts.append(
                f"folders without images are no classes: {', '.join(empty[:5])}{', …' if len(empty) > 5 else ''}"
            )
    doubts += _mask_doubts(train)
    named_so = [name for name in classes if split_kind(name)]
    if named_so and "train" not in folders:
        doubts.append(
            f"class {named_so[0]} has the name of a split: if it is one, say dataset.splits={{train: FOLDER, test:"
            f" {named_so[0]}}}"
        )
    return doubts


def _mask_doubts(listing: Listing) -> list[str]:
    """Says which pictures look as if they were masks of others, the labels of these pixel by pixel."""
    stems: dict[str, set[str]] = {}
    for name in listing.names:
        folder, _, file = name.rpartition("/")
        stems.setdefault(folder, set()).add(file.rpartition(".")[0])
    counts = {}
    for folder in stems:
        parent, _, own = folder.rpartition("/")
        if not _MASKS.fullmatch(own):
            continue
        beside = [other for other in stems if other != folder and other.rpartition("/")[0] == parent]
        of = max(beside, key=lambda other: len(stems[other] & stems[folder]), default=None)
        if of is not None and 2 * len(stems[of] & stems[folder]) > len(stems[folder]):
            counts[folder, of] = len(stems[folder])
    if not counts:
        return []
    folder, of = min(counts, key=lambda pair: split_kind(pair[1].partition("/")[0]) != "train")
    others = f" and {len(counts) - 1:,} other folders" if len(counts) > 1 else ""
    return [
        f"{sum(counts.values()):,} pictures in {folder}{others} have the names of those in {of}: if they are masks,"
        f" dataset=folder dataset.root={listing.base / of} leaves them out"
    ]


def _folders(base: Path) -> list[Path]:
    return sorted(d for d in base.iterdir() if d.is_dir() and not is_hidden(d.name))


def _has_images(base: Path) -> bool:
    return any(f.name.lower().endswith((*EXTENSIONS, *ARRAYS)) and not is_hidden(f.name) for f in base.iterdir())
