"""Context encoder: fill the hole from what is around it (Pathak et al. 2016, arXiv:1604.07379)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sslctl.losses import squared_error
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather
from sslctl.models.backbones import Backbone
from sslctl.models.decoders import image_decoder
from sslctl.ops.image_size import ImageSize, height_width, shorter_side

BORDER_WEIGHT = 10.0


class Inpainting(Method):
    """Section 3. One hole for the whole batch, a quarter of the image, filled with the dataset's mean colour.

    hole: "centre" or "blobs". overlap: of the image's side; as much along the inside of the hole's edge stays visible, and is
    predicted with ten times the weight. adversarial: weight of a discriminator's opinion of the filled hole (eq. 3), 0 for
    none, as in the paper's own runs for features. Its learning rate is a tenth of the rest's.
    """

    def __init__(
        self, backbone: Backbone, facts: Facts, *, hole: str, overlap: float, adversarial: float, code_dim: int
    ):
        super().__init__(backbone, facts)
        if not 0 <= adversarial < 1:
            raise ValueError(f"adversarial={adversarial:g}: expected a weight from 0 to below 1")
        if hole not in ("centre", "blobs"):
            raise ValueError(f"method.hole={hole}: expected centre or blobs")
        if not 0 <= overlap < 1 / 8:
            raise ValueError(f"method.overlap={overlap}: expected a share of the image's side below an eighth")
        self.bottleneck = nn.Linear(backbone.embed_dim, code_dim)
        self.decoder = image_decoder(backbone, code_dim, facts.channels, facts.image_size)
        self.discriminator = discriminator(facts.channels, facts.image_size) if adversarial else None
        self.hole, self.adversarial = hole, adversarial
        self.overlap = round(overlap * shorter_side(facts.image_size))  # pixels
        self.batch_coupling = "one hole is drawn for the whole batch" if hole == "blobs" else None

    def parameter_groups(self) -> list[dict]:
        judge = [] if self.discriminator is None else list(self.discriminator.parameters())
        rest = [p for p in self.parameters() if not any(p is other for other in judge)]
        return [{"params": rest}] + ([{"params": judge, "lr_scale": 0.1}] if judge else [])

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x = batch.views["global"][0]  # (B, C, H, W)
        predicted, hidden = self.holes(batch)  # (H, W) bool each
        h = self.backbone(self.pierced(x, hidden))  # (B, D)
        filled = self.filling(h)  # (B, C, H, W)
        weight = predicted.float() + (BORDER_WEIGHT - 1) * (predicted & ~hidden)
        error = squared_error(filled, x, weight)
        loss, opinions = error, {}
        if self.discriminator is not None:
            real, fake = x * predicted, filled * predicted  # it sees the hole alone
            judging = _judged(self.discriminator(real), True) + _judged(self.discriminator(fake.detach()), False)
            frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            fooling = _judged(functional_call(self.discriminator, frozen, (fake,)), True)  # no gradient to the judge
            loss = (1 - self.adversarial) * error + self.adversarial * fooling + judging
            opinions = {"discriminator_loss": gather(judging.detach()[None]).mean()}
        plain = squared_error(filled.detach(), x, predicted.float())
        return {
            "loss": gather(loss[None]).mean(),
            "unexplained": gather(plain[None]).mean() / self.backbone.std.square().mean(),
            "feature_std": feature_std(h),
            **opinions,
        }

    def holes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(H, W) bool each: what is predicted, and the part of it that is hidden. The same in all processes."""
        sides = height_width(self.facts.image_size)
        if self.hole == "centre":
            predicted = torch.zeros(sides, dtype=torch.bool, device=batch.index.device)
            rows, columns = (slice(side // 4, side // 4 + side // 2) for side in sides)
            predicted[rows, columns] = True
        else:
            first = batch.key.of(gather(batch.index)[:1])
            noise = first.uniform("inpainting/blobs", *(max(3, round(0.06 * side)) for side in sides))  # (1, n, m)
            smooth = F.interpolate(noise[None], sides, mode="bicubic", align_corners=False)[0, 0]
            order = smooth.flatten().argsort(descending=True)[: smooth.numel() // 4]  # exactly a quarter
            predicted = torch.zeros(smooth.numel(), dtype=torch.bool, device=order.device)
            predicted[order] = True
            predicted = predicted.view(sides)
        if not self.overlap:
            return predicted, predicted
        seen = F.max_pool2d((~predicted).float()[None, None], 2 * self.overlap + 1, 1, self.overlap)[0, 0] > 0
        return predicted, predicted & ~seen

    def pierced(self, x: Tensor, hidden: Tensor) -> Tensor:
        return torch.where(hidden, self.backbone.mean.to(x.dtype), x)

    def filling(self, h: Tensor) -> Tensor:
        """(B, D) -> (B, C, H, W), about in [0, 1]; what counts lies in the hole."""
        return self.backbone.denormalize(self.decoder(self.bottleneck(h)).float())

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        x = batch.views["global"][0]
        predicted, hidden = self.holes(batch)
        pierced = self.pierced(x, hidden)
        filled = self.filling(self.backbone(pierced)).clamp(0, 1)
        return {"view": x, "with a hole": pierced, "filled": torch.where(predicted, filled, x)}


def discriminator(channels: int, image_size: ImageSize) -> nn.Sequential:
    """(B, C, H, W) -> (B, 1): strided convolutions (DCGAN), normalised within an image so that no two are mixed."""
    layers: list[nn.Module] = []
    width, d_in, sides = 32, channels, height_width(image_size)
    while min(sides) > 4:
        layers += [nn.Conv2d(d_in, width, 4, 2, 1), nn.GroupNorm(1, width), nn.LeakyReLU(0.2)]
        d_in, width, sides = width, min(256, 2 * width), [side // 2 for side in sides]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(d_in * math.prod(sides), 1))


def _judged(opinion: Tensor, real: bool) -> Tensor:
    """Binary cross entropy of the discriminator's opinions (B, 1)."""
    return F.softplus(-opinion.float() if real else opinion.float()).mean()
