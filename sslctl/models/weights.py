"""Weights from elsewhere: a run, a safetensors file, a torch file, in the layouts that `sslctl.models.layouts` lists."""

import hashlib
import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from sslctl.errors import user_path
from sslctl.models.adaptation import adapt
from sslctl.models.backbones import Backbone
from sslctl.models.layouts import ADVICE
from sslctl.models.lora import merge_tensors
from sslctl.models.matching import Match, bare, flatten, match
from sslctl.ops.image_size import ImageSize, image_size_of
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
from sslctl.runs.directory import BACKBONE, PREPROCESS, is_run
from sslctl.runs.reading import read_config, read_preprocess
from sslctl.runs.stand_ins import STAND_INS


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the named tensors of a file, or of a run's backbone: the one that was evaluated, before the end its student.

    Names of tensors inside nested dictionaries are dotted. Never runs code from the file. Raises CheckpointError where there
    is no tensor.
    """
    if is_run(path):
        return _run_backbone(path)
    if not path.is_file():
        raise CheckpointError(f"backbone.weights={path}: {'not a run or a file' if path.exists() else 'no such file'}")
    content = load_tensors(path) if path.suffix == ".safetensors" else load_pickle(path, STAND_INS)
    tensors = flatten(content) if isinstance(content, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path} holds no dictionary of tensors")
    return tensors


def _run_backbone(run: Path) -> dict[str, Tensor]:
    if (run / BACKBONE).exists():
        return load_tensors(run / BACKBONE)
    newest = newest_valid(run)
    if newest is None:
        raise CheckpointError(f"{run} has no checkpoint yet")
    tensors = load_tensors(newest / WEIGHTS)
    student = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    if not any(name.endswith(".lora_a") for name in student):
        return student
    return merge_tensors(student, read_config(run)["backbone"]["lora"]["alpha"])


def load_weights(
    backbone: Backbone, path: str, *, partial: bool, key: str = "backbone", resample_patches: bool = False
) -> str:
    """Copies given weights into a backbone and returns a report; refuses any missing or misshapen tensor of the backbone.

    Refused too are tensors of a larger backbone, integers where floating-point numbers belong, and values that are not finite
    where the network's are. Heads, decoders and other networks in the file are left out and reported. partial: load what
    matches all the same. key: where the configuration has the backbone. resample_patches: see `sslctl.models.adaptation.adapt`.
    """
    file = user_path(path)
    options = {"partial": partial, "key": key, "resample_patches": resample_patches, "trained_at": _trained_at(file)}
    report = copy_weights(backbone, read_weights(file), str(file), **options)
    return report + _network_differences(file, backbone)


def copy_weights(
    backbone: Backbone,
    theirs: dict[str, Tensor],
    name: str,
    *,
    partial: bool,
    key: str,
    resample_patches: bool,
    trained_at: ImageSize | None = None,
) -> str:
    """Does `load_weights` of tensors that are read. name: of what holds them."""
    ours = backbone.state_dict()
    translated = match(theirs, backbone)
    tensors, changes = adapt(translated.tensors, backbone, resample_patches=resample_patches, trained_at=trained_at)

    # What fits, and what the backbone cannot do without.
    matched = {n: t for n, t in tensors.items() if t.shape == ours[n].shape and same_kind(t, ours[n])}
    normalisation = {"mean", "std"}  # sslctl's; other files have none
    counters = {name for name in ours if name.endswith("num_batches_tracked")}  # absent in old files, not used
    needed = {name: t for name, t in ours.items() if name in matched or name not in normalisation | counters}

    report = (
        f"weights {name}: {len(matched)} of {len(needed)} tensors matched, {len(needed) - len(matched)} missing"
        + _left_out(translated)
        + "".join(f"; {change}" for change in changes)
        + _other_eps(translated, backbone, key)
    )
    differences = compare({**tensors, **translated.unexpected}, needed)
    if not matched:
        raise CheckpointError(f"{report}: not one tensor fits this backbone", *differences)
    if differences and not partial:
        raise CheckpointError(report, *differences, _advice(tensors, translated.unexpected, needed, backbone, key))
    refuse_non_finite(name, matched, ours)
    backbone.load_state_dict({**ours, **matched}, strict=True)
    backbone.pretrained = frozenset(matched)
    return report


def _left_out(translated: Match) -> str:
    """Returns, for the report, which network of the file was taken and what else the file holds."""
    report = ""
    if translated.alternatives:
        others = ", ".join(prefix.rstrip(".") or "bare names" for prefix in dict.fromkeys(translated.alternatives))
        report += f"; taken from {translated.prefix.rstrip('.') or 'bare names'}, not {others}"
    if translated.parts:
        parts = [f"{count} of {part}" for part, count in translated.parts.most_common()]
        report += f"; left out: {', '.join(parts[:6])}{' …' if len(parts) > 6 else ''}"
    return report


def _other_eps(translated: Match, backbone: Backbone, key: str) -> str:
    """Returns, for the report, that the file's network divides by another standard deviation, which no tensor tells."""
    own = {part.eps for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)}
    if translated.eps is None or own <= {translated.eps}:
        return ""
    word = f"{key}.kwargs.bn_eps={translated.eps:g}"
    other = max(own, key=lambda eps: abs(eps - translated.eps))
    return f"; the file's network has BatchNorm of eps {translated.eps:g}, this one {other:g}: ++{word}"  # ++: there or not


def refuse_non_finite(file: Path | str, tensors: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Raises CheckpointError that names the tensors with values that are not finite where those of our network are.

    Values count as the network would hold them: what overflows its precision is not finite either.
    """
    bad = []
    for name, tensor in tensors.items():
        finite = tensor.to(ours[name].dtype).isfinite()
        if not finite.all() and (count := int((~finite & ours[name].isfinite()).sum())):  # masks may hold infinities
            bad.append(f"{name} ({count:,} of {tensor.numel():,} values)")
    if bad:
        names = ", ".join(bad[:3]) + (" …" if len(bad) > 3 else "")
        raise CheckpointError(f"{file}: {len(bad)} tensors hold values that are not finite numbers: {names}")


def _advice(
    tensors: dict[str, Tensor], unexpected: dict[str, Tensor], needed: dict[str, Tensor], backbone: Backbone, key: str
) -> str:
    """Returns what makes the backbone at `key` the network of the file; where that is unknown, what is left to try."""
    missing = {bare(name): t for name, t in needed.items() if name not in tensors}
    depth = 1 + max([int(n[1]) for name in unexpected if (n := re.match(r"blocks\.(\d+)\.", name))], default=-1)
    for names, cases in ((unexpected, ADVICE["unexpected"]), (missing, ADVICE["missing"])):
        for pattern, advice in cases:
            for name, tensor in names.items():
                if re.search(pattern, name):
                    return advice.format(key=key, depth=depth, rows=tensor.shape[1] if tensor.ndim > 1 else 1)
    misfits = {bare(name): t for name, t in tensors.items() if name in needed and t.shape != needed[name].shape}
    patches = misfits.get("patch_embed.proj.weight")
    if patches is not None and set(misfits) <= {"patch_embed.proj.weight", "pos_embed"} and patches.ndim == 4:
        return (
            f"{key}.resample_patches=true resamples the patches,"
            f" +{key}.kwargs.patch_size={patches.shape[-1]} keeps those of the file"
        )
    if set(misfits) == {"conv1.weight"} and getattr(backbone.network, "stem", "").startswith("3×3"):
        return f"{key}.stem=imagenet is the first layer of the file; or begin with the rest of it: {key}.partial=true"
    if key != "backbone":
        return f"choose the network of these weights with backbone@{key}=…"
    return "choose the network of these weights with backbone=…, or begin training with what matches: backbone.partial=true"


def file_metadata(file: Path) -> dict[str, str]:
    """Returns what a safetensors file says of itself; nothing for files of other kinds."""
    return metadata(file) if file.suffix == ".safetensors" else {}


def _trained_at(file: Path) -> ImageSize | None:
    """Returns the size of the images that a run's network, or one of our files, was trained on; None where nothing says it."""
    if is_run(file):
        saved = read_preprocess(file) if (file / PREPROCESS).exists() else {}
    else:
        saved = json.loads(file_metadata(file).get("preprocess", "{}"))
    return image_size_of(saved["image_size"]) if "image_size" in saved else None


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
