"""What given weights expect of their input: normalisation, size and interpolation, as their file or timm says them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sslctl.config.targets import target_of
from sslctl.errors import InputError, user_path
from sslctl.models.backbones import ResNet, Timm
from sslctl.models.preprocess import Preprocess, TextPreprocess
from sslctl.models.weights import file_metadata
from sslctl.ops.image_size import ImageSize, image_size_of, in_words
from sslctl.runs.directory import PREPROCESS, is_run
from sslctl.runs.reading import read_preprocess

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, which transformers writes


_OTHERS = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)  # by JSON of another kind


@dataclass(frozen=True)
class Expectation:
    """mean, std: one value a channel, of images in [0, 1]. size: pixels; None where it is not said. source: who says so."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: ImageSize | None
    interpolation: str | None
    source: str


def has_weights(node: Any) -> bool:
    """Tells whether a backbone's configuration names weights."""
    return bool(node.get("weights") or node.get("pretrained"))


def as_expected(preprocess: Preprocess | TextPreprocess, node: Any) -> tuple[Preprocess | TextPreprocess, str | None]:
    """Returns what a backbone gets to see, normalised as its weights expect it, and a sentence for the plan.

    node: the backbone's configuration; its `normalization` takes the weights' (the default, where they say it) or the
    dataset's. Raises InputError where the weights' is asked for and there are none, or they do not say it.
    """
    wanted = node.get("normalization")
    if wanted == "weights" and not has_weights(node):
        raise InputError(
            "backbone.normalization=weights: there are none; name them by backbone.weights=, or leave it out"
        )
    if not has_weights(node) or not isinstance(preprocess, Preprocess):
        return preprocess, None
    expected = expectation_of(node)
    own = f"mean {_listed(preprocess.mean)}, std {_listed(preprocess.std)}"
    if expected is None and wanted == "weights":
        raise InputError("backbone.normalization=weights: the weights do not say it; dataset.mean=… dataset.std=… do")
    if expected is None:
        return preprocess, f"{own} of the dataset: the weights do not say theirs (dataset.mean=… dataset.std=…)"
    trained = ", ".join([f"{in_words(expected.size)} px"] * bool(expected.size) + [expected.interpolation or ""]).strip(
        ", "
    )
    source = f"{expected.source}{f'; trained at {trained}' if trained else ''}"
    if expected.interpolation not in (None, "bilinear"):
        source += "; here images are resized bilinearly, those that have their size already are not"
    if wanted == "dataset":
        return preprocess, f"{own} of the dataset, not those of the weights ({source})"
    mean, std = expected.mean, expected.std
    if preprocess.channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    if len(mean) != preprocess.channels:
        return preprocess, f"{own} of the dataset: the weights have {len(mean)} channels ({source})"
    sentence = f"mean {_listed(mean)}, std {_listed(std)} of the weights ({source})"
    if (list(mean), list(std)) != (preprocess.mean, preprocess.std):
        sentence += "; backbone.normalization=dataset takes the dataset's"
    return replace(preprocess, mean=list(mean), std=list(std)), sentence


def expectation_of(node: Any) -> Expectation | None:
    """Returns what the weights of a backbone's configuration expect; None where neither a file nor timm says it."""
    if node.get("weights"):
        path = user_path(node.weights)
        return _of_file(path) or _of_library(node, path.name)
    return _of_library(node, None)


def _of_file(path: Path) -> Expectation | None:
    """Reads what a run, or an sslctl file, says of itself, or what the Hub's files beside the weights say."""
    if is_run(path):
        saved = read_preprocess(path) if (path / PREPROCESS).exists() else {}
        if "mean" in saved:
            return Expectation(
                tuple(saved["mean"]), tuple(saved["std"]), image_size_of(saved["image_size"]), None, "the run"
            )
        return None
    if not path.is_file():
        return None  # refused where it is read
    if "preprocess" in (own := file_metadata(path)):
        try:
            saved = json.loads(own["preprocess"])
            return _expectation(saved["mean"], saved["std"], saved["image_size"], None, "the file")
        except _OTHERS:
            return None  # of a text's backbone, or not ours
    for name, read in (("config.json", _of_timms_json), ("preprocessor_config.json", _of_transformers_json)):
        beside = path.parent / name
        try:
            content = json.loads(beside.read_text()) if beside.is_file() else None
            if isinstance(content, dict) and (expected := read(content, f"{name} beside the file")):
                return expected
        except (*_OTHERS, OSError):
            continue  # of something else
    return None


def _of_timms_json(content: dict, source: str) -> Expectation | None:
    settings = content.get("pretrained_cfg", {})
    if "mean" not in settings:
        return None
    return _expectation(
        settings["mean"], settings["std"], settings["input_size"][-1], settings.get("interpolation"), source
    )


def _of_transformers_json(content: dict, source: str) -> Expectation | None:
    if "image_mean" not in content or content.get("do_normalize") is False:
        return None
    size = content.get("crop_size") or content.get("size")
    size = next(iter(size.values()), None) if isinstance(size, dict) else size
    how = _INTERPOLATIONS.get(content.get("resample"))
    return _expectation(content["image_mean"], content["image_std"], size, how, source)


def _expectation(mean: Any, std: Any, size: Any, interpolation: Any, source: str) -> Expectation:
    """Raises ValueError or TypeError for values that are none, or are not of images in [0, 1]."""
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    sane = all(abs(value) < 10 for value in mean) and all(0 < value < 10 for value in std)  # NaN is neither
    if not mean or len(mean) != len(std) or not sane:
        raise ValueError(f"mean {mean}, std {std}")
    if isinstance(size, list):
        size = image_size_of(size)
    elif size:
        size = int(size)
    return Expectation(mean, std, size or None, str(interpolation) if interpolation else None, source)


def _of_library(node: Any, file: str | None) -> Expectation | None:
    """Returns what timm or torchvision say of weights with this file's name, or of timm's own of a model, without a file."""
    target = target_of(node, "backbone")
    if target is ResNet and file:
        return _of_torchvision(f"resnet{node.depth}", file)
    return _of_timm(node.model, file) if target is Timm else None


def _of_torchvision(model: str, file: str) -> Expectation | None:
    import torchvision

    for weights in torchvision.models.get_model_weights(model):
        if weights.url.endswith(f"/{file}"):
            how = weights.transforms()
            source = f"torchvision's {weights}"
            return _expectation(how.mean, how.std, how.crop_size[0], how.interpolation.value, source)
    return None


def _of_timm(model: str, file: str | None) -> Expectation | None:
    """Reads timm's pretrained_cfg: of the file's name, of the model's tag, or that on which all weights of the model agree."""
    import timm

    names = timm.list_pretrained(f"{model.partition('.')[0]}.*")
    settings = {name: timm.get_pretrained_cfg(name) for name in names}
    if file is None:
        settings = {model: timm.get_pretrained_cfg(model)}
    elif of_file := {name: c for name, c in settings.items() if (c.url or "").endswith(f"/{file}")}:
        settings = of_file
    elif model in settings:
        settings = {model: settings[model]}
    chosen = [each for each in settings.values() if each is not None]
    if len({(tuple(c.mean), tuple(c.std)) for c in chosen}) != 1:
        return None
    one = chosen[0]
    alike = len({(tuple(c.input_size), c.interpolation) for c in chosen}) == 1
    size, how = (one.input_size[-1], one.interpolation) if alike else (None, None)
    return _expectation(one.mean, one.std, size, how, f"timm's pretrained_cfg of {model}")


def _listed(values: Any) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
