"""Weights from elsewhere: a run, a safetensors file, a torch file, with torchvision's, timm's or sslctl's key names."""

import hashlib
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from sslctl.errors import user_path
from sslctl.models.backbones import Backbone
from sslctl.models.vit import patch_size_of
from sslctl.runs.checkpoint import (
    WEIGHTS,
    CheckpointError,
    compare,
    load_pickle,
    load_tensors,
    metadata,
    newest_valid,
    same_kind,
)
from sslctl.runs.directory import BACKBONE, is_run

# Wrappers that training codes leave around a backbone's names, and classifiers that a backbone has no place for.
_PREFIXES = (
    *("", "network.", "model.", "module.", "backbone.", "backbone.network.", "module.backbone.", "encoder."),
    *("student.backbone.", "module.encoder_q.", "encoder_q."),  # MoCo v1, v2
    *("module.base_encoder.", "base_encoder.", "module.momentum_encoder."),  # MoCo v3
)
_CLASSIFIERS = ("fc.", "head.", "head_dist.", "classifier.", "last_linear.")
_NESTED = ("state_dict", "model", "model_state_dict", "teacher")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the named tensors of a file, or of a run's backbone: the one that was evaluated, before the end its student.

    Never runs code from the file. Raises CheckpointError where there is no dictionary of tensors.
    """
    if is_run(path):
        return _run_backbone(path)
    if not path.is_file():
        raise CheckpointError(f"backbone.weights={path}: {'not a run or a file' if path.exists() else 'no such file'}")
    content = load_tensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    for name in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no dictionary of tensors")
    return content


def _run_backbone(run: Path) -> dict[str, Tensor]:
    if (run / BACKBONE).exists():
        return load_tensors(run / BACKBONE)
    newest = newest_valid(run)
    if newest is None:
        raise CheckpointError(f"{run} has no checkpoint yet")
    tensors = load_tensors(newest / WEIGHTS)
    return {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}


def load_weights(backbone: Backbone, path: str, *, partial: bool, key: str = "backbone") -> str:
    """Copies foreign weights into a backbone and returns a report; refuses any missing or misshapen tensor.

    Refused too are integers where floating-point numbers belong, and values that are not finite where the network's are.
    partial: load what matches all the same. The file's classifier is left out and reported. key: where
    the configuration has the backbone.
    """
    file = user_path(path)
    theirs, ours = read_weights(file), backbone.state_dict()

    # The file's names in the backbone's own terms, by the wrapper's prefix under which most of them fit.
    inner = {name.removeprefix("network."): name for name in ours if name.startswith("network.")}
    renamings = (_rename(theirs, prefix, inner, ours) for prefix in _PREFIXES)
    tensors = max(renamings, key=lambda renamed: len(renamed.keys() & ours.keys()))

    # What fits, what the backbone has no place for, and what it cannot do without.
    matched = {n: t for n, t in tensors.items() if n in ours and t.shape == ours[n].shape and same_kind(t, ours[n])}
    unexpected = {name for name in tensors if name not in ours}
    classifiers = {name for name in unexpected if name.removeprefix("network.").startswith(_CLASSIFIERS)}
    normalisation = {"mean", "std"}  # sslctl's; foreign files have none
    counters = {name for name in ours if name.endswith("num_batches_tracked")}  # absent in old files, not used
    needed = {name: t for name, t in ours.items() if name in matched or name not in normalisation | counters}

    differences = compare({name: t for name, t in tensors.items() if name not in classifiers}, needed)
    report = (
        f"weights {file}: {len(matched)} of {len(needed)} tensors matched, {len(needed) - len(matched)} missing,"
        f" {len(unexpected)} unexpected" + (f" ({len(classifiers)} of a classifier, left out)" if classifiers else "")
    )
    report += _network_differences(file, backbone)
    if differences and not partial:
        raise CheckpointError(report, *differences, _advice(tensors, backbone, key))
    if not matched:
        raise CheckpointError(f"{report}: not one tensor fits this backbone", *differences)
    refuse_non_finite(file, matched, ours)
    backbone.load_state_dict({**ours, **matched}, strict=True)
    backbone.pretrained = frozenset(matched)
    return report


def _rename(tensors: dict[str, Tensor], prefix: str, inner: dict[str, str], ours: dict) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with a prefix, under the backbone's own names where it has them.

    inner: the network's names -> the backbone's. A bare timm name is looked for under `model.`, where a backbone keeps the model.
    """
    stripped = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {
        name if name in ours else inner.get(name, inner.get(f"model.{name}", name)): t for name, t in stripped.items()
    }


def refuse_non_finite(file: Path, tensors: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Raises CheckpointError that names the tensors with values that are not finite where those of our network are.

    Values count as the network would hold them: what overflows its precision is not finite either.
    """
    bad = []
    for name, tensor in tensors.items():
        finite = tensor.to(ours[name].dtype).isfinite()
        if not finite.all() and (count := int((~finite & ours[name].isfinite()).sum())):  # masks may hold infinities
            bad.append(f"{name} ({count:,} of {tensor.numel():,} values)")
    if bad:
        listed = ", ".join(bad[:3]) + (" …" if len(bad) > 3 else "")
        raise CheckpointError(f"{file}: {len(bad)} tensors hold values that are not finite numbers: {listed}")


def _advice(tensors: dict[str, Tensor], backbone: Backbone, key: str) -> str:
    """Returns what may help where the tensors of a file do not fit those of the backbone at `key`."""
    ours = backbone.state_dict()
    advice = "load what matches all the same with backbone.partial=true"
    if key != "backbone":
        advice = f"choose the network of these weights with backbone@{key}=…"
    misfits = [name for name, t in tensors.items() if name in ours and t.shape != ours[name].shape]
    fixed_size = getattr(backbone.network, "fixed_size", False)
    if misfits == ["network.model.pos_embed"] and not fixed_size:  # by its number of places alone
        places = tensors[misfits[0]].shape[1]
        side = math.isqrt(places)  # the class token and registers are fewer than another row of patches
        pixels = side * patch_size_of(backbone.network)
        advice = (
            f"for weights of images of {pixels} pixels, +{key}.kwargs.img_size={pixels} resamples the position embedding;"
            f" else {advice}"
        )
    return advice


def file_metadata(file: Path) -> dict[str, str]:
    """Returns what a safetensors file says of itself; nothing for files of other kinds."""
    return metadata(file) if file.suffix == ".safetensors" else {}


def _network_differences(file: Path, backbone: Backbone) -> str:
    """Returns, for the report, in what a run's or an exported network is another one than its weights alone make."""
    if is_run(file) and not (file / BACKBONE).exists():
        return "; the run is not finished: of its student"
    description = file_metadata(file / BACKBONE if is_run(file) else file)
    report = "; its network saw the lightness of colours alone" if description.get("sees") == "lightness" else ""
    kwargs = json.loads(description.get("backbone", "{}")).get("kwargs", {})
    model = getattr(backbone.network, "model", None)
    heads, pool = kwargs.get("num_heads"), kwargs.get("global_pool")
    attention = next((part for part in backbone.modules() if hasattr(part, "num_heads")), None)
    if heads and heads != getattr(attention, "num_heads", heads):
        report += f"; its network had other heads: backbone.kwargs.num_heads={heads}"
    if pool and pool != getattr(model, "global_pool", pool):
        report += (
            f"; its features were pooled otherwise: +backbone.kwargs.global_pool={pool} +backbone.kwargs.fc_norm=false"
        )
    return report


def weights_sha256(module: nn.Module) -> str:
    """Returns one digest of all tensors of a module, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
