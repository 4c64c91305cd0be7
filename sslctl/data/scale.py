"""What suits a folder of one's own, chosen before the configuration is composed: the scale by the number of its images, a vision
transformer's patches by their size."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sslctl.config.command_line import PLACED, Prepared
from sslctl.errors import InputError

FEWER_THAN = {"tiny": 5_000, "small": 200_000}  # images; what is larger is of the scale of ImageNet
_COUNTED = ("folder", "imagefolder", "csv", "hf")  # the datasets that are
_KEYS = ("splits", "label", "columns", "tiles")  # of theirs, which say what is counted
_PATCHES = {
    16: 7,
    8: 7,
    4: 4,
    2: 2,
}  # sides of patches in pixels, with how many of them a side of an image has at least
_HEADERS = 200  # that are read for the size of most images


def choose_scale(prepared: Prepared) -> str | None:
    """Returns the scale that suits the folder named by dataset= and dataset.root=, or None where it is not to be chosen.

    It is not where scale= or an experiment, which has a recipe of its own, stands on the command line, nor where the folder
    cannot be read, which is refused later. Raises InputError where jobs of a sweep need different ones.
    """
    values = _read_values(prepared.overrides)
    if PLACED["scale"] in values or values.get("experiment", [None]) != [None]:
        return None
    datasets, roots = values.get("dataset", []), values.get("dataset.root", [])
    own = {name: values.get(f"dataset.{name}", [None])[0] for name in _KEYS}
    scales = {f"{dataset} {root}": _scale_of(dataset, root, own) for dataset in datasets for root in roots}
    if len(set(scales.values())) > 1:
        described = ", ".join(f"{job}: {scale or 'its own'}" for job, scale in scales.items())
        raise InputError(f"this sweep's datasets are of several scales ({described}): name one for all with scale=…")
    return next(iter(scales.values()), None)


def choose_patch(prepared: Prepared) -> int | None:
    """Returns the side of a vision transformer's patches for the images of a folder, None where it is the usual 16 pixels.

    The largest that divides the image size often enough. It is left to the words of the command line, where they say it, and to
    experiments.
    """
    values = _read_values(prepared.overrides)
    own = {name: values.get(f"dataset.{name}", [None]) for name in (*_KEYS, "image_size", "root")}
    datasets = values.get("dataset", [])
    patch_keys = {"backbone.kwargs.patch_size", "dataset.scale.patch_size"} & {key.lstrip("+") for key in values}
    if patch_keys or values.get("experiment", [None]) != [None] or any(len(v) != 1 for v in (datasets, *own.values())):
        return None
    size, tiles = own["image_size"][0], own["tiles"][0]
    if size is None and isinstance(tiles, dict):
        size = tiles.get("size") if tiles.get("size") in range(97) else None
    elif size is None:
        size = _image_size(datasets[0], own["root"][0], {name: own[name][0] for name in _KEYS})
    sides = list(size) if isinstance(size, list) else [size]
    if datasets[0] not in _COUNTED or not sides or not all(type(side) is int for side in sides):
        return None
    patch = next((p for p, least in _PATCHES.items() if all(s % p == 0 and s // p >= least for s in sides)), None)
    return None if patch == 16 else patch


def _image_size(dataset: Any, root: Any, values: dict[str, Any]) -> int | None:
    """Returns the side that a folder's images are seen at, as some of their headers tell."""
    from sslctl.data import files

    headers, images = [], _images_of(dataset, root, values)
    for row in range(0, len(images), max(1, len(images) // _HEADERS)):
        with contextlib.suppress(InputError, *files.UNREADABLE):
            headers.append(files.header_of(images[row]))
    looked_at = files.Headers(Counter(size for size, _ in headers), Counter(kind for _, kind in headers))
    return looked_at.small_square() if headers else None


def _images_of(dataset: Any, root: Any, values: dict[str, Any]) -> Sequence:
    """Returns the training images, paths or what a pack holds; none where they cannot be read."""
    if dataset != "hf":
        layout = _layout_of(dataset, root, values)
        return layout.paths() if layout else []
    from sslctl.data.packed import packed_files

    try:
        return packed_files("train", _resolved(root), values["columns"], values["splits"])[1]
    except (InputError, OmegaConfBaseException):
        return []


def _scale_of(dataset: Any, root: Any, values: dict[str, Any]) -> str | None:
    count = _count(dataset, root, values)
    if count is None:
        return None
    return next((scale for scale, bound in FEWER_THAN.items() if count < bound), "imagenet")


def _count(dataset: Any, root: Any, values: dict[str, Any]) -> int | None:
    """Returns the number of samples, images or their tiles; None where it cannot be known."""
    if dataset == "hf":
        return _count_packed(root, values)
    layout = _layout_of(dataset, root, values)
    if layout is None or values["tiles"] is None:
        return None if layout is None else len(layout.names)
    from sslctl.data import files, tiles

    try:
        return tiles.count_tiles(layout.paths(), tiles.Tiling.of(values["tiles"]))
    except (InputError, *files.UNREADABLE):
        return None


def _count_packed(root: Any, values: dict[str, Any]) -> int | None:
    from sslctl.data.listing import existing_folder
    from sslctl.data.packed_folder import count_images

    try:
        return count_images(existing_folder(_resolved(root)), values["splits"])
    except (InputError, OmegaConfBaseException):
        return None


def _layout_of(dataset: Any, root: Any, values: dict[str, Any]) -> Any | None:
    """Returns the images that a dataset of files gives for training; None where it is none, or cannot be read."""
    if dataset not in _COUNTED or root is None:
        return None
    from sslctl.data.layout import training_layout  # with NumPy, which a typo or --help does not wait for
    from sslctl.data.table_layout import table_rows

    try:
        root = _resolved(root)
        if dataset == "csv":
            return table_rows("train", root, values["columns"], values["splits"])
        return training_layout(root, dataset == "imagefolder", values["splits"], values["label"])
    except (InputError, OmegaConfBaseException):
        return None


def _resolved(root: Any) -> str | None:
    """Returns a root with what it refers to, such as ${oc.env:DATA}."""
    if root is None or "${" not in str(root):
        return root if root is None else str(root)
    return OmegaConf.create({"root": str(root)}).root


def _read_values(overrides: list[str]) -> dict[str, list]:
    """Returns the values of every override that can be read, several where it is a sweep; the last of a key counts."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString, Transformer
    from hydra.errors import HydraException

    values, parser = {}, OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
            swept = override.is_sweep_override()
            entries = list(override.sweep_iterator(Transformer.identity)) if swept else [override.value()]
        except HydraException:  # glob(*), too, whose files Hydra alone can list
            continue
        plain = [entry.text if isinstance(entry, QuotedString) else entry for entry in entries]
        values[text.partition("=")[0]] = plain
    return values
