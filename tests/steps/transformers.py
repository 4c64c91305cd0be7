"""A small vision transformer for reference steps, and what they make of its parts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.models.backbones import Backbone, Timm

MEAN = torch.tensor([0.5, 0.4, 0.6]).double().view(3, 1, 1)
STD = torch.tensor([0.3, 0.2, 0.25]).double().view(3, 1, 1)
PATCH, WIDTH, PREFIX = 2, 8, 2


def vision_transformer(side: int) -> Backbone:
    """Two blocks of width 8 on patches of 2×2 pixels, with a class token and a register, which are PREFIX tokens."""
    torch.manual_seed(0)
    sizes = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "reg_tokens": 1}
    return Backbone(Timm("vit_tiny_patch16_224", 3, side, sizes), MEAN.flatten().tolist(), STD.flatten().tolist())


class Block(nn.Module):
    """Self-attention and two layers, each behind a norm and added to what came in (ViT, eq. 2 and 3), by timm's names."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.attn, self.mlp = heads, nn.Module(), nn.Module()
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        z = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v  # (B, heads, L, D / heads)
        x = x + self.attn.proj(z.transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


def transformer() -> nn.Sequential:
    """MAE's decoder and I-JEPA's predictor: two blocks of width 8 and a norm."""
    return nn.Sequential(Block(8, 4), Block(8, 4), nn.LayerNorm(8, 1e-6))


def embedded(backbone: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, L, D): patches without their positions."""
    return backbone.network.model.patch_embed.proj((images - MEAN) / STD).flatten(2).transpose(1, 2)


def encoded(backbone: nn.Module, patches: Tensor, keep: list[list[int]] | None = None) -> Tensor:
    """(B, L, D) -> (B, 2 + L, D) of a whole image's patches, or (B, 2 + K, D) of those that each image keeps."""
    model = backbone.network.model
    patches = patches + model.pos_embed[:, PREFIX:]
    if keep is not None:
        patches = torch.stack([image[places] for image, places in zip(patches, keep, strict=True)])
    first = torch.cat([model.cls_token, model.reg_token], 1) + model.pos_embed[:, :PREFIX]
    first = first.expand(len(patches), -1, -1)
    return model.norm(model.blocks(torch.cat([first, patches], 1)))


def of_tokens(its: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Features of a method with a teacher: its class token, the mean of its patches, and the student's class token."""
    tokens = encoded(its.teacher_backbone, embedded(its.teacher_backbone, images))
    return {"teacher": tokens[:, 0], "mean": tokens[:, PREFIX:].mean(1), "backbone": its.backbone(images)}


def pixels(images: Tensor, size: int = PATCH) -> Tensor:
    """(B, 3, S, S) -> (B, L, size·size·3), the channels of a pixel side by side."""
    rows = images.shape[-1] // size
    return torch.einsum("bcxiyj->bxyijc", images.reshape(-1, 3, rows, size, rows, size)).reshape(
        len(images), rows**2, -1
    )


def sines(dim: int, rows: int) -> Tensor:
    """(rows², dim): for each place sines and cosines of its column, then of its row (MAE's official code)."""
    rates = 1 / 10_000 ** (torch.arange(dim // 4).double() / (dim / 4))
    table = []
    for row in range(rows):
        for column in range(rows):
            table.append(torch.cat([f(place * rates) for place in (column, row) for f in (torch.sin, torch.cos)]))
    return torch.stack(table)
