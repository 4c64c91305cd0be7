"""Distillation of features: a student of any kind gives what a frozen teacher of any kind gives, no label between."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn, tensor

from sslctl.losses import memory_distillation, negative_cosine, squared_error
from sslctl.methods.base import Batch, Facts, Method, enqueue, feature_std, gather, global_mean, random_units
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp
from sslctl.models.teacher import Teacher
from sslctl.ops.image_size import height_width


class Distill(Method):
    """Student and teacher see the same view; heads on the student give features as wide as the teacher's.

    loss, of the pooled features. "queue": the divergence of the student's similarities to the teacher's last queue_size
    embeddings, those of the batch among them, from the teacher's own: function matching (Beyer et al. 2022, arXiv:2106.05237)
    with embeddings for classes, as LightlyTrain distils. "cosine": AM-RADIO (arXiv:2312.06709, section 3.3). "mse": FitNets
    (arXiv:1412.6550, eq. 3). patch_loss, of the features of places or patches: "cosine" or "mse", the student's resampled to
    the teacher's grid. weight, patch_weight: of each; 0 leaves it out. Where a network has no places, they are left out.
    head_layers: Linears of a head; hidden_dim: between them.

    State of the queue: queue (K, D) of unit teacher embeddings, the place of the next write.
    """

    batch_coupling = "images are compared with the others of their batch"

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        teacher: Teacher,
        loss: str,
        weight: float,
        patch_loss: str,
        patch_weight: float,
        queue_size: int,
        temperature: float,
        head_layers: int,
        hidden_dim: int,
    ):
        super().__init__(backbone, facts)
        if loss not in ("queue", "cosine", "mse"):
            raise ValueError(f"loss={loss}: expected queue, cosine or mse")
        if patch_loss not in ("cosine", "mse"):
            raise ValueError(f"patch_loss={patch_loss}: expected cosine or mse")
        self.teacher, self.loss, self.patch_loss, self.temperature = teacher, loss, patch_loss, temperature
        widths = [map_width(network, facts) if patch_weight else None for network in (backbone, teacher.network)]
        self.without_map = [who for who, width in zip(("student", "teacher"), widths, strict=True) if width is None]
        self.weight, self.patch_weight, self.asked_patch_weight = weight, patch_weight, patch_weight
        if self.without_map:
            self.patch_weight = 0.0
        if not self.weight and not self.patch_weight:
            raise ValueError("weight=0 leaves nothing to learn where there are no features of patches")

        def head(in_dim: int, out_dim: int) -> nn.Sequential:
            return mlp(in_dim, hidden_dim, out_dim, head_layers, norm=False, activation="gelu")

        self.projector = head(backbone.embed_dim, teacher.embed_dim) if self.weight else None
        self.patch_projector = head(*widths) if self.patch_weight else None
        if self.weight and loss == "queue":
            self.register_buffer("queue", random_units(queue_size, teacher.embed_dim))  # (K, D)
            self.register_buffer("queue_pointer", tensor(0))
        else:
            self.batch_coupling = None

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, d)
        projected = {} if self.projector is None else {"projector": self.projector(h)}
        return {"backbone": h, **projected, "teacher": self.teacher(images)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x = batch.views["global"][0]  # (B, C, H, W)
        if self.patch_projector is None:
            h, t = self.backbone(x), self.teacher(x)  # (B, d), (B, D)
        else:
            h, places = self.backbone.with_map(x)  # (B, d), (B, d', h, w)
            t, targets = self.teacher.with_map(x)  # (B, D), (B, D', H, W)
        loss, output = 0.0, {"feature_std": feature_std(h)}

        if self.projector is not None:
            z = self.projector(h)  # (B, D)
            output["agreement"] = global_mean(F.cosine_similarity(z.detach().float(), t).mean())
            if self.loss == "queue":
                keys = gather(F.normalize(t, dim=1))  # (G, D)
                bank = self.queue.clone()  # (K, D), with the batch's own embeddings for the oldest ones
                enqueue(bank, self.queue_pointer.clone(), keys)
                output["carry"] = {"keys": keys}
                loss = loss + self.weight * memory_distillation(z, t, bank, bank, self.temperature)
            else:
                loss = loss + self.weight * imitation(self.loss, z, t)

        if self.patch_projector is not None:
            p = self.patch_projector(places.movedim(1, -1)).movedim(-1, 1).float()  # (B, D', h, w)
            p = F.interpolate(p, targets.shape[2:], mode="bilinear", align_corners=False)  # (B, D', H, W)
            p, targets = (maps.movedim(1, -1).flatten(0, 2) for maps in (p, targets))  # (B · H · W, D')
            output["patch_agreement"] = global_mean(F.cosine_similarity(p.detach(), targets).mean())
            loss = loss + self.patch_weight * imitation(self.patch_loss, p, targets)
        return {"loss": global_mean(loss), **output}

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        if carry:
            enqueue(self.queue, self.queue_pointer, carry["keys"])

    def uninformative_loss(self) -> float | None:
        kinds = {kind for kind, weight in ((self.loss, self.weight), (self.patch_loss, self.patch_weight)) if weight}
        return self.weight + self.patch_weight if kinds == {"cosine"} else None  # right angles

    def notes(self) -> list[str]:
        if not self.asked_patch_weight:
            return []
        if self.without_map:
            return [f"without features of patches: the {' and the '.join(self.without_map)} has none"]
        return ["with features of patches, on the teacher's grid: method.patch_weight=0 leaves them out"]


def imitation(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Features (n, D) each -> (): 1 less the cosine, or the squared error, a mean over rows."""
    return squared_error(student, teacher) if kind == "mse" else 1 + negative_cosine(student, teacher)


def map_width(network: Backbone, facts: Facts) -> int | None:
    """Returns D of a network's `with_map`, found by one image; None where it has no features of places."""
    was_training = network.training
    try:
        with torch.no_grad():
            image = torch.zeros(1, facts.channels, *height_width(facts.image_size))
            return network.eval().with_map(image)[1].shape[1]
    except (ValueError, RuntimeError, AssertionError):  # or cannot take the size, which the run refuses
        return None
    finally:
        network.train(was_training)
