"""The contract between a method and the training loop."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.backbones import Backbone
from sslctl.data.batch import Batch
from sslctl.distributed import gather

__all__ = ["Batch", "Facts", "Method", "ema_update", "feature_std", "gather", "teacher_of"]


@dataclass(frozen=True)
class Facts:
    """What a method may know about the run."""

    channels: int
    image_size: int
    num_images: int
    num_classes: int  # 0 where there are no labels
    batch_size: int  # global
    steps_per_epoch: int
    total_steps: int


class Method(nn.Module):
    """A training algorithm. Only `training_step` must be written; the rest has a default.

    Every tensor that influences a later step is a parameter or a persistent buffer of fixed shape, and is written in
    `after_step` from what `training_step` returned as "carry": tensors with the images along their first dimension.

    couples: why the loss of a batch is not the mean of its parts' losses, where it is not; gradient accumulation over
    parts is refused with this reason. None where every image's loss stands alone (BatchNorm is looked for besides).
    With several processes a step sees its own images only: what it compares comes through `gather`.
    """

    couples: str | None = "the method does not say that each image's loss stands alone (couples = None)"

    def __init__(self, backbone: Backbone, facts: Facts):
        super().__init__()
        self.backbone = backbone
        self.facts = facts

    def forward(self, batch: Batch, s: dict[str, float]) -> dict:
        return self.training_step(batch, s)

    def training_step(self, batch: Batch, s: dict[str, float]) -> dict:
        """Returns {"loss": (), metrics: () each, "carry": detached tensors for `after_step`}. s: `schedules` of the step."""
        raise TypeError(f"{type(self).__name__} has no training_step")

    def schedules(self, step: int) -> dict[str, float]:
        """Momenta, temperatures and the like as pure functions of the step; logged, and handed to the calls below."""
        return {}

    def start_epoch(self, epoch: int) -> None:
        """Before the first step of an epoch."""

    def before_step(self, s: dict[str, float]) -> None:
        """Once per optimizer step, before the forward."""

    def after_backward(self, s: dict[str, float]) -> None:
        """Between backward and clipping: frozen gradients are set to None here."""

    def after_step(self, s: dict[str, float], carry: dict[str, Tensor]) -> None:
        """After the optimizer: the only place where a queue, a centre or a teacher is written."""

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) in [0, 1] -> named (B, D); the first is what evaluations take unless told otherwise."""
        return {"backbone": self.backbone(images)}

    def notes(self) -> list[str]:
        """Sentences for the plan: what a user should know about these settings on this dataset."""
        return []


def teacher_of(module: nn.Module) -> nn.Module:
    """A copy that takes no gradient. It stays in train mode: its BatchNorm keeps running statistics of its own."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum · teacher + (1 - momentum) · student, parameters only (MoCo eq. 2, BYOL eq. 1)."""
    targets, sources = list(teacher.parameters()), list(student.parameters())
    torch._foreach_lerp_(targets, sources, 1 - momentum)


@torch.no_grad()
def feature_std(z: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of unit-length rows, times √D: 1 when spread evenly, 0 collapsed.

    z: (B, D), this process's rows. SimSiam, arXiv:2011.10566, section 4.1.
    """
    return F.normalize(gather(z.detach().float()), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5
