"""How benchmarks of image files are laid out: which are of a split, and their classes."""

from dataclasses import replace
from pathlib import Path

from sslctl.data.layout import Layout, class_folders
from sslctl.data.listing import Listing
from sslctl.errors import InputError, nearest


def whole(folder: Path, split: str, part: str | None) -> Layout:
    """Lays out a folder a class, of which a fifth is held out for testing: EuroSAT has no split of its own."""
    return class_folders(split, str(folder))


def imagenet(folder: Path, split: str, part: str | None) -> Layout:
    """Lays out train/<WordNet ID>/ and val/<WordNet ID>/, as torchvision and most others have ImageNet."""
    return class_folders(split, str(folder), {"train": "train", "test": "val"})


_IMAGENETTE = {  # WordNet ID -> name (fastai/imagenette)
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def imagenette(folder: Path, split: str, part: str | None) -> Layout:
    """Lays out train/<WordNet ID>/ and val/<WordNet ID>/ with the classes' names."""
    return _named(imagenet(folder, split, part), _IMAGENETTE)


def oxford_pets(folder: Path, split: str, part: str | None) -> Layout:
    """Lays out images/<class>_<number>.jpg by annotations/trainval.txt or test.txt: name, class from 1, species, breed."""
    list_file = folder / "annotations" / ("test.txt" if split == "test" else "trainval.txt")
    rows = [line.split() for line in _lines(list_file) if not line.startswith("#")]
    names = {int(row[1]) - 1: row[0].rpartition("_")[0].replace("_", " ") for row in rows}
    classes = tuple(names.get(number, f"class {number + 1}") for number in range(max(names) + 1))
    return _listed(folder, list_file, [(f"images/{row[0]}.jpg", int(row[1]) - 1) for row in rows], classes)


def tiny_imagenet(folder: Path, split: str, part: str | None) -> Layout:
    """Lays out train/<WordNet ID>/images/ and, by val/val_annotations.txt, val/images/; words.txt has the classes' names."""
    ids = _lines(folder / "wnids.txt")
    number = {name: i for i, name in enumerate(sorted(ids))}
    if split == "test":
        list_file = folder / "val" / "val_annotations.txt"
        rows = [(f"val/images/{name}", number[own]) for name, own in (line.split()[:2] for line in _lines(list_file))]
    else:
        list_file = folder / "train"
        rows = [
            (file.relative_to(folder).as_posix(), number[name])
            for name in sorted(ids)
            for file in sorted((folder / "train" / name / "images").glob("*.JPEG"))
        ]
    layout = _listed(folder, list_file, rows, tuple(sorted(ids)))
    words = folder / "words.txt"
    return _named(layout, dict(line.split("\t")[:2] for line in _lines(words))) if words.exists() else layout


def places365(folder: Path, split: str, part: str | None) -> Layout:
    """Lays out data_256_standard/ and val_256/ (or the large ones) by their lists: a path and a number a line."""
    classes = dict(line.split() for line in _lines(folder / "categories_places365.txt"))
    names = tuple(name for name, _ in sorted(classes.items(), key=lambda item: int(item[1])))
    list_file, stem = folder / "places365_train_standard.txt", "data_{}_standard"
    if split == "test":
        list_file, stem = folder / "places365_val.txt", "val_{}"
    inside = next((stem.format(size) for size in ("256", "large") if (folder / stem.format(size)).is_dir()), None)
    if inside is None:
        raise InputError(f"no {stem.format('256')} nor {stem.format('large')} in {folder}")
    rows = [(f"{inside}/{path.lstrip('/')}", int(own)) for path, own in (line.split() for line in _lines(list_file))]
    return _listed(folder, list_file, rows, names)


def cut_to(layout: Layout, file: Path) -> Layout:
    """Returns the images of the classes that a file names, a line each, by their names or folders."""
    names = [line.strip() for line in _lines(file)]
    folders = dict(zip((Path(name).parts[0] for name in layout.names), layout.labels, strict=True))
    number = {name: i for i, name in enumerate(layout.classes)} | {
        name: label for name, label in folders.items() if len(folders) >= len(layout.classes)
    }
    unknown = next((name for name in names if name not in number), None)
    if unknown is not None:
        raise InputError(f"{file}: class {unknown} is none of the {len(layout.classes):,}{nearest(unknown, number)}")
    chosen = sorted({number[name] for name in names})
    new = {old: i for i, old in enumerate(chosen)}
    rows = [row for row, label in enumerate(layout.labels) if label in new]
    return replace(
        layout,
        names=[layout.names[row] for row in rows],
        labels=[new[layout.labels[row]] for row in rows],
        classes=tuple(layout.classes[old] for old in chosen),
        origin=f"{layout.origin}, {len(chosen):,} classes of {file.name}",
    )


def _named(layout: Layout, names: dict[str, str]) -> Layout:
    """Returns a layout whose classes have names instead of WordNet IDs; of one that comes twice, the ID stays beside it."""
    words = [names.get(name, name) for name in layout.classes]
    return replace(
        layout,
        classes=tuple(
            word if words.count(word) == 1 else f"{word} ({name})"
            for word, name in zip(words, layout.classes, strict=True)
        ),
    )


def _listed(folder: Path, origin: Path, rows: list[tuple[str, int]], classes: tuple[str, ...]) -> Layout:
    names = [name for name, _ in rows]
    missing = [name for name in names if not (folder / name).exists()]
    if not rows or missing:
        what = f"{missing[0]} and {len(missing) - 1:,} others are not there" if missing else "no images"
        raise InputError(f"{origin}: {what}")
    return Layout(Listing(folder, names, {}), names, [label for _, label in rows], classes, str(origin))


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise InputError(f"no {file}")
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
