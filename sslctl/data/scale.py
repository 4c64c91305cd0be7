"""The scale of a folder of one's own, chosen by the number of its images before the configuration is composed."""

from typing import Any

from sslctl.config.command_line import PLACED, Prepared
from sslctl.errors import InputError

FEWER_THAN = {"tiny": 5_000, "small": 200_000}  # images; what is larger is of the scale of ImageNet
_COUNTED = ("folder", "imagefolder", "csv")  # the datasets that are


def choose_scale(prepared: Prepared) -> str | None:
    """Returns the scale that suits the folder named by dataset= and dataset.root=, or None where it is not to be chosen.

    It is not where scale= or an experiment, which has a recipe of its own, stands on the command line, nor where the folder
    cannot be read, which is refused later. Raises InputError where jobs of a sweep need different ones.
    """
    values = _read_values(prepared.overrides)
    if PLACED["scale"] in values or values.get("experiment", [None]) != [None]:
        return None
    datasets, roots = values.get("dataset", []), values.get("dataset.root", [])
    own = {name: values.get(f"dataset.{name}", [None])[0] for name in ("splits", "label", "columns")}
    scales = {f"{dataset} {root}": _scale_of(dataset, root, own) for dataset in datasets for root in roots}
    if len(set(scales.values())) > 1:
        described = ", ".join(f"{job}: {scale or 'its own'}" for job, scale in scales.items())
        raise InputError(f"this sweep's datasets are of several scales ({described}): name one for all with scale=…")
    return next(iter(scales.values()), None)


def _scale_of(dataset: Any, root: Any, values: dict[str, Any]) -> str | None:
    if dataset not in _COUNTED or root is None:
        return None
    from sslctl.data.layout import count_training_images  # with NumPy, which a typo or --help does not wait for
    from sslctl.data.table_layout import count_training_rows

    try:
        if dataset == "csv":
            count = count_training_rows(str(root), values["columns"], values["splits"])
        else:
            count = count_training_images(str(root), dataset == "imagefolder", values["splits"], values["label"])
    except InputError:
        return None
    return next((scale for scale, bound in FEWER_THAN.items() if count < bound), "imagenet")


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
