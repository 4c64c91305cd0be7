"""What suits a folder of one's own, chosen before the configuration is composed: the scale by the number of its images, a vision
transformer's patches by their size."""

import contextlib
from collections import Counter
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sslctl.config.command_line import PLACED, Prepared
from sslctl.errors import InputError

FEWER_THAN = {"tiny": 5_000, "small": 200_000}  # images; what is larger is of the scale of ImageNet
_COUNTED = ("folder", "imagefolder", "csv")  # the datasets that are
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
    if datasets[0] not in _COUNTED or type(size) is not int:
        return None
    patch = next((p for p, least in _PATCHES.items() if size % p == 0 and size // p >= least), None)
    return None if patch == 16 else patch


def _image_size(dataset: Any, root: Any, values: dict[str, Any]) -> int | None:
    """Returns the side that a folder's images are seen at, as some of their headers tell."""
    layout = _layout_of(dataset, root, values)
    if layout is None:
        return None
    from sslctl.data import files

    headers, paths = [], layout.paths()
    for path in paths[:: max(1, len(paths) // _HEADERS)]:
        with contextlib.suppress(InputError, *files.UNREADABLE):
            headers.append(files.header_of(path))
    looked_at = files.Headers(Counter(size for size, _ in headers), Counter(kind for _, kind in headers))
    return looked_at.small_square() if headers else None


def _scale_of(dataset: Any, root: Any, values: dict[str, Any]) -> str | None:
    layout = _layout_of(dataset, root, values)
    count = None if layout is None else _count(layout, values["tiles"])
    if count is None:
        return None
    return next((scale for scale, bound in FEWER_THAN.items() if count < bound), "imagenet")


def _count(layout: Any, keys: Any) -> int | None:
    """Returns the number of samples: images, or their tiles; None where it cannot be known. keys: dataset.tiles."""
    if keys is None:
        return len(layout.names)
    from sslctl.data import files, tiles

    try:
        return tiles.count_tiles(layout.paths(), tiles.Tiling.of(keys))
    except (InputError, *files.UNREADABLE):
        return None


def _layout_of(dataset: Any, root: Any, values: dict[str, Any]) -> Any | None:
    """Returns the images that a dataset of files gives for training; None where it is none, or cannot be read."""
    if dataset not in _COUNTED or root is None:
        return None
    from sslctl.data.layout import training_layout  # with NumPy, which a typo or --help does not wait for
    from sslctl.data.table_layout import table_rows

    try:
        root = OmegaConf.create({"root": str(root)}).root if "${" in str(root) else str(root)  # ${oc.env:DATA}
        if dataset == "csv":
            return table_rows("train", root, values["columns"], values["splits"])
        return training_layout(root, dataset == "imagefolder", values["splits"], values["label"])
    except (InputError, OmegaConfBaseException):
        return None


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
