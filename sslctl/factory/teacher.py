"""Frozen teachers: a run's backbone, or weights of timm, torchvision or any file, kept once in the run directory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sslctl.config.literal import escaped
from sslctl.errors import InputError, say, user_path
from sslctl.factory.backbone_file import backbone_metadata, backbone_of_run, load_backbone, save_backbone
from sslctl.factory.expectation import as_expected
from sslctl.factory.from_config import build_backbone
from sslctl.models.preprocess import IMAGENET, Preprocess
from sslctl.models.teacher import Teacher
from sslctl.models.weights import read_weights
from sslctl.runs.directory import TEACHER, is_run


def save_teacher(teacher: Teacher, run_dir: Path) -> None:
    """Writes the teacher beside the run's checkpoints, unless it is there."""
    path = run_dir / TEACHER
    if not path.exists():
        save_backbone(path, teacher.network, teacher.node, teacher.preprocess)


def load_teacher(
    where: str | None, node: Any | None, preprocess: Preprocess, own: dict[str, Any] | None = None
) -> Teacher:
    """Loads a frozen teacher, from one of four places.

    where: a finished run, a file of `save_backbone`, or weights of the backbone that node configures; None where that names
    timm's own (pretrained). preprocess: of the student, whose images the teacher gets. own: mean and std that weights from
    elsewhere were trained with. Raises InputError for weights that do not match in full, and for another number of channels.
    """
    if node is not None and node.get("pretrained"):
        if where:
            raise InputError("method.teacher and method.teacher_backbone.pretrained both name weights: leave one out")
        return _given_teacher(None, node, own or {}, preprocess)
    if not where:
        raise InputError(
            "method.teacher is missing: a finished run, a file with backbone@method.teacher_backbone=…, or timm's own with"
            " method.teacher_backbone.pretrained=true"
        )
    path = user_path(where)
    described = is_run(path) or (path.is_file() and backbone_metadata(path))
    if described and node is not None:
        raise InputError(
            f"method.teacher={where} says itself which network it is: leave backbone@method.teacher_backbone out"
        )
    if is_run(path):
        teacher = Teacher(*load_backbone(backbone_of_run(path)))
    elif described:
        teacher = Teacher(*load_backbone(path))
    elif not path.is_file():
        raise InputError(f"method.teacher={where}: {'no run there' if path.exists() else 'no such run or file'}")
    elif node is None:
        raise InputError(
            f"method.teacher={where} is no run: name the network of these weights with backbone@method.teacher_backbone=…"
        )
    else:
        teacher = _given_teacher(path, node, own or {}, preprocess)
    if teacher.preprocess.channels != preprocess.channels:
        raise InputError(
            f"method.teacher={where} sees {teacher.preprocess.channels} channels, the images have {preprocess.channels}"
        )
    return teacher


def _given_teacher(path: Path | None, node: Any, own: dict[str, Any], preprocess: Preprocess) -> Teacher:
    """Builds a teacher of weights from elsewhere, with the normalisation and the stem that these were trained with.

    path: of a file; None for timm's own.
    """
    weighted = node if path is None else OmegaConf.merge(node, {"weights": str(path)})
    usual, _ = as_expected(replace(preprocess, **{name: _usual(name, preprocess) for name in IMAGENET}), weighted)
    norm = {name: list(own.get(name) or getattr(usual, name)) for name in IMAGENET}
    if {len(values) for values in norm.values()} != {preprocess.channels}:
        raise InputError(f"method.teacher_mean and method.teacher_std: expected {preprocess.channels} values each")
    if path is not None:
        if node.get("stem") == "auto":
            first = next((t for name, t in read_weights(path).items() if name.endswith("conv1.weight")), None)
            node = OmegaConf.merge(
                node, {"stem": "imagenet" if first is not None and first.shape[-1] == 7 else "small"}
            )
        weighted = OmegaConf.merge(node, {"weights": escaped(str(path))})
    unweighted = OmegaConf.merge(node, {"weights": None} | ({"pretrained": False} if "pretrained" in node else {}))
    unweighted = OmegaConf.to_container(unweighted, resolve=True)  # builds it again
    settings = replace(preprocess, **norm)
    say(f"  teacher: images normalised by mean {norm['mean']}, std {norm['std']}")
    return Teacher(build_backbone(weighted, settings, key="method.teacher_backbone"), unweighted, settings)


def _usual(name: str, preprocess: Preprocess) -> list[float]:
    """Returns ImageNet's mean or std for colour images, of which nearly all published weights are; else the student's."""
    return IMAGENET[name] if preprocess.channels == 3 else getattr(preprocess, name)
