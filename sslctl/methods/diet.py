"""DIET: every image is a class of its own (Balestriero 2023, arXiv:2302.10260). DIET-CP: arXiv:2509.06990."""

import torch
import torch.nn.functional as F
from torch import nn

from sslctl.errors import InputError
from sslctl.losses.exact import unit
from sslctl.methods.base import Batch, Facts, Method, feature_std, global_mean
from sslctl.models.backbones import Backbone
from sslctl.ops.memory import in_gib, total_memory

COPIES = 4  # of the classifier in fp32: its weights, their gradient, and Adam's two moments


class DIET(Method):
    """Algorithm 1: a linear classifier without bias tells which of the N images a view is of, no head between.

    The class of an image is its position in the dataset. label_smoothing: the share of the target that all classes have alike;
    high, since in an epoch each class is seen once. unit_features: the classifier sees features of unit length. head_epochs:
    the classifier alone is trained, on a backbone in evaluation. The last two are of DIET-CP, see configs/method/diet.yaml.

    No blind loss: at ln N, that of outputs which say nothing, it stays for epochs within a thousandth while features learn (of
    the digits for 18, in which the online kNN rises from 68.5 to 77.6 %).
    """

    batch_coupling = None

    def __init__(
        self, backbone: Backbone, facts: Facts, *, label_smoothing: float, unit_features: bool, head_epochs: float
    ):
        super().__init__(backbone, facts)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: expected 0 or more, and less than 1")
        refuse_too_many(facts.num_images, backbone.embed_dim)
        self.classifier = nn.Linear(backbone.embed_dim, facts.num_images, bias=False)
        self.label_smoothing, self.unit_features = label_smoothing, unit_features
        self.head_steps = round(head_epochs * facts.steps_per_epoch)

    def schedules(self, step: int) -> dict[str, float]:
        return {"backbone_frozen": float(step < self.head_steps)}

    def before_step(self, schedules: dict) -> None:
        if self.head_steps:
            self.backbone.train(not schedules["backbone_frozen"])

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x = batch.views["global"][0]  # (B, C, H, W)
        with torch.set_grad_enabled(not schedules["backbone_frozen"]):
            h = self.backbone(x)  # (B, D)
        logits = self.classifier(unit(h) if self.unit_features else h).float()  # (B, N)
        loss = F.cross_entropy(logits, batch.index, label_smoothing=self.label_smoothing)
        hits = (logits.argmax(1) == batch.index).float().mean()
        # Each image's loss stands alone: N numbers an image need not travel.
        return {"loss": global_mean(loss), "top1": global_mean(hits), "feature_std": feature_std(h)}

    def notes(self) -> list[str]:
        weights = self.classifier.weight.nbytes
        logits = self.facts.batch_size * self.facts.num_images * 4
        return [
            f"the classifier has a row for each of {self.facts.num_images:,} images: {in_gib(weights)},"
            f" {in_gib(COPIES * weights)} with its gradient and Adam's moments; the logits of a batch are {in_gib(logits)}"
        ]


def refuse_too_many(images: int, width: int) -> None:
    """Raises InputError, before it is built, for a classifier beyond the memory: the machine's alone, or beside a GPU.

    What goes to a GPU is built here first; whether it fits there, `sslctl.training.memory` sees.
    """
    weights, here = 4 * images * width, total_memory(torch.device("cpu"))
    if (weights if torch.cuda.is_available() else COPIES * weights) > here:
        raise InputError(
            f"method=diet has {width:,} weights for each of {images:,} images: {in_gib(weights)}, and {in_gib(COPIES * weights)}"
            f" with their gradient and Adam's moments. This machine has {in_gib(here)}: take fewer images, or a backbone with"
            " fewer features"
        )
