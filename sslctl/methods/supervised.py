"""Learning from labels: from the whole backbone, or a linear classifier on a frozen one."""

import torch
import torch.nn.functional as F
from torch import nn

from sslctl.backbones import Backbone
from sslctl.config import InputError
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather


class Supervised(Method):
    """Cross entropy on one augmented view a step.

    frozen: the backbone is not trained and its BatchNorm statistics stay as they are: the linear probe of the papers
    (MoCo, arXiv:1911.05722, section 4.1).
    """

    couples = None

    def __init__(self, backbone: Backbone, facts: Facts, *, frozen: bool):
        super().__init__(backbone, facts)
        if not facts.num_classes:
            raise InputError("method=supervised needs labels; this dataset has none")
        self.frozen = frozen
        self.backbone.requires_grad_(not frozen)
        self.classifier = nn.Linear(backbone.embed_dim, facts.num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def train(self, mode: bool = True) -> "Supervised":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def training_step(self, batch: Batch, s: dict) -> dict:
        with torch.set_grad_enabled(not self.frozen):
            h = self.backbone(batch.views["global"][0])  # (B, D)
        logits, label = gather(self.classifier(h).float()), gather(batch.label)  # (B, num_classes), (B,)
        hits = (logits.argmax(1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label), "top1": hits, "feature_std": feature_std(h)}
