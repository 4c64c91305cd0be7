"""RotNet: by how much was the image turned? (Gidaris et al. 2018, arXiv:1803.07728)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.methods.base import Batch, Facts, Method, feature_std, gather
from sslctl.models.backbones import Backbone


class Rotation(Method):
    """Section 3.1. Every image stands in the batch four times, turned by 0°, 90°, 180° and 270°, after crop and flip."""

    batch_coupling = None
    squares_only = True

    def __init__(self, backbone: Backbone, facts: Facts):
        super().__init__(backbone, facts)
        self.classifier = nn.Linear(backbone.embed_dim, 4)

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x = batch.views["global"][0]  # (B, C, H, W)
        h = self.backbone(four_turns(x).flatten(0, 1))  # (4B, D)
        logits = self.classifier(h).float().unflatten(0, (4, -1)).transpose(0, 1)  # (B, 4 turns, 4 classes)
        logits = gather(logits.contiguous()).flatten(0, 1)  # (4G, 4)
        label = torch.arange(4, device=x.device).repeat(len(logits) // 4)
        hits = (logits.argmax(1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label), "accuracy": hits, "feature_std": feature_std(h[: len(x)])}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        turned = four_turns(batch.views["global"][0])
        predicted = self.classifier(self.backbone(turned.flatten(0, 1))).argmax(1).unflatten(0, (4, -1))  # (4, B)
        back = [torch.stack([_turn(*pair) for pair in zip(turned[k], -predicted[k], strict=True)]) for k in range(4)]
        return {f"{90 * k}°": turned[k] for k in range(4)} | {f"{90 * k}° put upright": back[k] for k in range(4)}

    def uninformative_loss(self) -> float:
        return math.log(4)

    def notes(self) -> list[str]:
        return [
            f"four rotations of every image: {4 * self.facts.batch_size} a step; chance is a loss of {math.log(4):.3f}"
        ]


def four_turns(x: Tensor) -> Tensor:
    """(B, C, S, S) -> (4, B, C, S, S), anticlockwise, by exact moves of pixels."""
    return torch.stack([x.rot90(k, (2, 3)) for k in range(4)])


def _turn(image: Tensor, quarters: Tensor) -> Tensor:
    return image.rot90(int(quarters), (1, 2))
