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
from sslctl.runs.checkpoint import CheckpointError, compare, load_pickle, load_tensors, metadata, newest_valid
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
    """Named tensors of a file, or of a run's backbone: the one that was evaluated, before the end its student.

    Never runs code from the file.
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
    tensors = load_tensors(newest / "weights.safetensors")
    return {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}


def load_weights(backbone: Backbone, path: str, *, partial: bool, key: str = "backbone") -> str:
    """Copies foreign weights into a backbone and returns a report; refuses any missing or misshapen tensor.

    partial: load what matches all the same. The file's classifier is left out and reported. key: where
    the configuration has the backbone.
    """
    file = user_path(path)
    found = read_weights(file)
    expected = backbone.state_dict()
    inner = {name.removeprefix("network."): name for name in expected if name.startswith("network.")}
    renamed = max(
        (_rename(found, prefix, inner, expected) for prefix in _PREFIXES), key=lambda r: len(r.keys() & expected.keys())
    )
    own = {"mean", "std"}  # the normalisation is sslctl's; foreign files have none
    counters = {name for name in expected if name.endswith("num_batches_tracked")}  # absent in old files, not used
    matched = {n: t for n, t in renamed.items() if n in expected and t.shape == expected[n].shape}
    unexpected = {n for n in renamed if n not in expected}
    classifiers = {n for n in unexpected if n.removeprefix("network.").startswith(_CLASSIFIERS)}
    needed = {n: t for n, t in expected.items() if n in matched or n not in own | counters}
    differences = compare({n: t for n, t in renamed.items() if n not in classifiers}, needed)
    report = (
        f"weights {file}: {len(matched)} of {len(needed)} tensors matched, {len(needed) - len(matched)} missing,"
        f" {len(unexpected)} unexpected" + (f" ({len(classifiers)} of a classifier, left out)" if classifiers else "")
    )
    report += _network_differences(file, backbone)
    if differences and not partial:
        raise CheckpointError(report, *differences, _advice(renamed, backbone, key))
    if not matched:
        raise CheckpointError(f"{report}: not one tensor fits this backbone")
    backbone.load_state_dict({**expected, **matched}, strict=True)
    backbone.given = frozenset(matched)
    return report


def _advice(found: dict[str, Tensor], backbone: Backbone, key: str) -> str:
    """What may help where the tensors found do not fit those of the backbone at `key`."""
    expected = backbone.state_dict()
    words = "load what matches all the same with backbone.partial=true"
    if key != "backbone":
        words = f"choose the network of these weights with backbone@{key}=…"
    misfits = [n for n, t in found.items() if n in expected and t.shape != expected[n].shape]
    if misfits == ["network.model.pos_embed"] and not backbone.network.fixed_size:  # by its number of places alone
        places = found[misfits[0]].shape[1]
        side = math.isqrt(places)  # the class token and registers are fewer than another row of patches
        pixels = side * patch_size_of(backbone.network)
        words = (
            f"for weights of images of {pixels} pixels, +{key}.kwargs.img_size={pixels} resamples the position embedding;"
            f" else {words}"
        )
    return words


def file_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing by files of other kinds."""
    return metadata(file) if file.suffix == ".safetensors" else {}


def _network_differences(file: Path, backbone: Backbone) -> str:
    """In what a run's or an exported network is another one than its weights alone make."""
    if is_run(file) and not (file / BACKBONE).exists():
        return "; the run is not finished: of its student"
    said = file_metadata(file / BACKBONE if is_run(file) else file)
    words = "; its network saw the lightness of colours alone" if said.get("sees") == "lightness" else ""
    kwargs = json.loads(said.get("backbone", "{}")).get("kwargs", {})
    model = getattr(backbone.network, "model", None)
    heads, pool = kwargs.get("num_heads"), kwargs.get("global_pool")
    attention = next((part for part in backbone.modules() if hasattr(part, "num_heads")), None)
    if heads and heads != getattr(attention, "num_heads", heads):
        words += f"; its network had other heads: backbone.kwargs.num_heads={heads}"
    if pool and pool != getattr(model, "global_pool", pool):
        words += (
            f"; its features were pooled otherwise: +backbone.kwargs.global_pool={pool} +backbone.kwargs.fc_norm=false"
        )
    return words


def _rename(found: dict[str, Tensor], prefix: str, inner: dict[str, str], expected: dict) -> dict[str, Tensor]:
    """Names without a prefix, in the backbone's own terms; names that do not begin with it are left out of the match."""
    stripped = {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}
    return {name if name in expected else inner.get(name, _timm_name(name, inner)): t for name, t in stripped.items()}


def _timm_name(name: str, inner: dict[str, str]) -> str:
    """The place of a bare timm name in a backbone that keeps the model under `model.`."""
    return inner.get(f"model.{name}", name)


def weights_sha256(module: nn.Module) -> str:
    """One digest of all tensors of a module, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
