"""A finished run's backbone in Python: `backbone, preprocess = sslctl.load("runs/latest")`."""

import json
import warnings
from pathlib import Path

from omegaconf import OmegaConf

from sslctl.data.text import TextTransform
from sslctl.errors import InputError, user_path
from sslctl.factory.from_config import build_backbone
from sslctl.models.backbones import Backbone
from sslctl.models.preprocess import Preprocess, TextPreprocess, Transform, preprocess_from
from sslctl.models.weights import file_metadata
from sslctl.runs.atomic import replacing
from sslctl.runs.checkpoint import CheckpointError, compare, load_tensors, save_tensors
from sslctl.runs.directory import BACKBONE, PREPROCESS, TOKENIZER, is_run, read_config, read_json


class OtherFeatures(UserWarning):
    """Evaluation measures other features of a method than its backbone's own output."""


def load(run: str | Path) -> tuple[Backbone, Transform | TextTransform]:
    """The backbone of a finished run, or of a file of `sslctl export`, in eval mode, and the transform of its input.

    The backbone maps (B, C, S, S) floats in [0, 1] to (B, embed_dim), the features that `sslctl evaluate` measures;
    normalisation is inside. Where a method makes more of them than a backbone can, an OtherFeatures warning says so. Of texts,
    the transform makes ids of a string and the backbone maps (B, L) of them. Raises InputError when
    the directory is no finished run or any tensor does not match.
    """
    path = user_path(run)
    file = path.is_file() and path.suffix == ".safetensors"
    backbone, _, settings = load_backbone(path) if file else finished_run(path)
    tokenizer = path.with_suffix(f".{TOKENIZER}") if file else path / TOKENIZER
    return backbone.eval(), settings.to_transform(tokenizer)


def finished_run(path: Path) -> tuple[Backbone, dict, Preprocess]:
    """The backbone of a finished run, the configuration it is built from, and what it expects of an image."""
    if not is_run(path):
        raise InputError(f"{path} is not a run directory")
    if not (path / BACKBONE).exists():
        raise InputError(f"{path} is not finished: it has no {BACKBONE}")
    settings, said = preprocess_from(read_json(path / PREPROCESS)), backbone_metadata(path / BACKBONE) or {}
    node = json.loads(said["backbone"]) if said else read_config(path)["backbone"]
    return _backbone_of(node, settings, path / BACKBONE, said), node, settings


def save_backbone(
    path: Path, backbone: Backbone, node: dict, settings: Preprocess | TextPreprocess, **more: str
) -> None:
    """Writes a safetensors file that says itself how its backbone is built and what it expects."""
    about = {
        "backbone": json.dumps(node),
        "preprocess": json.dumps(vars(settings)),
        **visual_metadata(backbone),
        **more,
    }
    with replacing(path) as temporary:
        save_tensors(temporary, backbone.state_dict(), about)


def visual_metadata(backbone: Backbone) -> dict[str, str]:
    """What a file says of a backbone that sees less than it is given."""
    return {"sees": "lightness"} if backbone.sees_lightness else {}


def load_backbone(path: Path) -> tuple[Backbone, dict, Preprocess | TextPreprocess]:
    """What `save_backbone` wrote, as `finished_run` gives it."""
    said = backbone_metadata(path)
    if said is None:
        raise InputError(f"{path} does not say which backbone it is of: expected a run, or a file of sslctl export")
    node, settings = json.loads(said["backbone"]), preprocess_from(json.loads(said["preprocess"]))
    return _backbone_of(node, settings, path, said), node, settings


def backbone_metadata(path: Path) -> dict[str, str] | None:
    """What `save_backbone` wrote of a file's backbone; None for other files."""
    said = file_metadata(path)
    return said if {"backbone", "preprocess"} <= said.keys() else None


def _backbone_of(node: dict, settings: Preprocess | TextPreprocess, path: Path, said: dict[str, str]) -> Backbone:
    """A backbone with the tensors of a file, which must all be its own. said: what `about` read of it."""
    tensors = load_tensors(path)
    backbone = build_backbone(OmegaConf.create(node), settings, with_weights=False)
    backbone.sees_lightness = said.get("sees") == "lightness"
    differences = compare(tensors, backbone.state_dict())
    if differences:
        raise CheckpointError(f"{path} does not fit its own configuration:", *differences)
    backbone.load_state_dict(tensors, strict=True)
    other = f"evaluation measures this method's features={said['evaluated']}" if "evaluated" in said else ""
    if not said:
        other = "an older sslctl wrote it, and evaluation may measure others: those of a teacher, a mean, a lightness"
    if other:
        warnings.warn(
            f"{path} gives the backbone's own output; {other} (sslctl export writes what is evaluated)",
            OtherFeatures,
            stacklevel=4,
        )
    return backbone
