"""Colourisation: the colours of a grey image (Zhang et al. 2016, arXiv:1603.08511)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.losses import soft_cross_entropy, squared_error
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather
from sslctl.models.backbones import Backbone
from sslctl.models.decoders import Doubling
from sslctl.ops.color_space import colour_bins, lab_to_rgb, lightness, rgb_to_lab
from sslctl.ops.image_size import height_width

NEAREST, SPREAD, GREY = 10, 5.0, 5.0  # bins of a soft target, σ of every Gaussian, |ab| below which an image is grey


class Colorization(Method):
    """Section 2. From the lightness, shown as a grey image, to a and b at a share of the resolution.

    form: "classification" over bins of 10×10 units, rare colours with more weight (eq. 2 to 4), or "regression" (eq. 1),
    whose colours are paler. resolution: of the predicted map, of the image's. rebalance: λ of eq. 4, the share of a uniform
    distribution. annealing: temperature of the mean that a prediction is decoded to (eq. 5), for pictures. State: bins (Q, 2),
    frequency (Q,), counted (). Unlike the paper, the colours' frequencies are counted while training, and Q is 261: the authors'
    313 come as a file, and sRGB alone does not give as many (`colour_bins`).
    """

    batch_coupling = None

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        form: str,
        resolution: float,
        hidden_dim: int,
        rebalance: float,
        annealing: float,
    ):
        super().__init__(backbone, facts)
        if facts.channels != 3:
            raise ValueError("colorization needs colour images, these are grey: dataset=photos, cifar10 or folder")
        if form not in ("classification", "regression"):
            raise ValueError(f"method.form={form}: expected classification or regression")
        backbone.sees_lightness = True
        with torch.no_grad():
            shape = backbone.eval().feature_map(torch.zeros(1, 3, *height_width(facts.image_size))).shape
        backbone.train()  # BatchNorm has learnt nothing of zeros
        self.form, self.rebalance, self.annealing = form, rebalance, annealing
        if not 0 < resolution <= 1:
            raise ValueError(f"resolution={resolution:g}: expected a share of the image's, more than 0 and at most 1")
        self.sides = tuple(
            max(1, round(resolution * side)) for side in height_width(facts.image_size)
        )  # of what is said
        self.register_buffer("bins", colour_bins(10))  # (Q, 2)
        self.register_buffer("smoothing", smoothing(self.bins, SPREAD), persistent=False)  # (Q, Q), of the bins alone
        self.register_buffer("frequency", torch.full((len(self.bins),), 1 / len(self.bins)))
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))  # steps
        doublings = max(0, math.ceil(math.log2(self.sides[1] / shape[-1])))
        blocks = [Doubling(d_in, hidden_dim) for d_in in [backbone.embed_dim, *[hidden_dim] * doublings][:doublings]]
        outputs = len(self.bins) if form == "classification" else 2
        self.head = nn.Sequential(*blocks, nn.Conv2d(hidden_dim if doublings else backbone.embed_dim, outputs, 1))

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return {"backbone": self.backbone(images)}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x = batch.views["global"][0]  # (B, 3, H, W)
        lab = rgb_to_lab(x)
        colours = F.interpolate(lab[:, 1:], self.sides, mode="area")  # (B, 2, s, s)
        h = self.backbone.feature_map(x)  # (B, D, h, w), of the lightness
        predicted = self.predicted(h)  # (B, Q or 2, s, s)
        std = feature_std(h.mean((2, 3)))
        if self.form == "regression":
            loss = gather(squared_error(predicted, colours / 110)[None]).mean()
            blind = gather((colours / 110).square().mean()[None]).mean()  # error of a grey image
            return {"loss": loss, "unexplained": loss.detach() / blind, "feature_std": std}
        target, chosen = self.soft_targets(colours.permute(0, 2, 3, 1).flatten(0, 2))  # (n, Q), (n,)
        coloured = (colours.abs().amax((1, 2, 3)) > GREY).repeat_interleave(
            math.prod(self.sides)
        )  # grey images say nothing
        weight = self.weights()[chosen] * coloured
        logits = predicted.permute(0, 2, 3, 1).flatten(0, 2)  # (n, Q)
        loss = soft_cross_entropy(logits, target, weight)
        hits = (logits.argmax(1) == chosen).float().mean()
        counts = F.one_hot(chosen.view(len(lab), -1), len(self.bins)).float().mean(1)  # (B, Q)
        return {
            "loss": gather(loss[None]).mean(),
            "accuracy": gather(hits[None]).mean(),
            "most_frequent": self.frequency.max(),  # what saying one colour would get
            "feature_std": std,
            "carry": {"counts": gather(counts)},
        }

    def predicted(self, h: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, Q or 2, s, s)."""
        return F.interpolate(self.head(h).float(), self.sides, mode="bilinear", align_corners=False)

    def soft_targets(self, colours: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 2) -> probabilities (n, Q) over the ten nearest bins, and the nearest one (n,)."""
        distance = torch.cdist(colours, self.bins, compute_mode="donot_use_mm_for_euclid_dist")
        near = distance.topk(NEAREST, dim=1, largest=False)  # (n, 10), the nearest first
        share = (-near.values.square() / (2 * SPREAD**2)).softmax(1)
        return torch.zeros_like(distance).scatter_(1, near.indices, share), near.indices[:, 0]

    def weights(self) -> Tensor:
        """(Q,): inverse to the smoothed frequency mixed with a uniform one, 1 on the smoothed one's average (eq. 4)."""
        smooth = self.frequency @ self.smoothing
        weight = 1 / ((1 - self.rebalance) * smooth + self.rebalance / len(smooth))
        return weight / (smooth * weight).sum()

    def annealed_mean(self, logits: Tensor) -> Tensor:
        """(B, Q, h, w) -> a and b (B, 2, h, w): 1 as the temperature is the mean, 0 the likeliest bin (eq. 5)."""
        return torch.einsum("bqhw,qc->bchw", (logits.log_softmax(1) / self.annealing).softmax(1), self.bins)

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        if "counts" in carry:
            self.counted += 1
            self.frequency.lerp_(carry["counts"].mean(0), 1 / self.counted.float())

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        x = batch.views["global"][0]
        lab = rgb_to_lab(x)
        predicted = self.predicted(self.backbone.feature_map(x))
        ab = self.annealed_mean(predicted) if self.form == "classification" else 110 * predicted
        ab = F.interpolate(ab, x.shape[-2:], mode="bilinear", align_corners=False)
        return {"lightness": lightness(x), "coloured": lab_to_rgb(torch.cat([lab[:, :1], ab], 1)), "view": x}

    def uninformative_loss(self) -> float | None:
        return math.log(len(self.bins)) if self.form == "classification" else None


def smoothing(bins: Tensor, std: float) -> Tensor:
    """(Q, 2) -> (Q, Q): row q is how a Gaussian spreads what lies in bin q over the bins there are; it sums to 1."""
    return (-torch.cdist(bins, bins, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * std**2)).softmax(1)
