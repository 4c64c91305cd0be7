"""DINOv3: DINOv2, whose patches stay as alike as those of an earlier teacher: Gram anchoring (Siméoni et al. 2025,
arXiv:2508.10104)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.losses import gram
from sslctl.methods.base import Batch, Facts, ema_update, global_mean, teacher_of
from sslctl.methods.dinov2 import DINOv2
from sslctl.models.backbones import Backbone
from sslctl.models.heads import Length
from sslctl.models.vit import grid_of
from sslctl.schedules import cosine_between


class DINOv3(DINOv2):
    """Section 4.2 on top of DINOv2, whose step this is until Gram anchoring begins.

    The augmentation's gram views show the global ones' places, larger and not distorted (augmentation=dinov3). Times are
    shares of the run: the teacher is copied to the Gram teacher after gram_teacher_from, and, once anchoring has begun after
    gram_start, every gram_refresh, gram_refreshes times at most. gram_weight of the Gram loss and local_weight of local
    views' pairs in the loss of class tokens are reached along half a cosine in gram_ramp, from 0 and from 1.
    State: as DINOv2, and gram_teacher.
    """

    view_groups = "global", "gram"
    prototype_length: Length = "free"

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        hidden_dim: int,
        bottleneck_dim: int,
        prototypes: int,
        patch_hidden_dim: int,
        patch_bottleneck_dim: int,
        patch_prototypes: int,
        mask_chance: float,
        mask_ratio_low: float,
        mask_ratio_high: float,
        patch_weight: float,
        koleo_weight: float,
        gram_weight: float,
        local_weight: float,
        gram_teacher_from: float,
        gram_start: float,
        gram_ramp: float,
        gram_refresh: float,
        gram_refreshes: int,
        sinkhorn_iterations: int,
        student_temperature: float,
        teacher_temperature_start: float,
        teacher_temperature: float,
        teacher_temperature_warmup_epochs: float,
        teacher_momentum: float,
        teacher_momentum_end: float,
        freeze_epochs: float,
        patch_lr_scale: float,
        clip_grad: float | None,
    ):
        super().__init__(
            backbone,
            facts,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            prototypes=prototypes,
            separate_heads=True,
            patch_hidden_dim=patch_hidden_dim,
            patch_bottleneck_dim=patch_bottleneck_dim,
            patch_prototypes=patch_prototypes,
            mask_chance=mask_chance,
            mask_ratio_low=mask_ratio_low,
            mask_ratio_high=mask_ratio_high,
            patch_weight=patch_weight,
            koleo_weight=koleo_weight,
            centered=False,
            sinkhorn_iterations=sinkhorn_iterations,
            student_temperature=student_temperature,
            teacher_temperature_start=teacher_temperature_start,
            teacher_temperature=teacher_temperature,
            teacher_temperature_warmup_epochs=teacher_temperature_warmup_epochs,
            center_momentum=0.0,  # nothing is centred
            teacher_momentum=teacher_momentum,
            teacher_momentum_end=teacher_momentum_end,
            freeze_epochs=freeze_epochs,
            patch_lr_scale=patch_lr_scale,
            clip_grad=clip_grad,
        )
        if not 0 <= gram_teacher_from <= gram_start:
            raise ValueError(
                f"gram_teacher_from={gram_teacher_from}: expected a share of the run from 0 to gram_start={gram_start}"
            )
        self.gram_teacher = teacher_of(backbone)
        self.gram_weight, self.local_weight, self.gram_refreshes = gram_weight, local_weight, gram_refreshes
        shares = gram_teacher_from, gram_start, gram_ramp, gram_refresh
        self.copy_step, self.start_step, self.ramp_steps, every = (round(s * facts.total_steps) for s in shares)
        self.refresh_steps = max(1, every)

    def schedules(self, step: int) -> dict[str, float]:
        since = step - self.start_step
        anchored = cosine_between(0.0, 1.0, max(0, since), self.ramp_steps) if since < self.ramp_steps else 1.0
        return super().schedules(step) | {
            "gram_weight": self.gram_weight * anchored,
            "local_weight": 1 + (self.local_weight - 1) * anchored,
            "gram_refresh": float(self.refreshes_after(step)),
        }

    def refreshes_after(self, step: int) -> bool:
        """Tells whether the Gram teacher is taken anew once a step is over."""
        done = step + 1
        number, rest = divmod(done - self.start_step, self.refresh_steps)
        return done == self.copy_step or (rest == 0 and 1 <= number <= self.gram_refreshes)

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        output, patches = self.objective(batch, schedules, schedules["local_weight"])
        gram_loss = patches.new_zeros(())
        if schedules["gram_weight"]:
            gram_loss = global_mean(gram(patches, self.gram_targets(batch)))
            output["loss"] = output["loss"] + schedules["gram_weight"] * gram_loss
        return output | {"gram_loss": gram_loss}

    @torch.no_grad()
    def gram_targets(self, batch: Batch) -> Tensor:
        """(2B, L, D): the Gram teacher's patches of the larger views, resampled to the global views' places."""
        x, model = batch.views["gram"].flatten(0, 1), self.gram_teacher.vision_transformer()
        patches = self.gram_teacher.tokens(x)[:, self.prefix :].float()  # (2B, L', D)
        maps = patches.transpose(1, 2).unflatten(2, grid_of(model, x))  # (2B, D, rows', columns')
        maps = F.interpolate(maps, grid_of(model, batch.views["global"]), mode="bicubic", align_corners=False)
        return maps.flatten(2).transpose(1, 2)

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        super().after_step(schedules, carry)
        if schedules["gram_refresh"]:
            ema_update(self.gram_teacher, self.teacher_backbone, 0.0)

    def uninformative_loss(self) -> None:
        """None: what Gram anchoring adds, the data decide."""
