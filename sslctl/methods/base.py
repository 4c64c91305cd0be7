"""The contract between a method and the training loop."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.data.batch import Batch
from sslctl.data.modality import IMAGES, Modality
from sslctl.distributed import gather
from sslctl.models.backbones import Backbone
from sslctl.models.lora import merged_parameters
from sslctl.models.vit import timm_if_imported
from sslctl.ops.image_size import ImageSize

__all__ = [
    *("Batch", "Embed", "Facts", "Method", "clip_each_", "ema_update", "embedding_std", "enqueue", "feature_std"),
    *("features_of_tokens", "mean_of_patches", "networks_of_tokens"),
    *("gather", "gather_views", "global_mean", "multi_crop", "over_crops", "random_units", "teacher_of", "two_views"),
]


@dataclass(frozen=True)
class Facts:
    """What a method may know about the run."""

    channels: int
    image_size: ImageSize
    num_images: int
    num_classes: int  # 0 where there are no labels
    batch_size: int  # global
    steps_per_epoch: int
    total_steps: int


class Embed(Protocol):
    """Embeds the images of a run, for `Method.start_epoch`. In loops of a second and more of its own a method calls
    `sslctl.signals.check()`, which raises where the run is asked to stop."""

    def __call__(self, function: Callable[[Tensor], Tensor], *, calibrate: bool = False) -> Tensor:
        """function: (B, C, H, W) -> (B, D), over all clean training images in the order of the dataset, in eval mode and
        without gradient: (N, D). calibrate: BatchNorm's running statistics are first made those of some of the images."""


class Method(nn.Module):
    """A training algorithm. Only `training_step` must be written; the rest has a default.

    Every tensor that influences a later step is a parameter or a persistent buffer of fixed shape, and is written in
    `after_step` from what `training_step` returned as "carry": tensors with the images along their first dimension.

    batch_coupling: why the loss of a batch is not the mean of its parts' losses, where it is not; gradient accumulation over
    parts is refused with this reason. None where every image's loss stands alone (BatchNorm is looked for besides).
    With several processes a step sees its own images only: what it compares comes through `gather`.
    modality: what the method takes, which the dataset must have.
    squares_only: whether it takes square images alone, because it turns them or lays them out in a square.
    view_groups: the groups of views that it cannot do without. global_views: the least and the largest number of the global
    ones that it can do with; None for no limit.
    judged: which network is a run's result, "backbone" or "teacher", as network= says; None: that of the first of `features`.
    """

    batch_coupling: str | None = "the method does not say that each image's loss stands alone (batch_coupling = None)"
    modality: Modality = IMAGES
    view_groups: tuple[str, ...] = ("global",)
    global_views: tuple[int, int | None] = (1, None)
    squares_only: bool = False
    judged: str | None = None

    def __init__(self, backbone: Backbone, facts: Facts):
        super().__init__()
        self.backbone = backbone
        self.facts = facts

    def forward(self, batch: Batch, schedules: dict[str, float]) -> dict:
        return self.training_step(batch, schedules)

    def training_step(self, batch: Batch, schedules: dict[str, float]) -> dict:
        """Returns {"loss": (), metrics: () each, "carry": detached tensors for `after_step`}. schedules: values of the step."""
        raise TypeError(f"{type(self).__name__} has no training_step")

    def schedules(self, step: int) -> dict[str, float]:
        """Momenta, temperatures and the like as pure functions of the step; logged, and handed to the calls below."""
        return {}

    def start_epoch(self, epoch: int, embed: Embed) -> None:
        """Before the first step of an epoch; again, from the state before, where a signal cuts it short. The one other place
        where buffers are written: by the first process, whose tensors, but not attributes, the others take."""

    def before_step(self, schedules: dict[str, float]) -> None:
        """Once per optimizer step, before the forward."""

    def after_backward(self, schedules: dict[str, float]) -> None:
        """Between backward and clipping: frozen gradients are set to None here."""

    def after_step(self, schedules: dict[str, float], carry: dict[str, Tensor]) -> None:
        """After the optimizer: the only place where a queue, a centre or a teacher is written."""

    def parameter_groups(self) -> list[dict]:
        """{"params": [...]} each, with lr_scale, weight_decay_scale or scheduled=False (a constant learning rate) where a
        group has another than the rest. Parameters that ask for no gradient are left out by the optimizer."""
        return [{"params": list(self.parameters())}]

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) in [0, 1] -> named (B, D); the first is what evaluations take unless told otherwise."""
        return {"backbone": self.backbone(images)}

    def feature_networks(self) -> dict[str, tuple[Backbone, str]]:
        """For each of `features` that is a network's own output, that network, which files then hold: pooled its "own" way, or
        by the "mean" over a vision transformer's patches. Features that the method makes more of are left out."""
        return {"backbone": (self.backbone, "own")}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """What the method makes of a few images, named in the order in which they are shown side by side: (n, C, h, w)
        each, in [0, 1]. Called in eval mode without gradient; empty where there is nothing to see."""
        return {}

    def uninformative_loss(self) -> float | None:
        """The loss of outputs that say nothing about their image, from the settings alone; None where data decide it."""
        return None

    def notes(self) -> list[str]:
        """Sentences for the plan: what a user should know about these settings on this dataset."""
        return []


def global_mean(value: Tensor) -> Tensor:
    """() -> (): the mean over processes of a mean over each one's own images, with its gradient."""
    return gather(value[None]).mean()


def features_of_tokens(teacher: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Features (B, D) of methods that learn by a teacher's tokens: its class token, and the mean of its patches."""
    tokens = teacher.tokens(images)  # (B, P + L, D)
    prefix = teacher.vision_transformer().num_prefix_tokens
    return {"teacher": tokens[:, 0], "mean": tokens[:, prefix:].mean(1)}


def mean_of_patches(network: Backbone, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, D): the mean of a vision transformer's patches."""
    return network.tokens(images)[:, network.vision_transformer().num_prefix_tokens :].mean(1)


def networks_of_tokens(teacher: Backbone) -> dict[str, tuple[Backbone, str]]:
    """What `Method.feature_networks` says of `features_of_tokens`."""
    return {"teacher": (teacher, "own"), "mean": (teacher, "mean")}


def two_views(batch: Batch) -> Tensor:
    """The two global views (2, B, C, H, W) of a method that compares two. Raises ValueError for another number."""
    views = batch.views["global"]
    if len(views) != 2:
        raise ValueError(f"this method compares two global views, the augmentation makes {len(views)}")
    return views


def multi_crop(network: nn.Module, batch: Batch) -> Tensor:
    """All views' outputs (V, B, D), the global ones first: one forward for each resolution (SwAV, section 3.3)."""
    outputs = []
    for group in ("global", "local"):
        if group in batch.views:
            views = batch.views[group]  # (V, B, C, h, w)
            outputs.append(network(views.flatten(0, 1)).unflatten(0, views.shape[:2]))
    return torch.cat(outputs)


def over_crops(head: nn.Module, h: Tensor) -> Tensor:
    """A head on all crops' features (V, B, D) at once -> (V, B, K): its BatchNorms see all crops as one batch, as those of
    the official codes of SwAV, DeepCluster-v2, DINO and W-MSE do; MSN's sees one size at a time."""
    return head(h.flatten(0, 1)).unflatten(0, h.shape[:2])


def gather_views(z: Tensor) -> Tensor:
    """(V, B, D) of this process's images -> (V, G, D) of the global batch, in one message."""
    return gather(z.transpose(0, 1)).transpose(0, 1)


def random_units(count: int, dim: int) -> Tensor:
    """(count, dim) rows of unit length: what a queue holds before its first keys. Raises ValueError for no rows."""
    if count < 1:
        raise ValueError(f"a queue or memory of {count} embeddings: expected at least 1")
    return F.normalize(torch.randn(count, dim), dim=1)


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Writes keys (n, D) over the oldest rows of a queue (K, D), and moves its pointer () on. Wraps at the end."""
    keys = keys[-len(queue) :]
    queue[(pointer + torch.arange(len(keys), device=keys.device)) % len(queue)] = keys
    pointer.copy_((pointer + len(keys)) % len(queue))


def clip_each_(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scales every gradient by itself to at most a norm (DINO's official code; not the global norm)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))  # (gradients,)
    torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp(max=1.0).unbind()))


def teacher_of(module: nn.Module) -> nn.Module:
    """A copy that takes no gradient, without drop path and dropout (DINO, official code: for the student only).

    It stays in train mode: its BatchNorm keeps running statistics of its own.
    """
    teacher, timm = copy.deepcopy(module).requires_grad_(False), timm_if_imported()
    for part in teacher.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif timm and isinstance(part, timm.layers.DropPath):
            part.drop_prob = 0.0
    return teacher


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum · teacher + (1 - momentum) · student, parameters only (MoCo eq. 2, BYOL eq. 1).

    Of layers that learn by LoRA, the teacher is a mean of their merged weights.
    """
    targets, sources = list(teacher.parameters()), merged_parameters(student)
    torch._foreach_lerp_(targets, sources, 1 - momentum)


@torch.no_grad()
def embedding_std(z: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of rows as they are: their scale is what a variance term holds up.

    z: (G, D), the rows of all processes. Lengths that shrink to nothing do not show in `feature_std`.
    """
    return z.detach().float().std(dim=0).mean()


@torch.no_grad()
def feature_std(z: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of unit-length rows, times √D: 1 when spread evenly, 0 collapsed.

    z: (B, D), this process's rows. SimSiam, arXiv:2011.10566, section 4.1.
    """
    return F.normalize(gather(z.detach().float()), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5
