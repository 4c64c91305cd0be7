"""What is evaluated: the trained weights of a run, the same network with random weights, raw pixels, foreign weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from sslctl import checkpoint
from sslctl.build import Preprocess, build_backbone, build_method
from sslctl.config import InputError, user_path
from sslctl.methods.base import Facts, Method
from sslctl.run_directory import ENVIRONMENT, PREPROCESS, find_runs, read_config, read_json
from sslctl.weights import weights_sha256


@dataclass(frozen=True)
class Subject:
    """Something that turns images into features."""

    name: str  # trained, random, pixels or foreign
    function: Callable[[Tensor], Tensor]  # (B, C, S, S) in [0, 1] -> (B, D)
    preprocess: Preprocess
    features: str  # which of a method's features
    weights_sha256: str
    params: int
    step: int | None = None
    backbone: nn.Module | None = None


def resolve_runs(ckpt: Any) -> list[tuple[Path, Path]]:
    """(run, checkpoint) for every run that ckpt= names: runs, checkpoints of runs, or directories searched for runs."""
    words = [ckpt] if isinstance(ckpt, str) else list(ckpt or [])
    found = []
    for word in words:
        path = user_path(word)
        if not path.exists():
            raise InputError(f"ckpt={path}: no such run")
        if path.is_file():
            raise InputError(
                f"ckpt={path} is a file, not a run directory; weights from elsewhere are evaluated with"
                " backbone=… backbone.weights=FILE"
            )
        if path.name.startswith("step-") and (path / "manifest.json").exists():
            checkpoint.verify(path)
            found.append((path.resolve().parents[1], path))
            continue
        runs = find_runs(path)
        if not runs:
            raise InputError(f"ckpt={path}: no run directory there (no config.yaml with environment.json)")
        for run in runs:
            newest = checkpoint.newest_valid(run)
            if newest is None:
                raise InputError(f"ckpt={run}: this run has no valid checkpoint yet")
            found.append((run, newest))
    return found


def run_preprocess(run: Path) -> Preprocess:
    return Preprocess(**read_json(run / PREPROCESS))


def load_method(run: Path, backbone_node: Any | None = None) -> Method:
    """The method of a run as its configuration says, untrained. backbone_node: another backbone than the run's."""
    config = OmegaConf.create(read_config(run))
    torch.manual_seed(config.seed)
    facts = Facts(**read_json(run / ENVIRONMENT)["facts"])
    backbone = build_backbone(backbone_node or config.backbone, run_preprocess(run), with_weights=False)
    return build_method(config.method, backbone, facts)


def trained(run: Path, path: Path, wanted: str | None, backbone_node: Any | None = None) -> Subject:
    """The weights of a checkpoint, every tensor of which must match."""
    method = load_method(run, backbone_node)
    state = checkpoint.load(path, method)
    return method_subject("trained", method, run_preprocess(run), wanted, state["step"])


def random(run: Path, wanted: str | None) -> Subject:
    """The run's network with the weights it began with."""
    return method_subject("random", load_method(run), run_preprocess(run), wanted, 0)


def method_subject(name: str, method: Method, preprocess: Preprocess, wanted: str | None, step: int) -> Subject:
    """Evaluates one of a method's features; the first unless named."""
    method = method.eval()
    device = next(method.parameters()).device
    with torch.no_grad():
        probe = torch.zeros(2, preprocess.channels, preprocess.image_size, preprocess.image_size, device=device)
        offered = list(method.features(probe))
    chosen = wanted or offered[0]
    if chosen not in offered:
        raise InputError(f"features={chosen}: this method offers {', '.join(offered)}")
    backbone = method.backbone
    return Subject(
        name,
        lambda images: method.features(images)[chosen],
        preprocess,
        chosen,
        weights_sha256(method),
        sum(p.numel() for p in backbone.parameters()),
        step,
        backbone,
    )


def foreign(node: Any, preprocess: Preprocess, *, with_weights: bool) -> Subject:
    """A backbone that is no run's: backbone=… backbone.weights=FILE, or the same without its weights."""
    torch.manual_seed(0)
    backbone = build_backbone(node, preprocess, with_weights=with_weights).eval()
    name = "foreign" if with_weights else "random"
    params = sum(p.numel() for p in backbone.parameters())
    return Subject(name, backbone, preprocess, "backbone", weights_sha256(backbone), params, None, backbone)


def pixels(preprocess: Preprocess) -> Subject:
    """The images themselves, flattened."""
    return Subject("pixels", lambda images: images.flatten(1), preprocess, "pixels", "pixels", 0)
