"""What is evaluated: the trained weights of a run, the same network with random weights, raw pixels, given weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from sslctl.data.modality import IMAGES
from sslctl.data.sources import Source
from sslctl.errors import InputError
from sslctl.evaluation.provenance import UNKNOWN, Origin
from sslctl.factory.exportable import feature_function, feature_names
from sslctl.factory.from_config import build_backbone, refuse_size
from sslctl.factory.from_run import load_method, open_run, run_preprocess
from sslctl.methods.base import Method
from sslctl.models.lora import merge_
from sslctl.models.preprocess import Preprocess, TextPreprocess
from sslctl.models.weights import weights_sha256


@dataclass(frozen=True)
class Subject:
    """Something that turns images into features."""

    name: str  # trained, random (fine-tuned: scratch), pixels or given: that it began with, or that were handed over
    function: Callable[[Tensor], Tensor]  # (B, C, H, W) in [0, 1] -> (B, D)
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
        """Returns what the function runs through: what a device must hold."""
        return self.method or self.backbone

    @torch.no_grad()
    def width(self) -> int:
        """Returns D, found by one look at an example on the CPU, where its networks still are."""
        return self.function(self.preprocess.example(torch.device("cpu"))).shape[1]


PARTLY = "backbone.partial=true: weights of which only some were loaded are no network to measure or to hand on"


def trained(run: Path, path: Path, features: str | None, backbone_node: Any | None = None) -> Subject:
    """Returns the network of a run with the weights of a checkpoint."""
    opened = open_run(run, path, backbone_node)
    return method_subject("trained", opened.method, opened.preprocess, features, opened.step)


def given_to(run: Path, features: str | None, backbone_node: Any | None = None) -> Subject:
    """Returns the run's network with the weights that it was given to begin with, its heads as they are initialised."""
    return method_subject("given", load_method(run, backbone_node, given=True), run_preprocess(run), features, 0)


def random(run: Path, features: str | None, backbone_node: Any | None = None) -> Subject:
    """Returns the run's network with random weights: those it began with, unless it was given others."""
    return method_subject("random", load_method(run, backbone_node), run_preprocess(run), features, 0)


def method_subject(name: str, method: Method, preprocess: Preprocess, features: str | None, step: int) -> Subject:
    """Returns one of a method's features as a subject; the first unless named. Raises InputError for one it lacks.

    What LoRA has learned is merged, in the method itself where it has just been trained: the weights that are kept are judged.
    """
    method = method.eval()
    merge_(method)
    names = feature_names(method, preprocess)
    chosen = features or names[0]
    if chosen not in names:
        raise InputError(f"features={chosen}: this method offers {', '.join(names)}")
    backbone = method.backbone
    return Subject(
        name,
        feature_function(method, chosen, preprocess),
        preprocess,
        chosen,
        weights_sha256(method),
        sum(p.numel() for p in backbone.parameters()),
        step,
        step / method.facts.steps_per_epoch,
        backbone,
        method,
    )


def judged_at(subject: Subject, source: Source, key: str = "dataset") -> Subject:
    """Returns a subject that takes images of a source's size: networks of convolutions as they are, vision transformers by
    resampled positions. Raises InputError for a network that takes no other size than its own."""
    if subject.preprocess.modality != IMAGES or source.image_size == subject.preprocess.image_size:
        return subject
    if subject.backbone is not None:
        refuse_size(subject.backbone, source.image_size, key)
    return replace(subject, preprocess=subject.preprocess.at(source.image_size))


# Keys of a backbone, each with the value that asks for nothing: how a pretraining learns, and what weights it begins with.
_OF_PRETRAINING = {"freeze": None, "freeze_epochs": None, "lora.rank": 0}
_OF_WEIGHTS = {"weights": None, "pretrained": False, "partial": False, "resample_patches": False, "normalization": None}


def refuse_keys_without_effect(node: Any, *, of_run: bool) -> None:
    """Raises InputError for keys of a backbone's configuration that would be passed over. of_run: its weights are a run's."""
    reasons = dict.fromkeys(
        _OF_PRETRAINING, " says how a pretraining (pretrain, adapt) learns; here the whole network is taken"
    )
    reasons |= dict.fromkeys(_OF_WEIGHTS, ": a run has its own weights, with their mean and std")
    for key, value in (_OF_PRETRAINING | (_OF_WEIGHTS if of_run else {})).items():
        if OmegaConf.select(node, key, default=value) != value:
            advice = f"backbone.{key}={'null' if value is None else str(value).lower()}"
            raise InputError(f"backbone.{key}{reasons[key]}: {advice}", advice=[advice])


def given(node: Any, preprocess: Preprocess, *, with_weights: bool) -> Subject:
    """Builds a backbone that is no run's: backbone=… backbone.weights=FILE, or the same without its weights.

    Raises InputError for keys that say how a pretraining goes on from them.
    """
    refuse_keys_without_effect(node, of_run=False)
    torch.manual_seed(0)
    backbone = build_backbone(node, preprocess, with_weights=with_weights).eval()
    name = "given" if with_weights else "random"
    params, digest = sum(p.numel() for p in backbone.parameters()), weights_sha256(backbone)
    return Subject(name, backbone, preprocess, "backbone", digest, params, None, None, backbone)


def pixels(preprocess: Preprocess) -> Subject:
    """Returns the images themselves, flattened, as features."""
    if not preprocess.modality.visible:
        raise InputError("texts have no pixels: subjects=[trained,random]", advice=["subjects=[trained,random]"])
    return Subject("pixels", lambda images: images.flatten(1), preprocess, "pixels", "pixels", 0)
