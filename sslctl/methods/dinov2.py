"""DINOv2: class tokens and hidden patches by heads of their own, targets that share all prototypes, and class tokens that keep
apart (Oquab et al. 2023, arXiv:2304.07193)."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from sslctl.losses import hidden_patches, koleo, sinkhorn, swav
from sslctl.methods.base import (
    Batch,
    Facts,
    Method,
    ema_update,
    feature_std,
    features_of_tokens,
    gather,
    gather_views,
    global_mean,
    networks_of_tokens,
    teacher_of,
)
from sslctl.models.backbones import Backbone
from sslctl.models.heads import Length, prototype_head
from sslctl.models.vit import grid_of, require_class_token
from sslctl.ops.masks import greyed, some_blocks
from sslctl.schedules import cosine_between, warmed_up


class DINOv2(Method):
    """Section 4. For vision transformers; registers (arXiv:2309.16588) are the backbone's reg_tokens.

    separate_heads: patches have a head of their own, of the patch_ sizes; without, class tokens and patches share one.
    sinkhorn_iterations: of the targets. centered: a running mean is taken off them instead, as in DINO, off the patches'
    that of hidden ones. koleo_weight: of the sum over global views of KoLeo on their class tokens, in front of the head.
    Blocks of the global views' patches are hidden as in iBOT. patch_lr_scale: of the patches' convolution, times the learning
    rate. freeze_epochs: the prototypes stay as they are. clip_grad: the most that the gradients of the backbone, and of each
    head, may have as norm together; None for no clipping.
    State: student, mask_token, teacher, and of centred targets center and patch_center, (1, K) each.

    Unlike the official code: nearest neighbours are sought in the global batch, not in a process's part; each view is
    hidden from by a chance and a share of its own, where there exactly half of a process's views are, by shares in steps.
    """

    global_views = 2, None
    batch_coupling = "its targets share the prototypes over the batch, and class tokens keep apart in it"
    prototype_length: Length = "learnt"

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        hidden_dim: int,
        bottleneck_dim: int,
        prototypes: int,
        separate_heads: bool,
        patch_hidden_dim: int,
        patch_bottleneck_dim: int,
        patch_prototypes: int,
        mask_chance: float,
        mask_ratio_low: float,
        mask_ratio_high: float,
        patch_weight: float,
        koleo_weight: float,
        centered: bool,
        sinkhorn_iterations: int,
        student_temperature: float,
        teacher_temperature_start: float,
        teacher_temperature: float,
        teacher_temperature_warmup_epochs: float,
        center_momentum: float,
        teacher_momentum: float,
        teacher_momentum_end: float,
        freeze_epochs: float,
        patch_lr_scale: float,
        clip_grad: float | None,
    ):
        super().__init__(backbone, facts)
        require_class_token(backbone.vision_transformer())
        self.prefix = backbone.vision_transformer().num_prefix_tokens
        head = partial(prototype_head, backbone.embed_dim, norm=False, length=self.prototype_length)
        sizes = (hidden_dim, bottleneck_dim, prototypes), (patch_hidden_dim, patch_bottleneck_dim, patch_prototypes)
        if not separate_heads and sizes[0] != sizes[1]:
            raise ValueError(f"separate_heads=false: one head has one size, not {sizes[0]} and, of patches, {sizes[1]}")
        self.heads = nn.ModuleList(
            head(*size) for size in (sizes if separate_heads else sizes[:1])
        )  # the last: patches
        self.mask_token = nn.Parameter(torch.zeros(1, backbone.embed_dim))  # a row: decays as a weight (official code)
        self.teacher_backbone, self.teacher_heads = teacher_of(backbone), teacher_of(self.heads)
        self.centered, self.sinkhorn_iterations = centered, sinkhorn_iterations
        if centered:
            self.register_buffer("center", torch.zeros(1, prototypes))
            self.register_buffer("patch_center", torch.zeros(1, patch_prototypes))
        self.mask_chance, self.mask_ratio = mask_chance, (mask_ratio_low, mask_ratio_high)
        self.patch_weight, self.koleo_weight = patch_weight, koleo_weight
        self.student_temperature, self.center_momentum = student_temperature, center_momentum
        self.teacher_temperatures = teacher_temperature_start, teacher_temperature
        self.warmup_steps = round(teacher_temperature_warmup_epochs * facts.steps_per_epoch)
        self.teacher_momentum, self.teacher_momentum_end = teacher_momentum, teacher_momentum_end
        self.frozen_steps = round(freeze_epochs * facts.steps_per_epoch)
        self.patch_lr_scale, self.clip_grad = patch_lr_scale, clip_grad

    def parameter_groups(self) -> list[dict]:
        patches = list(self.backbone.vision_transformer().patch_embed.parameters())
        others = [p for p in self.parameters() if all(p is not patch for patch in patches)]
        return [{"params": others}, {"params": patches, "lr_scale": self.patch_lr_scale}]

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
        return self.objective(batch, schedules)[0]

    def objective(self, batch: Batch, schedules: dict, local_weight: float = 1.0) -> tuple[dict, Tensor]:
        """Returns the step's output, and the student's patches of the global views (2B, L, D).

        local_weight: what the pairs of local views count in the loss of class tokens.
        """
        views = batch.views["global"]  # (2, B, C, H, W)
        x, temperature = views.flatten(0, 1), schedules["teacher_temperature"]
        mask, hidden = self.masks(batch)  # (2, B, L), M
        mask = mask.flatten(0, 1)  # (2B, L)
        # Not nonzero_static, which a Mac's GPU has not got.
        places = mask.flatten().byte().sort(descending=True, stable=True).indices[:hidden]  # (M,) of 2B·L, in order
        h = self.backbone.tokens(x, mask=mask, mask_token=self.mask_token)  # (2B, P + L, D)
        whole, patches = h[:, 0].unflatten(0, views.shape[:2]), h[:, self.prefix :]  # (2, B, D), (2B, L, D)
        crops = [whole]
        if "local" in batch.views:
            small = batch.views["local"]  # (V, B, C, h, w)
            crops.append(self.backbone(small.flatten(0, 1)).unflatten(0, small.shape[:2]))
        student = self.heads[0](torch.cat(crops))  # (2 + V, B, K), the global views first
        student_patches = self.heads[-1](patches.flatten(0, 1)[places])  # (M, K)
        with torch.no_grad():
            tokens = self.teacher_backbone.tokens(x)  # nothing hidden
            teacher = self.teacher_heads[0](tokens[:, 0]).float()  # (2B, K)
            teacher_patches = self.teacher_heads[-1](tokens[:, self.prefix :].flatten(0, 1)[places]).float()  # (M, K)
            p = self.targets(teacher, "center", temperature).unflatten(0, views.shape[:2])  # (2, B, K)
            p_patches = self.targets(teacher_patches, "patch_center", temperature)
        weights = student.new_ones(len(student))
        weights[len(views) :] = local_weight
        class_loss = global_mean(swav(student, p, self.student_temperature, weights))
        patch_loss = global_mean(hidden_patches(student_patches, p_patches, mask, self.student_temperature))
        koleo_loss = sum(koleo(z) for z in gather_views(whole))
        output = {
            "loss": class_loss + self.patch_weight * patch_loss + self.koleo_weight * koleo_loss,
            "patch_loss": patch_loss,
            "koleo_loss": koleo_loss,
            "teacher_entropy": global_mean(torch.special.entr(p).sum(-1).mean()),
            "feature_std": feature_std(whole[0]),
        }
        if self.centered:
            means = {
                "logits": teacher.mean(0, keepdim=True),
                "patch_logits": teacher_patches.sum(0, keepdim=True),
                "hidden": mask.sum()[None].float(),
            }
            output["carry"] = {name: gather(value) for name, value in means.items()}  # a row for each process
        return output, patches

    def targets(self, logits: Tensor, center: str, temperature: float) -> Tensor:
        """(n, K) of the teacher -> (n, K), rows that sum to 1, by way of Sinkhorn and Knopp or of the named centre."""
        if self.centered:
            return ((logits - self.get_buffer(center)) / temperature).softmax(-1)
        return sinkhorn(logits, temperature, self.sinkhorn_iterations, gather)

    def masks(self, batch: Batch) -> tuple[Tensor, int]:
        """(2, B, L) bool: what the student does not see of the global views; and how many patches that are."""
        views = batch.views["global"]
        grid, names = grid_of(self.backbone.vision_transformer(), views), [f"dinov2/{v}" for v in range(len(views))]
        return some_blocks(batch.key, batch.host_key, names, *grid, self.mask_chance, *self.mask_ratio)

    def after_backward(self, schedules: dict) -> None:
        if self.clip_grad is not None:
            for part in ([*self.backbone.parameters(), self.mask_token], *(head.parameters() for head in self.heads)):
                nn.utils.clip_grad_norm_(part, self.clip_grad)
        if schedules["prototypes_frozen"]:
            for head in self.heads:
                head[-1].zero_grad(set_to_none=True)

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        if self.centered:
            rate, hidden = 1 - self.center_momentum, carry["hidden"].sum()
            self.center.lerp_(carry["logits"].mean(0, keepdim=True), rate)
            mean = carry["patch_logits"].sum(0, keepdim=True) / hidden.clamp(min=1)
            self.patch_center.lerp_(mean, rate * (hidden > 0).to(mean))  # as it is where nothing was hidden
        ema_update(self.teacher_backbone, self.backbone, schedules["teacher_momentum"])
        ema_update(self.teacher_heads, self.heads, schedules["teacher_momentum"])

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        x = batch.views["global"][0]
        grid = grid_of(self.backbone.vision_transformer(), x)
        return {"view": x, "hidden from the student": greyed(x, self.masks(batch)[0][0], *grid)}

    def uninformative_loss(self) -> float | None:
        if self.koleo_weight:
            return None  # how far apart class tokens are, the data decide
        prototypes, patch_prototypes = (len(self.heads[which][-1].weight) for which in (0, -1))
        return math.log(prototypes) + self.patch_weight * self.mask_chance * math.log(patch_prototypes)
