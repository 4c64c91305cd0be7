"""What is evaluated: the trained weights of a run, the same network with random weights, raw pixels, foreign weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from sslctl import checkpoint
from sslctl.build import build_backbone, build_method
from sslctl.config import InputError, user_path
from sslctl.evaluation.origin import UNKNOWN, Origin
from sslctl.methods.base import Facts, Method
from sslctl.preprocess import Preprocess, TextPreprocess, preprocess_from
from sslctl.representation import offered
from sslctl.run_directory import ENVIRONMENT, PREPROCESS, TOKENIZER, find_runs, read_config, read_json
from sslctl.teachers import KEPT, load_teacher
from sslctl.weights import weights_sha256


@dataclass(frozen=True)
class Subject:
    """Something that turns images into features."""

    name: str  # trained, random (fine-tuned: scratch), pixels or foreign
    function: Callable[[Tensor], Tensor]  # (B, C, S, S) in [0, 1] -> (B, D)
    preprocess: Preprocess | TextPreprocess
    features: str  # which of a method's features
    weights_sha256: str
    params: int
    step: int | None = None
    epoch: float | None = None
    backbone: nn.Module | None = None
    method: Method | None = None  # of a run
    origin: Origin = UNKNOWN

    @property
    def module(self) -> nn.Module | None:
        """Whatever the function runs through: what a device must hold."""
        return self.method or self.backbone


PARTLY = "backbone.partial=true: weights of which only some were loaded are no network to measure or to hand on"


def resolve_runs(ckpt: Any) -> list[tuple[Path, Path]]:
    """(run, checkpoint) for every run that ckpt= names: runs, checkpoints of runs, or directories searched for runs.

    Of a directory, runs without a checkpoint are left out and named; one that ckpt= names itself is refused.
    """
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
        newest = {run: checkpoint.newest_valid(run) for run in runs}
        empty = [run for run in runs if newest[run] is None]
        if len(empty) == len(runs):
            raise InputError(*(f"ckpt={run}: this run has no valid checkpoint yet" for run in empty))
        for run in empty:
            print(f"left out: {run} has no valid checkpoint yet")
        found += [(run, newest[run]) for run in runs if newest[run] is not None]
    return found


def with_tokenizer(node: Any, run: Path) -> Any:
    """A dataset's configuration with the tokenizer of a run, where the dataset is of texts and names none."""
    kept = run / TOKENIZER
    if "tokenizer" not in node or node.tokenizer or not kept.exists():
        return node
    return OmegaConf.merge(node, {"tokenizer": str(kept)})


def dataset_of(run: Path, key: str = "dataset") -> Any:
    """A dataset's configuration of a run; a relative root is looked for here, then where the run was started."""
    node = OmegaConf.create(read_config(run)[key])
    root = node.get("root")
    if root and not user_path(root).exists():
        there = Path(read_json(run / ENVIRONMENT)["cwd"]) / user_path(root)
        if there.exists():
            node.root = str(there)
    return with_tokenizer(node, run)


def run_preprocess(run: Path) -> Preprocess | TextPreprocess:
    return preprocess_from(read_json(run / PREPROCESS))


def load_method(run: Path, backbone_node: Any | None = None) -> Method:
    """The method of a run as its configuration says, untrained. backbone_node: another backbone than the run's."""
    config = OmegaConf.create(read_config(run))
    torch.manual_seed(config.seed)
    facts = Facts(**read_json(run / ENVIRONMENT)["facts"])
    preprocess = run_preprocess(run)
    backbone = build_backbone(backbone_node or config.backbone, preprocess, with_weights=False)
    teacher = load_teacher(str(run / KEPT), None, preprocess) if "teacher" in config.method else None
    return build_method(config.method, backbone, facts, teacher)


def trained(run: Path, path: Path, wanted: str | None, backbone_node: Any | None = None) -> Subject:
    """The weights of a checkpoint, every tensor of which must match."""
    method = load_method(run, backbone_node)
    state = checkpoint.load(path, method)
    return method_subject("trained", method, run_preprocess(run), wanted, state["step"])


def random(run: Path, wanted: str | None, backbone_node: Any | None = None) -> Subject:
    """The run's network with the weights it began with."""
    return method_subject("random", load_method(run, backbone_node), run_preprocess(run), wanted, 0)


def method_subject(name: str, method: Method, preprocess: Preprocess, wanted: str | None, step: int) -> Subject:
    """Evaluates one of a method's features; the first unless named."""
    method = method.eval()
    names = offered(method, preprocess)
    chosen = wanted or names[0]
    if chosen not in names:
        raise InputError(f"features={chosen}: this method offers {', '.join(names)}")
    backbone = method.backbone
    return Subject(
        name,
        lambda images: method.features(images)[chosen],
        preprocess,
        chosen,
        weights_sha256(method),
        sum(p.numel() for p in backbone.parameters()),
        step,
        step / method.facts.steps_per_epoch,
        backbone,
        method,
    )


def foreign(node: Any, preprocess: Preprocess, *, with_weights: bool) -> Subject:
    """A backbone that is no run's: backbone=… backbone.weights=FILE, or the same without its weights."""
    torch.manual_seed(0)
    backbone = build_backbone(node, preprocess, with_weights=with_weights).eval()
    name = "foreign" if with_weights else "random"
    params, digest = sum(p.numel() for p in backbone.parameters()), weights_sha256(backbone)
    return Subject(name, backbone, preprocess, "backbone", digest, params, None, None, backbone)


def pixels(preprocess: Preprocess) -> Subject:
    """The images themselves, flattened."""
    if isinstance(preprocess, TextPreprocess):
        raise InputError("texts have no pixels: subjects=[trained,random]")
    return Subject("pixels", lambda images: images.flatten(1), preprocess, "pixels", "pixels", 0)
