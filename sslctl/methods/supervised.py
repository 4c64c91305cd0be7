"""Learning from labels: from the whole backbone, or a linear classifier on a frozen one."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.errors import InputError
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather
from sslctl.models.backbones import Backbone
from sslctl.models.layer_decay import decayed


class Supervised(Method):
    """Cross entropy on one augmented view a step, of images or texts.

    several: an image may have several labels, each a logistic regression of its own; their cross entropies are summed. What
    builds the method for such images sets it.

    frozen: the backbone is not trained and its BatchNorm statistics stay as they are: the linear probe of the papers
    (MoCo, arXiv:1911.05722, section 4.1).
    pool: "own" as the backbone does; "mean" over a vision transformer's patches (MAE, arXiv:2111.06377, section 4), of the
    normalised tokens, which are the features that evaluations and exported files give. MAE's official fine-tuning drops the
    trained norm and puts a new one behind the mean.
    layer_decay: what the learning rate shrinks by from each layer to the one before it, see `sslctl.models.layer_decay`: an
    older name for optimizer.layer_decay, with which it multiplies.
    classifier_lr_scale: the classifier's learning rate over that of the backbone's last layer (SwAV's official code).
    """

    batch_coupling = None
    several = False

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        frozen: bool,
        pool: str,
        layer_decay: float,
        classifier_lr_scale: float,
    ):
        super().__init__(backbone, facts)
        if not facts.num_classes:
            raise InputError("method=supervised needs labels; this dataset does not have one for each image")
        if pool not in ("own", "mean"):
            raise ValueError(f"pool={pool}: expected own or mean")
        self.frozen, self.layer_decay, self.classifier_lr_scale = frozen, layer_decay, classifier_lr_scale
        self.prefix = backbone.vision_transformer().num_prefix_tokens if pool == "mean" else None
        self.backbone.requires_grad_(not frozen)
        self.classifier = nn.Linear(backbone.embed_dim, facts.num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def train(self, mode: bool = True) -> "Supervised":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def parameter_groups(self) -> list[dict]:
        classifier = {"params": list(self.classifier.parameters()), "lr_scale": self.classifier_lr_scale}
        layers = [{"params": list(self.backbone.network.parameters())}]
        return [*decayed(layers, self.backbone.network, self.layer_decay), classifier]

    def pooled(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1], or (B, L) of texts, -> (B, D), what the classifier sees."""
        return self.backbone(images) if self.prefix is None else self.backbone.tokens(images)[:, self.prefix :].mean(1)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return {"backbone" if self.prefix is None else "mean": self.pooled(images)}

    def feature_networks(self) -> dict[str, tuple[Backbone, str]]:
        return super().feature_networks() if self.prefix is None else {"mean": (self.backbone, "mean")}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        with torch.set_grad_enabled(not self.frozen):
            h = self.pooled(batch.views[self.modality.group][0])  # (B, D)
        logits, label = (
            gather(self.classifier(h).float()),
            gather(batch.label),
        )  # (B, num_classes), (B,) or as the logits
        if self.several:
            loss = F.binary_cross_entropy_with_logits(logits, label.float(), reduction="none").sum(1).mean()
            right = ((logits > 0) == label).float().mean()
            return {"loss": loss, "labels_right": right, "feature_std": feature_std(h)}
        hits = (logits.argmax(1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label), "top1": hits, "feature_std": feature_std(h)}

    def uninformative_loss(self) -> float:
        return self.facts.num_classes * math.log(2) if self.several else math.log(self.facts.num_classes)
