"""MSN: a view with dropped patches finds the prototypes of the whole view (Assran et al. 2022, arXiv:2204.07141)."""

import math

import torch
from torch import Tensor, nn

from sslctl.losses import msn, sinkhorn
from sslctl.methods.base import (
    Batch,
    Facts,
    Method,
    ema_update,
    feature_std,
    features_of_tokens,
    gather,
    gather_views,
    networks_of_tokens,
    teacher_of,
    two_views,
)
from sslctl.models.backbones import Backbone
from sslctl.models.heads import Prototypes, mlp
from sslctl.models.vit import grid_of, require_class_token


class MSN(Method):
    """Section 3. The first global view is the target's, the second the masked anchor; local views are anchors as they are.

    drop_ratio: patches that the masked anchor lacks, the same ones for the whole batch (official code). sinkhorn_iterations:
    of the sharpened targets, 0 for none. entropy_weight: the paper's λ. For vision transformers. State: student,
    prototypes (K, out_dim), teacher. teacher_momentum goes linearly to 1 over momentum_stretch times the run.

    Unlike the official code: trainer.clip_grad_norm counts the prototypes' gradient too, since there is one limit for all
    that a run trains; the warm-up starts from 0, not from a fifth of the peak, as every schedule here does.
    """

    global_views = 2, 2
    batch_coupling = "its mean prediction and its balanced targets are the batch's"

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        hidden_dim: int,
        out_dim: int,
        prototypes: int,
        drop_ratio: float,
        temperature: float,
        target_temperature: float,
        sinkhorn_iterations: int,
        entropy_weight: float,
        teacher_momentum: float,
        momentum_stretch: float,
    ):
        super().__init__(backbone, facts)
        require_class_token(backbone.vision_transformer())
        if not 0 <= drop_ratio < 1:
            raise ValueError(f"drop_ratio={drop_ratio}: expected a share of the patches, from 0 to below 1")
        self.projector = mlp(backbone.embed_dim, hidden_dim, out_dim, 3, norm=True, activation="gelu", hidden_bias=True)
        self.prototypes = Prototypes(out_dim, prototypes)
        nn.init.uniform_(self.prototypes.weight, -(out_dim**-0.5), out_dim**-0.5)  # rows of 0.58, which turn the faster
        self.teacher_backbone, self.teacher_projector = teacher_of(backbone), teacher_of(self.projector)
        self.drop_ratio, self.sinkhorn_iterations = drop_ratio, sinkhorn_iterations
        self.temperature, self.target_temperature = temperature, target_temperature
        self.entropy_weight = entropy_weight
        self.teacher_momentum, self.momentum_stretch = teacher_momentum, momentum_stretch

    def parameter_groups(self) -> list[dict]:
        networks = [*self.backbone.parameters(), *self.projector.parameters()]
        return [{"params": networks}, {"params": [self.prototypes.weight], "weight_decay_scale": 0.0}]  # official code

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return features_of_tokens(self.teacher_backbone, images) | {"backbone": self.backbone(images)}

    def feature_networks(self) -> dict[str, tuple[Backbone, str]]:
        return super().feature_networks() | networks_of_tokens(self.teacher_backbone)

    def schedules(self, step: int) -> dict[str, float]:
        share = step / (self.momentum_stretch * self.facts.total_steps)
        return {"teacher_momentum": self.teacher_momentum + (1 - self.teacher_momentum) * share}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        target, anchor = two_views(batch)  # (B, C, H, W) each
        h = self.backbone.tokens(anchor, keep=self.kept(batch))[:, 0]  # (B, D)
        z = self.projector(h)[None]  # (1, B, out_dim)
        if "local" in batch.views:
            small = batch.views["local"]  # (V, B, C, h, w)
            focal = self.projector(self.backbone(small.flatten(0, 1)))  # by BatchNorms of their own size alone
            z = torch.cat([z, focal.unflatten(0, small.shape[:2])])
        z = gather_views(z)  # (V, G, out_dim)
        with torch.no_grad():
            target = self.teacher_projector(self.teacher_backbone(target))
            p = self.targets(gather(target).float())  # (G, K)
        used = p.new_zeros(p.shape[1]).scatter_(0, p.argmax(1), 1.0)  # (K,)
        return {
            "loss": msn(self.prototypes(z.float()), p, self.temperature, self.entropy_weight),
            "teacher_entropy": torch.special.entr(p).sum(1).mean(),
            "prototypes_used": used.mean(),
            "feature_std": feature_std(h),
        }

    def targets(self, z: Tensor) -> Tensor:
        """(G, out_dim) of the teacher -> (G, K): sharp, and balanced over the batch."""
        log_p = (self.prototypes(z) / (self.temperature * self.target_temperature)).log_softmax(
            1
        )  # p^(1/T), normalised
        return sinkhorn(log_p, 1.0, self.sinkhorn_iterations) if self.sinkhorn_iterations else log_p.exp()

    def kept(self, batch: Batch) -> Tensor:
        """(k,) positions of the patches that the masked anchor keeps: one draw for the global batch."""
        rows, columns = grid_of(self.backbone.vision_transformer(), batch.views["global"])
        first = batch.key.of(gather(batch.index)[:1])
        order = first.permutation("msn/kept", rows * columns)[0]
        return order[: max(1, int(rows * columns * (1 - self.drop_ratio)))].sort().values

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        ema_update(self.teacher_backbone, self.backbone, schedules["teacher_momentum"])
        ema_update(self.teacher_projector, self.projector, schedules["teacher_momentum"])

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        target, anchor = batch.views["global"]
        rows, columns = grid_of(self.backbone.vision_transformer(), anchor)
        seen = anchor.new_zeros(rows * columns).index_fill_(0, self.kept(batch), 1.0).view(1, 1, rows, columns)
        seen = nn.functional.interpolate(seen, anchor.shape[-2:], mode="nearest")
        return {"target": target, "anchor": anchor * seen + 0.5 * (1 - seen)}

    def uninformative_loss(self) -> float:
        return math.log(len(self.prototypes.weight))  # the mean prediction is as uniform as can be
