"""SwAV: every view predicts the codes of the others (Caron et al. 2020, arXiv:2006.09882)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.losses import sinkhorn, swav
from sslctl.losses.exact import exact, unit
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather_views, multi_crop, over_crops
from sslctl.models.backbones import Backbone
from sslctl.models.heads import Prototypes, mlp


class SwAV(Method):
    """Section 3.2 and algorithm 1. Codes come from Sinkhorn's algorithm over the batch and, later, a queue.

    State: prototypes, queue (2, K, D) of unit embeddings of each global view, how many rows of it are filled.
    freeze_epochs: the prototypes stay as they are. queue_epochs: the queue is used from there on, once it is full.
    """

    global_views = 2, 2
    batch_coupling = "codes are assigned to the batch as a whole"

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        hidden_dim: int,
        out_dim: int,
        prototypes: int,
        temperature: float,
        epsilon: float,
        sinkhorn_iterations: int,
        queue_size: int,
        queue_epochs: float,
        freeze_epochs: float,
    ):
        super().__init__(backbone, facts)
        self.projector = mlp(backbone.embed_dim, hidden_dim, out_dim, 2, norm=True, hidden_bias=True)
        self.prototypes = Prototypes(out_dim, prototypes)
        self.register_buffer("queue", torch.zeros(2, queue_size, out_dim))
        self.register_buffer("queue_filled", torch.tensor(0))
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, sinkhorn_iterations
        self.queue_steps = round(queue_epochs * facts.steps_per_epoch)
        self.frozen_steps = round(freeze_epochs * facts.steps_per_epoch)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h)}

    def schedules(self, step: int) -> dict[str, float]:
        frozen, queued = step < self.frozen_steps, bool(self.queue.shape[1]) and step >= self.queue_steps
        return {"prototypes_frozen": float(frozen), "queue_used": float(queued)}

    def before_step(self, schedules: dict) -> None:
        self.prototypes.normalize_()  # algorithm 1: the rows themselves, once a step

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        h = multi_crop(self.backbone, batch)  # (V, B, D), the two global views first
        z = gather_views(over_crops(self.projector, h)).float()  # (V, G, out_dim)
        scores = self.similarities(z)  # (V, G, K)
        codes = torch.stack([self.codes(scores[view].detach(), view, schedules) for view in range(2)])  # (2, G, K)
        used = codes.new_zeros(codes.shape[-1]).scatter_(0, codes.argmax(-1).flatten(), 1.0)  # (K,)
        keys = F.normalize(z[:2].detach(), dim=-1).transpose(0, 1)  # (G, 2, out_dim)
        return {
            "loss": swav(scores, codes, self.temperature),
            "prototypes_used": used.mean(),
            "feature_std": feature_std(h[0]),
            "carry": {"keys": keys} if schedules["queue_used"] else {},
        }

    @exact
    def similarities(self, z: Tensor) -> Tensor:
        """(…, out_dim) -> (…, K). The rows of the prototypes are of unit length, but their gradient is that of plain weights
        (official code): LARS divides by its norm, to which the part along a row counts as well."""
        return F.linear(unit(z), self.prototypes.weight)

    def codes(self, scores: Tensor, view: int, schedules: dict) -> Tensor:
        """(G, K) similarities -> (G, K) assignments, balanced over the batch and the full queue."""
        if not schedules["queue_used"]:
            return sinkhorn(scores, self.epsilon, self.iterations)
        earlier = self.similarities(self.queue[view]).detach()  # (queue, K), stored embeddings, today's prototypes
        everything = sinkhorn(torch.cat([scores, earlier]), self.epsilon, self.iterations)[: len(scores)]
        full = self.queue_filled >= self.queue.shape[1]
        return torch.where(full, everything, sinkhorn(scores, self.epsilon, self.iterations))

    def after_backward(self, schedules: dict) -> None:
        if schedules["prototypes_frozen"]:
            self.prototypes.weight.grad = None

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        if "keys" in carry:
            keys = carry["keys"].transpose(0, 1)  # (2, G, out_dim)
            self.queue.copy_(torch.cat([keys, self.queue], 1)[:, : self.queue.shape[1]])  # the newest first
            self.queue_filled.add_(keys.shape[1])

    def uninformative_loss(self) -> float:
        return math.log(len(self.prototypes.weight))
