"""DeepCluster-v2: every crop finds its image's cluster of the last epoch (Caron et al. 2020, arXiv:2006.09882, appendix)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.methods.base import Batch, Embed, Facts, Method, feature_std, gather, multi_crop, over_crops
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp
from sslctl.ops.kmeans import spherical_kmeans
from sslctl.views import Key


class DeepClusterV2(Method):
    """Before each epoch the remembered embeddings are clustered `heads` times; centroids are the classes' weights.

    State: memory (2, N, out_dim) of each global view's last unit embedding, centroids (heads, K, out_dim), assignments
    (heads, N). Before the first epoch all clean images are embedded once, by BatchNorms that have seen some: with running
    statistics of 0 and 1 all embeddings would lie in one direction. Head h clusters the memory of view h mod 2.
    """

    global_views = 2, 2
    batch_coupling = None  # clusters and embeddings are those of the last epoch

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        hidden_dim: int,
        out_dim: int,
        prototypes: int,
        heads: int,
        temperature: float,
        kmeans_iterations: int,
    ):
        super().__init__(backbone, facts)
        if prototypes > facts.num_images:
            raise ValueError(f"prototypes={prototypes:,} are more clusters than the {facts.num_images:,} images")
        self.projector = mlp(backbone.embed_dim, hidden_dim, out_dim, 2, norm=True, hidden_bias=True)
        self.register_buffer("memory", torch.zeros(2, facts.num_images, out_dim))
        self.register_buffer("centroids", torch.zeros(heads, prototypes, out_dim))
        self.register_buffer("assignments", torch.zeros(heads, facts.num_images, dtype=torch.long))
        self.temperature, self.kmeans_iterations = temperature, kmeans_iterations

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "projector": self.projector(h)}

    def start_epoch(self, epoch: int, embed: Embed) -> None:
        if epoch == 0:
            z = embed(lambda images: self.projector(self.backbone(images)), calibrate=True)  # (N, out_dim)
            self.memory.copy_(F.normalize(z, dim=1))
        count = self.centroids.shape[1]
        for head in range(len(self.centroids)):
            z = self.memory[head % 2]  # (N, out_dim)
            order = Key(0, epoch, torch.arange(len(z), device=z.device)).bits(f"deepcluster/{head}").argsort()
            centroids, chosen = spherical_kmeans(z, z[order[:count]], self.kmeans_iterations)
            self.centroids[head], self.assignments[head] = centroids, chosen

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        h = multi_crop(self.backbone, batch)  # (V, B, D), the two global views first
        z = F.normalize(over_crops(self.projector, h).float(), dim=-1)  # (V, B, out_dim)
        with torch.autocast(z.device.type, enabled=False):  # a temperature of 0.1 multiplies a rounding by ten
            logits = torch.einsum("vbd,hkd->hbkv", z, self.centroids) / self.temperature
        classes = self.assignments[:, batch.index]  # (heads, B)
        each = F.cross_entropy(
            logits.flatten(0, 1), classes.flatten()[:, None].expand(-1, len(z)), reduction="none"
        )  # (heads·B, V), every crop alike
        loss = gather(each.unflatten(0, (len(classes), -1)).mean((0, 2))).mean()
        used = logits.new_zeros(logits.shape[0], logits.shape[2]).scatter_(1, self.assignments, 1.0)  # (heads, K)
        return {
            "loss": loss,
            "prototypes_used": used.mean(),
            "feature_std": feature_std(h[0]),
            "carry": {"keys": gather(z[:2].detach().transpose(0, 1).contiguous()), "index": gather(batch.index)},
        }

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        self.memory[:, carry["index"]] = carry["keys"].transpose(0, 1)

    def uninformative_loss(self) -> float:
        return math.log(self.centroids.shape[1])
