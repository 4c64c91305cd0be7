"""iBOT: DINO, and hidden patches that imitate the teacher's tokens of them (Zhou et al. 2022, arXiv:2111.07832)."""

import math

import torch
from torch import Tensor, nn

from sslctl.losses import dino, ibot
from sslctl.methods.base import (
    Batch,
    Facts,
    Method,
    clip_each_,
    ema_update,
    feature_std,
    features_of_tokens,
    gather,
    global_mean,
    networks_of_tokens,
    teacher_of,
)
from sslctl.models.backbones import Backbone
from sslctl.models.heads import prototype_head
from sslctl.models.vit import grid_of, require_class_token
from sslctl.ops.masks import greyed, some_blocks
from sslctl.schedules import cosine_between, warmed_up


class IBOT(Method):
    """Algorithm 1, with the head shared by class token and patches (section 4.3). For vision transformers.

    Blocks of the global views' patches are hidden from the student: none with 1 - mask_chance, else a share drawn between
    mask_ratio_low and mask_ratio_high. State: student, mask_token, teacher, centers (2, K) of class tokens and of patches.
    The rest as in DINO.
    """

    global_views = 2, None
    batch_coupling = None  # the centres are those of earlier batches

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        hidden_dim: int,
        bottleneck_dim: int,
        prototypes: int,
        mask_chance: float,
        mask_ratio_low: float,
        mask_ratio_high: float,
        patch_weight: float,
        student_temperature: float,
        teacher_temperature_start: float,
        teacher_temperature: float,
        teacher_temperature_warmup_epochs: float,
        center_momentum: float,
        teacher_momentum: float,
        teacher_momentum_end: float,
        freeze_epochs: float,
        clip_grad: float | None,
    ):
        super().__init__(backbone, facts)
        require_class_token(backbone.vision_transformer())
        self.prefix = backbone.vision_transformer().num_prefix_tokens
        self.head = prototype_head(backbone.embed_dim, hidden_dim, bottleneck_dim, prototypes, norm=False)
        self.mask_token = nn.Parameter(torch.zeros(1, backbone.embed_dim))  # a row: decays as a weight (official code)
        self.teacher_backbone, self.teacher_head = teacher_of(backbone), teacher_of(self.head)
        self.register_buffer("centers", torch.zeros(2, prototypes))
        self.mask_chance, self.mask_ratio = mask_chance, (mask_ratio_low, mask_ratio_high)
        self.patch_weight = patch_weight
        self.student_temperature, self.center_momentum = student_temperature, center_momentum
        self.teacher_temperatures = teacher_temperature_start, teacher_temperature
        self.warmup_steps = round(teacher_temperature_warmup_epochs * facts.steps_per_epoch)
        self.teacher_momentum, self.teacher_momentum_end = teacher_momentum, teacher_momentum_end
        self.frozen_steps, self.clip_grad = round(freeze_epochs * facts.steps_per_epoch), clip_grad

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return features_of_tokens(self.teacher_backbone, images) | {"backbone": self.backbone(images)}

    def feature_networks(self) -> dict[str, tuple[Backbone, str]]:
        return super().feature_networks() | networks_of_tokens(self.teacher_backbone)

    def schedules(self, step: int) -> dict[str, float]:
        momentum = cosine_between(self.teacher_momentum, self.teacher_momentum_end, step, self.facts.total_steps)
        temperature = warmed_up(*self.teacher_temperatures, step, self.warmup_steps)
        frozen = float(step < self.frozen_steps)
        return {"teacher_momentum": momentum, "teacher_temperature": temperature, "prototypes_frozen": frozen}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        views = batch.views["global"]  # (2, B, C, H, W)
        x, temperatures = views.flatten(0, 1), (self.student_temperature, schedules["teacher_temperature"])
        mask = self.masks(batch).flatten(0, 1)  # (2B, L)
        h = self.backbone.tokens(x, mask=mask, mask_token=self.mask_token)  # (2B, P + L, D)
        crops = [h[:, 0]]
        if "local" in batch.views:
            crops.append(self.backbone(batch.views["local"].flatten(0, 1)))  # (V·B, D)
        student = self.head(torch.cat(crops)).unflatten(
            0, (-1, views.shape[1])
        )  # (2 + V, B, K), the global views first
        with torch.no_grad():
            tokens = self.teacher_backbone.tokens(x)  # nothing hidden
            tokens = torch.cat([tokens[:, 0], tokens[:, self.prefix :].flatten(0, 1)])  # class tokens, then patches
            logits = self.teacher_head(tokens).float()  # (2B + 2B·L, K)
            teacher = logits[: len(x)].unflatten(0, views.shape[:2])  # (2, B, K)
            targets = logits[len(x) :].unflatten(0, mask.shape)  # (2B, L, K)
        whole = global_mean(dino(student, teacher, self.centers[0], *temperatures))
        each = ibot(self.head(h[:, self.prefix :]), targets, self.centers[1], mask, *temperatures)  # (2B,)
        parts = global_mean(each.mean())
        p = ((teacher - self.centers[0]) / schedules["teacher_temperature"]).softmax(-1)
        means = torch.stack([teacher.mean((0, 1)), targets.mean((0, 1))])  # (2, K), of class tokens and of all patches
        return {
            "loss": whole + self.patch_weight * parts,
            "patch_loss": parts,
            "teacher_entropy": global_mean(torch.special.entr(p).sum(-1).mean()),
            "feature_std": feature_std(h[: len(batch.index), 0]),
            "carry": {"logits": gather(means[None])},  # (processes, 2, K)
        }

    def masks(self, batch: Batch) -> Tensor:
        """(2, B, L) bool: what the student does not see of the global views."""
        views = batch.views["global"]
        grid, names = grid_of(self.backbone.vision_transformer(), views), [f"ibot/{v}" for v in range(len(views))]
        return some_blocks(batch.key, batch.host_key, names, *grid, self.mask_chance, *self.mask_ratio)[0]

    def after_backward(self, schedules: dict) -> None:
        if schedules["prototypes_frozen"]:
            self.head[-1].weight.grad = None
        if self.clip_grad is not None:
            clip_each_(self.parameters(), self.clip_grad)

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        self.centers.lerp_(carry["logits"].mean(0), 1 - self.center_momentum)
        ema_update(self.teacher_backbone, self.backbone, schedules["teacher_momentum"])
        ema_update(self.teacher_head, self.head, schedules["teacher_momentum"])

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        x = batch.views["global"][0]
        grid = grid_of(self.backbone.vision_transformer(), x)
        return {"view": x, "hidden from the student": greyed(x, self.masks(batch)[0], *grid)}

    def uninformative_loss(self) -> float:
        parts = 1 + self.patch_weight * self.mask_chance  # class tokens, and the patches where some are hidden
        return parts * math.log(self.centers.shape[1])
