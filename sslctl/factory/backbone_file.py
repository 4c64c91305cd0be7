"""A finished run's backbone in Python: `backbone, preprocess = sslctl.load("runs/latest")`."""

import copy
import json
import warnings
from pathlib import Path

from sslctl.config.literal import as_config
from sslctl.data.text import TextTransform
from sslctl.errors import InputError, first_line, user_path
from sslctl.factory.from_config import build_backbone
from sslctl.models.backbones import Backbone
from sslctl.models.lora import Adapted, merge_
from sslctl.models.preprocess import Preprocess, TextPreprocess, Transform, preprocess_from
from sslctl.models.weights import file_metadata, refuse_non_finite
from sslctl.runs.atomic import replacing
from sslctl.runs.checkpoint import CheckpointError, compare, load_tensors, save_tensors
from sslctl.runs.directory import BACKBONE, TOKENIZER, is_run, run_named_by


class OtherFeatures(UserWarning):
    """Evaluation measures other features of a method than its backbone's own output."""


def load(run: str | Path) -> tuple[Backbone, Transform | TextTransform]:
    """Returns the backbone of a finished run, or of a file of `sslctl export`, in eval mode, and the transform of its input.

    The backbone maps (B, C, H, W) floats in [0, 1] to (B, embed_dim), the features that `sslctl evaluate` measures;
    normalisation is inside. Where a method makes more of them than a backbone can, an OtherFeatures warning says so. Of texts,
    the transform makes ids of a string and the backbone maps (B, L) of them. Raises InputError when
    the directory is no finished run, any tensor does not match, or one holds values that are not finite.
    """
    path = user_path(run)
    path = run_named_by(path) or path
    is_file = path.is_file() and path.suffix == ".safetensors"
    backbone, _, preprocess = load_backbone(path if is_file else backbone_of_run(path))
    tokenizer = path.with_suffix(f".{TOKENIZER}") if is_file else path / TOKENIZER
    return backbone.eval(), preprocess.to_transform(tokenizer)


def backbone_of_run(run: Path) -> Path:
    """Returns the file of a finished run's backbone; raises InputError where there is none."""
    if not is_run(run):
        raise InputError(f"{run} is not a run directory")
    if not (run / BACKBONE).exists():
        raise InputError(f"{run} is not finished: it has no {BACKBONE}")
    return run / BACKBONE


def save_backbone(
    path: Path, backbone: Backbone, node: dict, preprocess: Preprocess | TextPreprocess, **more: str
) -> None:
    """Writes a safetensors file that says itself how its backbone is built, by the configuration `node`, and what it expects.

    What LoRA has learned is merged: the file is of the plain network.
    more: further metadata. "evaluated" names the features that evaluation measures instead of the backbone's own output.
    """
    if any(isinstance(part, Adapted) for part in backbone.modules()):
        backbone = copy.deepcopy(backbone)
        merge_(backbone)
    if node.get("lora"):
        node = {**node, "lora": {**node["lora"], "rank": 0}}
    description = {"backbone": json.dumps(node), "preprocess": json.dumps(vars(preprocess))}
    with replacing(path) as temporary:
        save_tensors(temporary, backbone.state_dict(), description | visual_metadata(backbone) | more, signed=True)


def visual_metadata(backbone: Backbone) -> dict[str, str]:
    """Returns what a file says of a backbone that sees less than it is given."""
    return {"sees": "lightness"} if backbone.sees_lightness else {}


def load_backbone(path: Path) -> tuple[Backbone, dict, Preprocess | TextPreprocess]:
    """Reads what `save_backbone` wrote: the backbone, the configuration that it is built by, and what it expects.

    Raises InputError for other files, and where any tensor is missing, of another shape or type, not finite, or not the
    backbone's.
    """
    metadata = backbone_metadata(path)
    if metadata is None:
        raise InputError(f"{path} does not say which backbone it is of: expected a run, or a file of sslctl export")
    tensors = load_tensors(path)
    try:
        node, preprocess = json.loads(metadata["backbone"]), preprocess_from(json.loads(metadata["preprocess"]))
        config = as_config(node)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{path} does not say how its backbone is built: {first_line(error)}") from error
    backbone = build_backbone(config, preprocess, with_weights=False)
    backbone.sees_lightness = metadata.get("sees") == "lightness"
    differences = compare(tensors, backbone.state_dict())
    if differences:
        raise CheckpointError(f"{path} does not fit its own configuration:", *differences)
    refuse_non_finite(path, tensors, backbone.state_dict())
    backbone.load_state_dict(tensors, strict=True)
    if "evaluated" in metadata:
        warnings.warn(
            f"{path} gives the backbone's own output; evaluation measures this method's features={metadata['evaluated']}"
            " (sslctl export writes what is evaluated)",
            OtherFeatures,
            stacklevel=3,
        )
    return backbone, node, preprocess


def backbone_metadata(path: Path) -> dict[str, str] | None:
    """Returns what a file says of its backbone; None for files that `save_backbone` did not write."""
    metadata = file_metadata(path)
    return metadata if {"backbone", "preprocess"} <= metadata.keys() else None
