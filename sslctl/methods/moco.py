"""MoCo: a query against its key and a queue of earlier keys (He et al. 2020, arXiv:1911.05722; v2: arXiv:2003.04297)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.distributed import gather_on_host, local_rows
from sslctl.losses import info_nce
from sslctl.methods.base import (
    Batch,
    Facts,
    Method,
    ema_update,
    feature_std,
    gather,
    random_units,
    teacher_of,
    two_views,
)
from sslctl.models.backbones import Backbone
from sslctl.models.batchnorm import group_batchnorm
from sslctl.models.heads import mlp
from sslctl.schedules import cosine_between
from sslctl.transfer import to_device


class MoCo(Method):
    """Algorithm 1 of the paper. v1: a linear projector; v2: two layers without BatchNorm; v2+: symmetric loss.

    State: student, teacher, queue (K, D) of unit rows, the image each key came from, the place of the next write.
    B rows are this process's, G the global batch's.
    batchnorm_groups: BatchNorm in so many groups of the global batch, each a device of the paper's; the teacher's
    groups are drawn anew at every step ("shuffling BN", section 3.3), so no query shares its key's statistics.
    """

    global_views = 2, 2
    batch_coupling = None  # a query's negatives are in the queue

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        projector_layers: int,
        hidden_dim: int | None,
        out_dim: int,
        queue_size: int,
        temperature: float,
        teacher_momentum: float,
        teacher_momentum_end: float,
        symmetric: bool,
        batchnorm_groups: int,
    ):
        super().__init__(backbone, facts)
        width = backbone.embed_dim
        if facts.batch_size % batchnorm_groups:
            raise ValueError(
                f"batchnorm_groups={batchnorm_groups} does not divide trainer.batch_size={facts.batch_size}"
            )
        group_batchnorm(backbone, batchnorm_groups)
        self.batchnorm_groups = batchnorm_groups
        self.projector = mlp(width, hidden_dim or width, out_dim, projector_layers, norm=False)
        self.teacher_backbone = teacher_of(backbone)
        self.teacher_projector = teacher_of(self.projector)
        self.register_buffer("queue", random_units(queue_size, out_dim))  # (K, D)
        self.register_buffer("queue_index", torch.full((queue_size,), -1))  # (K,), -1: no image's key yet
        self.register_buffer("queue_pointer", torch.tensor(0))
        self.temperature, self.symmetric = temperature, symmetric
        self.teacher_momentum, self.teacher_momentum_end = teacher_momentum, teacher_momentum_end

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h), "teacher": self.teacher_backbone(images)}

    def feature_networks(self) -> dict[str, tuple[Backbone, str]]:
        return super().feature_networks() | {"teacher": (self.teacher_backbone, "own")}

    def schedules(self, step: int) -> dict[str, float]:
        start, end = self.teacher_momentum, self.teacher_momentum_end
        return {"teacher_momentum": cosine_between(start, end, step, self.facts.total_steps)}

    def before_step(self, schedules: dict) -> None:
        ema_update(self.teacher_backbone, self.backbone, schedules["teacher_momentum"])
        ema_update(self.teacher_projector, self.projector, schedules["teacher_momentum"])

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x1, x2 = two_views(batch)  # (B, C, H, W) each
        index = gather(batch.index)  # (G,) of the global batch
        own = self.queue_index == index[:, None]  # (G, K), keys of the query's own image: not negatives
        h1, k2 = self.backbone(x1), self.keys(x2, batch)
        loss, keys = self.contrast(h1, k2, own), [k2]
        if self.symmetric:
            keys.append(self.keys(x1, batch))
            loss = (loss + self.contrast(self.backbone(x2), keys[1], own)) / 2
        carry = {"keys": torch.stack(keys, 1), "index": index}  # both halves are written together, after the step
        return {"loss": loss, "feature_std": feature_std(h1), "carry": carry}

    def contrast(self, h: Tensor, key: Tensor, own: Tensor) -> Tensor:
        """h: (B, D) student features; key: (G, out_dim), the positive; own: (G, K) bool."""
        return info_nce(gather(self.projector(h)), key, self.queue, self.temperature, excluded=own)

    @torch.no_grad()
    def keys(self, images: Tensor, batch: Batch) -> Tensor:
        """(B, C, H, W) -> (G, out_dim), unit rows; BatchNorm groups of a random membership in the global batch."""
        if self.batchnorm_groups == 1:
            k = gather(self.teacher_projector(self.teacher_backbone(images)))
            return F.normalize(k.float(), dim=1)
        key = batch.host_key  # few numbers, whose hash takes more operations than a GPU has to calculate
        order = key.of(gather_on_host(key.index)).bits("moco/shuffle").argsort(dim=0)  # (G,)
        order, back = to_device(torch.stack([order, order.argsort()]), images.device)
        shuffled = gather(images)[order][local_rows(len(order))]
        k = gather(self.teacher_projector(self.teacher_backbone(shuffled)))
        return F.normalize(k.float(), dim=1)[back]

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        keys = carry["keys"].transpose(0, 1).flatten(0, 1)  # (G, V, out_dim) -> (V·G, out_dim)
        index = carry["index"].repeat(carry["keys"].shape[1])
        keys, index = keys[-len(self.queue) :], index[-len(self.queue) :]
        places = (self.queue_pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places], self.queue_index[places] = keys, index
        self.queue_pointer.copy_((self.queue_pointer + len(keys)) % len(self.queue))

    def uninformative_loss(self) -> float:
        return math.log(1 + len(self.queue))

    def notes(self) -> list[str]:
        size, images = len(self.queue), self.facts.num_images
        if size <= images:
            return []
        return [
            f"method.queue_size={size:,} is longer than the {images:,} images: an image has up to"
            f" {-(-size // images)} keys in the queue, and its queries skip them all"
        ]
