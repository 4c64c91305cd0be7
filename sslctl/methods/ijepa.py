"""I-JEPA: from some patches' tokens to the teacher's tokens of others (Assran et al. 2023, arXiv:2301.08243)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.distributed import gather_on_host
from sslctl.methods.base import Batch, Facts, Method, ema_update, feature_std, gather, teacher_of
from sslctl.models.backbones import Backbone
from sslctl.models.vit import blocks, fix_positions_, gather_tokens, grid_of, initialize_, sine_cosine
from sslctl.ops.image_size import height_width
from sslctl.ops.masks import rectangles
from sslctl.transfer import to_device

TARGET_SCALE, TARGET_ASPECT, CONTEXT_SCALE = (0.15, 0.2), (0.75, 1.5), (0.85, 1.0)


class IJEPA(Method):
    """Section 3, for vision transformers: a predictor tells the teacher's normalised tokens of `targets` blocks from a context.

    The context is a large block less the targets, cut row by row to as many patches as the image of the batch with the fewest
    has (official code); all that the targets leave where they cover the block. Blocks have one size a step. Unlike the official
    code's, their scale and their aspect are drawn apart, and they reach the last row and column; the class token stays in the
    student and the teacher, as a prefix (backbone.kwargs.class_token=false leaves it out).

    initial_std: of all initial weights, 0.02 in the official code. Its vision_transformer.py divides some by their block's
    depth, but helper.py then draws all linear layers again. It suits layers of 768 inputs: of 4 × 4 grey pixels next to
    nothing is left beside the positions, which the predictor tells without looking at the context. None: the backbone's own
    and torch's, 0.58 over the root of the inputs, which is 0.02 at 830 of them.

    State: student, teacher.
    """

    batch_coupling = "blocks and contexts have one size in the whole batch"

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        targets: int,
        predictor_dim: int,
        predictor_depth: int,
        predictor_heads: int,
        initial_std: float | None,
        teacher_momentum: float,
        teacher_momentum_end: float,
    ):
        super().__init__(backbone, facts)
        model = backbone.vision_transformer()
        self.prefix, patch = model.num_prefix_tokens, model.patch_embed.patch_size[0]
        self.grid = tuple(side // patch for side in height_width(facts.image_size))
        patches = self.grid[0] * self.grid[1]
        largest = max(math.prod(size) for size in self.possible_sizes())
        if targets * largest >= patches:
            raise ValueError(
                f"{targets} target blocks of up to {largest} patches may cover all {patches}: fewer method.targets, or"
                " smaller patches (dataset.scale.patch_size)"
            )
        self.targets = targets
        self.teacher_momentum, self.teacher_momentum_end = teacher_momentum, teacher_momentum_end
        self.embed = nn.Linear(backbone.embed_dim, predictor_dim)
        self.mask_token = nn.Parameter(torch.empty(1, predictor_dim))  # a row: decays as a weight (official code)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.register_buffer(
            "place", sine_cosine(predictor_dim, *self.grid), persistent=False
        )  # (L, d), of the grid alone
        self.predictor = nn.Sequential(
            *blocks(predictor_dim, predictor_depth, predictor_heads), nn.LayerNorm(predictor_dim, 1e-6)
        )
        self.head = nn.Linear(predictor_dim, backbone.embed_dim)
        fix_positions_(backbone)
        if initial_std is not None:
            drawn = (backbone, self.embed, self.predictor, self.head)
            initialize_(*drawn, draw=lambda _, weight: nn.init.trunc_normal_(weight, std=initial_std), token_std=1e-6)
        self.teacher_backbone = teacher_of(backbone)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        mean = self.teacher_backbone.tokens(images)[:, self.prefix :].mean(1)  # the paper's, without a class token
        return {"teacher": mean, "mean": self.backbone.tokens(images)[:, self.prefix :].mean(1)}

    def feature_networks(self) -> dict[str, tuple[Backbone, str]]:
        return {"teacher": (self.teacher_backbone, "mean"), "mean": (self.backbone, "mean")}

    def schedules(self, step: int) -> dict[str, float]:
        start, end = self.teacher_momentum, self.teacher_momentum_end
        return {"teacher_momentum": start + (end - start) * step / self.facts.total_steps}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x = batch.views["global"][0]  # (B, C, H, W)
        keep, wanted = self.patches(batch, x)  # (B, kept), (B, targets, T)
        h = self.backbone.tokens(x, keep=keep)[:, self.prefix :]  # (B, kept, D)
        with torch.no_grad():
            tokens = self.teacher_backbone.tokens(x)[:, self.prefix :].float()  # (B, L, D), of the whole image
            normalized = F.layer_norm(tokens, tokens.shape[-1:])
            target = gather_tokens(normalized, wanted.flatten(1)).unflatten(1, wanted.shape[1:])  # (B, targets, T, D)
        loss = F.smooth_l1_loss(self.predicted(h, keep, wanted).float(), target)
        return {
            "loss": gather(loss[None]).mean(),
            "target_std": gather(tokens.mean(1)).std(0).mean(),  # falls to 0 where all images look alike to the teacher
            "feature_std": feature_std(h.mean(1)),
        }

    def predicted(self, h: Tensor, keep: Tensor, wanted: Tensor) -> Tensor:
        """Context tokens (B, kept, D), places (B, kept) and (B, targets, T) -> (B, targets, T, D), each block by itself."""
        place = self.place.to(h)  # (L, d)
        context = self.embed(h) + place[keep]  # (B, kept, d)
        mask_tokens = self.mask_token.to(h) + place[wanted]  # (B, targets, T, d)
        context = context[:, None].expand(-1, wanted.shape[1], -1, -1)
        z = self.predictor(torch.cat([context, mask_tokens], 2).flatten(0, 1))  # (B·targets, kept + T, d)
        return self.head(z[:, h.shape[1] :]).unflatten(0, wanted.shape[:2])

    def uninformative_loss(self) -> float:
        normal = math.exp(-0.5) / (2 * math.pi) ** 0.5  # of a prediction of 0: the mean over a standard normal's values
        return math.erf(0.5**0.5) + normal - 0.5

    def possible_sizes(self) -> list[tuple[int, int]]:
        """(rows, columns) of the target blocks at the ends of the scales and aspects."""
        return [self.block_size(scale, aspect) for scale in TARGET_SCALE for aspect in TARGET_ASPECT]

    def block_size(self, scale: float, aspect: float) -> tuple[int, int]:
        """Patches of a block with a share of the image's area and a ratio of height to width."""
        area = scale * self.grid[0] * self.grid[1]
        sides = math.sqrt(area * aspect), math.sqrt(area / aspect)
        return tuple(max(1, min(round(side), limit)) for side, limit in zip(sides, self.grid, strict=True))

    def patches(self, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """Places of the context (B, kept), and of the target blocks (B, targets, T), row by row each."""
        if grid_of(self.backbone.vision_transformer(), x) != self.grid:
            raise ValueError(
                f"I-JEPA takes views of the image's own size, these have {'×'.join(map(str, x.shape[-2:]))} pixels"
            )
        key = batch.host_key  # what is drawn decides the shapes of tensors: on the CPU, where no GPU is waited for
        first = key.of(gather_on_host(key.index)[:1])  # one size for the batch, the same in all processes
        low, high = math.log(TARGET_ASPECT[0]), math.log(TARGET_ASPECT[1])
        size = self.block_size(
            first.between("ijepa/scale", *TARGET_SCALE).item(),
            math.exp(first.between("ijepa/aspect", low, high).item()),
        )
        side = self.block_size(first.between("ijepa/context", *CONTEXT_SCALE).item(), 1.0)
        wanted = rectangles(key, "ijepa/target", self.targets, *self.grid, *size)  # (B, targets, T)
        block = rectangles(key, "ijepa/block", 1, *self.grid, *side)[:, 0]  # (B, n)
        free = torch.zeros(len(x), self.grid[0] * self.grid[1], dtype=torch.bool)
        free.scatter_(1, block, True).scatter_(1, wanted.flatten(1), False)
        outside = torch.ones_like(free).scatter_(1, wanted.flatten(1), False)
        free = torch.where(free.any(1, keepdim=True), free, outside)  # where the targets cover the whole block
        fewest = int(gather_on_host(free.sum(1)).min())  # of the global batch
        keep = free.logical_not().sort(dim=1, stable=True).indices[:, :fewest]
        return to_device(keep, x.device), to_device(wanted, x.device)

    def after_step(self, schedules: dict, carry: dict[str, Tensor]) -> None:
        ema_update(self.teacher_backbone, self.backbone, schedules["teacher_momentum"])

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        x = batch.views["global"][0]
        keep, wanted = self.patches(batch, x)
        shown = {"view": x}
        for name, places in (("context", keep), ("targets", wanted.flatten(1))):
            seen = torch.zeros(len(x), self.grid[0] * self.grid[1], device=x.device).scatter_(1, places, 1.0)
            seen = F.interpolate(seen.view(-1, 1, *self.grid), x.shape[-2:], mode="nearest")
            shown[name] = x * seen + 0.5 * (1 - seen)
        return shown
