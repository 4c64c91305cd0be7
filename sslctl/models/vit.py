"""What masked methods ask of timm's vision transformers: hidden patches, tokens of some patches only, fixed positions."""

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

NEEDED = (
    "this method needs a vision transformer: backbone=small_vit, or backbone=timm backbone.model=vit_small_patch16_224"
)


def timm_if_imported() -> ModuleType | None:
    """Returns timm, or None in a process that has no module of its classes. Importing it takes as long as torch."""
    return sys.modules.get("timm")


def require_vit(network: nn.Module) -> nn.Module:
    """Returns timm's VisionTransformer or Eva (DINOv3, EVA-02) inside a network. Raises ValueError where there is none."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    model = getattr(network, "model", None)
    if not isinstance(model, VisionTransformer | Eva):
        raise ValueError(NEEDED)
    return model


def require_class_token(model: nn.Module) -> None:
    """Raises ValueError where a vision transformer's output is not its class token."""
    if model.cls_token is None:
        raise ValueError("this method learns by the class token, this backbone has no class token: backbone=small_vit")
    if model.global_pool != "token":
        raise ValueError(
            f"this method learns by the class token, this backbone has global_pool={model.global_pool}:"
            " +backbone.kwargs.global_pool=token"
        )


def patch_size_of(network: nn.Module) -> int:
    """Returns the side of a network's patches in pixels; 1 for networks without patches."""
    size = getattr(getattr(getattr(network, "model", None), "patch_embed", None), "patch_size", None)
    return max(size) if isinstance(size, tuple) else size or 1


def grid_of(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Returns how many (rows, columns) of patches images (B, C, H, W) have."""
    height, width = model.patch_embed.patch_size
    return images.shape[-2] // height, images.shape[-1] // width


def tokens(model: nn.Module, x: Tensor, mask: Tensor | None, mask_token: Tensor | None, keep: Tensor | None) -> Tensor:
    """The model's `forward_features` on normalised (B, C, H, W) -> (B, P + L, D), the P prefix tokens first.

    mask: (B, L) bool, True where mask_token (1, D) stands in for the patch's embedding. keep: (B, K) or (K,) int64, the only
    patches that go in; then L is K, in their order. Rotary positions go with their patches.
    """
    x = model.patch_embed(x)  # (B, rows, columns, D), or (B, L, D)
    if mask is not None:
        x = torch.where(mask.view(*x.shape[:-1], 1), mask_token.to(x.dtype), x)
    x = model._pos_embed(x)  # (B, P + L, D); resamples the positions for other sizes
    x, rotary = (
        x if isinstance(x, tuple) else (x, None)
    )  # of Eva: (L, d), or of each block and head (blocks, heads, L, d)
    if keep is not None:
        prefix, patches = x[:, : model.num_prefix_tokens], x[:, model.num_prefix_tokens :]
        x = torch.cat([prefix, gather_tokens(patches, keep)], dim=1)
        rotary = None if rotary is None else _gather_rotary(rotary, keep)
    x = model.norm_pre(x)
    if rotary is None:
        return model.norm(model.blocks(x) if isinstance(model.blocks, nn.Sequential) else _through(model.blocks, x))
    each = rotary if model.rope_mixed else [rotary] * len(model.blocks)
    for block, rope in zip(model.blocks, each, strict=True):
        x = block(x, rope=rope)
    return model.norm(x)


def _through(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def _gather_rotary(rotary: Tensor, keep: Tensor) -> Tensor:
    """(L, d) or (blocks, heads, L, d) and positions (K,) or (B, K) -> (K, d), (B, 1, K, d) or (blocks, B, heads, K, d)."""
    kept = rotary[..., keep, :]  # (…, K, d) or (…, B, K, d)
    if keep.ndim == 1:
        return kept
    return kept[:, None] if rotary.ndim == 2 else kept.transpose(1, 2)


def gather_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """(B, L, D) and positions (B, K) or (K,) -> (B, K, D)."""
    if keep.ndim == 1:
        return x[:, keep]
    return x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))


def fix_positions_(backbone: nn.Module) -> None:
    """Puts fixed sine-cosine position embeddings where a vision transformer would learn them (MoCo v3, section 5; MAE).

    Those that its weights came with stay, fixed as they are.
    """
    model = require_vit(backbone.network)
    if model.pos_embed is None:  # its rotary positions are fixed
        return
    model.pos_embed.requires_grad_(False)
    if "network.model.pos_embed" in backbone.pretrained:
        return
    rows, columns = model.patch_embed.grid_size
    extra = model.pos_embed.shape[1] - rows * columns  # positions of prefix tokens stay zero
    fixed = sine_cosine(model.embed_dim, rows, columns).to(model.pos_embed)
    with torch.no_grad():
        model.pos_embed.copy_(torch.cat([fixed.new_zeros(extra, model.embed_dim), fixed])[None])


def sine_cosine(dim: int, rows: int, columns: int) -> Tensor:
    """(rows · columns, dim): sines and cosines of the column in the first half, of the row in the second.

    Vaswani et al. 2017, section 3.5, once for each axis. Raises ValueError unless dim is a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, this backbone has {dim}")
    rates = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [axis.flatten()[:, None] * rates for axis in (column, row)]  # (L, dim / 4) each
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


def patchify(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, size² · C), the patches row by row, channels last in each."""
    x = images.unfold(2, size, size).unfold(3, size, size)  # (B, C, rows, columns, size, size)
    return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, size: int, rows: int) -> Tensor:
    """The inverse of `patchify`: (B, L, size² · C) -> (B, C, H, W)."""
    x = patches.unflatten(1, (rows, -1)).unflatten(3, (size, size, -1))  # (B, rows, columns, size, size, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def blocks(dim: int, depth: int, heads: int) -> list[nn.Module]:
    """timm's transformer blocks, for decoders and predictors: (B, L, dim) -> (B, L, dim) each."""
    from timm.models.vision_transformer import Block

    if dim % heads:
        raise ValueError(f"{heads} heads do not divide a width of {dim}")
    return [Block(dim, heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)) for _ in range(depth)]


def initialize_(*modules: nn.Module, draw: Callable[[str, Tensor], None], token_std: float = 0.02) -> None:
    """Draws initial weights of linear layers and of the patches' convolution, seen as one; their biases are 0.

    draw: fills a layer's weight (out, in), given its name: one of those below, or a method's own. What a backbone has from
    a file stays.
    """
    for module in modules:
        pretrained = getattr(module, "pretrained", ())
        for name, part in module.named_modules():
            if not isinstance(part, nn.Linear | nn.Conv2d):
                continue
            if f"{name}.weight" not in pretrained:
                draw(name, part.weight.view(len(part.weight), -1))
            if part.bias is not None and f"{name}.bias" not in pretrained:
                nn.init.zeros_(part.bias)
        for name, token in module.named_parameters():
            if name.endswith("cls_token") and name not in pretrained:
                nn.init.normal_(token, std=token_std)


def xavier(name: str, weight: Tensor) -> None:
    """Xavier's uniform weights (MAE's official code)."""
    nn.init.xavier_uniform_(weight)


def xavier_apart(name: str, weight: Tensor) -> None:
    """Xavier's uniform weights, where queries, keys and values are three layers (MoCo v3's official code)."""
    for part in weight.chunk(3 if name.endswith("qkv") else 1):
        nn.init.xavier_uniform_(part)
