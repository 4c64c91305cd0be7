"""Methods that hide patches beside official code: MAE, SimMIM, I-JEPA."""

import math
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from parity_harness import Comparison, Side, Sides, copy_weights, shake
from parity_networks import (
    EPSILON,
    PATCH,
    SIDE,
    batch,
    decayed,
    descend,
    facts,
    optimizer_of,
    ours,
    settings,
    transformer,
)
from parity_official import Official, drawing
from timm import layers
from timm.models import vision_transformer as timm
from torch import Tensor, nn

from sslctl.methods.ijepa import IJEPA
from sslctl.methods.mae import MAE
from sslctl.methods.simmim import SimMIM
from sslctl.ops.masks import random_order

LR, DECAY, PATCHES = 2e-3, 1e-2, (SIDE // PATCH) ** 2
NORM = partial(nn.LayerNorm, eps=1e-6)
one_view = partial(batch, sizes={"global": (1, SIDE)})


def mae(official: Official) -> Sides:
    method = MAE(
        transformer(), facts(), mask_ratio=0.75, decoder_dim=8, decoder_depth=1, decoder_heads=2, normalize_target=True
    ).double()
    shake(method.embed, method.decoder, method.head)

    def block(dim: int, heads: int, ratio: float, qkv_bias: bool, qk_scale: None, norm_layer: type) -> nn.Module:
        return timm.Block(dim, heads, ratio, qkv_bias=qkv_bias, norm_layer=norm_layer)

    older = {"timm.models.vision_transformer": SimpleNamespace(PatchEmbed=timm.PatchEmbed, Block=block)}
    network = official.load("mae", "models_mae", older)
    script = official.load("mae", "engine_pretrain", {"torch._six": SimpleNamespace(inf=math.inf)})
    script.misc.is_dist_avail_and_initialized = lambda: False  # its meters would meet on a GPU
    model = network.MaskedAutoencoderViT(
        SIDE,
        PATCH,
        3,
        16,
        2,
        2,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
        norm_layer=NORM,
        norm_pix_loss=True,
    ).double()
    parts = [
        *(model.cls_token, model.pos_embed, model.patch_embed, model.blocks, model.norm),
        *(model.decoder_embed, model.mask_token, model.decoder_blocks, model.decoder_norm, model.decoder_pred),
    ]
    trained = [method.backbone, method.embed, method.mask_token, method.decoder, method.head]
    copy_weights(trained, parts)
    optimizer = torch.optim.AdamW(decayed(model, weight_decay=DECAY), lr=LR, eps=EPSILON)
    arguments = settings(accum_iter=1, mask_ratio=0.75, lr=LR, min_lr=LR, warmup_epochs=0, epochs=100)
    gradients = {}

    def scaler(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: object, update_grad: bool) -> None:
        loss.backward()
        gradients.update({p: p.grad for p in model.parameters()})  # the loop forgets them
        optimizer.step()

    def step(number: int) -> Tensor:
        data = one_view(number)
        _, mask = random_order(data.key, "mae", PATCHES, method.kept)
        noise = torch.arange(PATCHES) + PATCHES * mask.double()  # its smallest are our visible patches, in our order
        loader = [(method.backbone.normalize(data.views["global"][0]), None)]
        with drawing("rand", noise):
            out = script.train_one_epoch(model, loader, optimizer, torch.device("cpu"), number, scaler, args=arguments)
        for p, gradient in gradients.items():
            p.grad = gradient
        return torch.tensor(out["loss"])

    own = optimizer_of(method, "adamw", lr=LR, weight_decay=DECAY)
    return ours(method, own, one_view, trained), Side(step, parts)


def simmim(official: Official) -> Sides:
    method = SimMIM(transformer(qkv_bias=False), facts(), mask_ratio=0.5, mask_size=2 * PATCH).double()
    shake(method.head)
    network = official.load("simmim", "models.simmim", {"timm.models.layers": layers})
    groups = official.load("simmim", "optimizer").get_pretrain_param_groups
    encoder = network.VisionTransformerForSimMIM(
        img_size=SIDE,
        patch_size=PATCH,
        num_classes=0,
        embed_dim=16,
        depth=2,
        num_heads=2,
        norm_layer=NORM,
        use_mean_pooling=False,
    )
    model = network.SimMIM(encoder, PATCH).double()
    body = [encoder.cls_token, encoder.pos_embed, encoder.patch_embed, encoder.blocks, encoder.norm]
    copy_weights([method.backbone, method.mask_token], [*body, encoder.mask_token])
    head = model.decoder[0]
    with torch.no_grad():
        head.weight.copy_(_by_channel(method.head.weight)[..., None, None])
        head.bias.copy_(_by_channel(method.head.bias))
    optimizer = torch.optim.AdamW(
        groups(model, SimpleNamespace(info=print), model.no_weight_decay()), lr=LR, weight_decay=DECAY, eps=EPSILON
    )

    def step(number: int) -> Tensor:
        data = one_view(number)
        x = data.views["global"][0]
        mask = method.mask(data, x).view(-1, SIDE // PATCH, SIDE // PATCH).long()
        return descend(optimizer, model(method.backbone.normalize(x), mask))

    trained, parts = [method.backbone, method.mask_token], [*body, encoder.mask_token]
    own = ours(method, optimizer_of(method, "adamw", lr=LR, weight_decay=DECAY), one_view, [*trained, method.head])
    last = {"weight": lambda: _by_channel(method.head.weight), "bias": lambda: _by_channel(method.head.bias)}
    return (
        Side(own.step, trained, state=lambda: {name: tensor() for name, tensor in last.items()}),
        Side(step, parts, state=lambda: {"weight": head.weight, "bias": head.bias}),
    )


def _by_channel(x: Tensor) -> Tensor:
    """(p²·3, …) with channels last in a patch -> (3·p², …), as nn.PixelShuffle takes them."""
    return x.unflatten(0, (PATCH**2, 3)).transpose(0, 1).flatten(0, 1)


def ijepa(official: Official) -> Sides:
    plain = transformer(class_token=False, global_pool="avg", fc_norm=False)
    method = IJEPA(
        plain, facts(), targets=3, predictor_dim=8, predictor_depth=2, predictor_heads=2,
        initial_std=0.02, teacher_momentum=0.9, teacher_momentum_end=1.0,
    ).double()  # fmt: skip
    shake(method.embed, method.predictor, method.head, method.teacher_backbone)
    vit = official.load("ijepa", "src.models.vision_transformer")
    masks = official.load("ijepa", "src.masks.utils")
    size = {"embed_dim": 16, "depth": 2, "num_heads": 2, "norm_layer": NORM}
    encoder, target = (vit.VisionTransformer(img_size=[SIDE], patch_size=PATCH, **size).double() for _ in range(2))
    predictor = vit.VisionTransformerPredictor(
        num_patches=PATCHES, predictor_embed_dim=8, **{**size, "depth": 2}
    ).double()
    target.requires_grad_(False)
    trained = [method.backbone, method.embed, method.mask_token, method.predictor, method.head]
    parts = [
        encoder,
        predictor.predictor_embed,
        predictor.mask_token,
        predictor.predictor_blocks,
        predictor.predictor_norm,
    ]
    parts.append(predictor.predictor_proj)
    copy_weights(trained, parts)
    copy_weights([method.teacher_backbone], [target])
    optimizer = torch.optim.AdamW(decayed(encoder, predictor, weight_decay=DECAY), lr=LR, eps=EPSILON)

    def step(number: int) -> Tensor:
        data = one_view(number)
        x = data.views["global"][0]
        keep, wanted = method.patches(data, x)
        blocks = list(wanted.unbind(1))
        x = method.backbone.normalize(x)
        with torch.no_grad():
            h = target(x)
            h = masks.apply_masks(F.layer_norm(h, h.shape[-1:]), blocks)
        loss = descend(optimizer, F.smooth_l1_loss(predictor(encoder(x, [keep]), [keep], blocks), h))
        momentum = 0.9 + number * (1.0 - 0.9) / 100
        with torch.no_grad():
            for p, q in zip(target.parameters(), encoder.parameters(), strict=True):
                p.mul_(momentum).add_(q, alpha=1 - momentum)
        return loss

    own = optimizer_of(method, "adamw", lr=LR, weight_decay=DECAY)
    return ours(method, own, one_view, trained, [method.teacher_backbone]), Side(step, parts, [target])


MASKED = [
    Comparison("MAE", "mae", "`MaskedAutoencoderViT`, `train_one_epoch`", mae, remark="our visible patches; AdamW"),
    Comparison(
        "SimMIM", "simmim", "`VisionTransformerForSimMIM`, `SimMIM`, `get_pretrain_param_groups`", simmim, tolerance=1e-6,
        remark="its ViT with absolute positions and without biases of queries; 1e-5 in its denominator; our masks; AdamW",
    ),
    Comparison(
        "I-JEPA", "ijepa", "`VisionTransformer`, `VisionTransformerPredictor`, `apply_masks`", ijepa,
        remark="loop in our words; our blocks; AdamW",
    ),
]  # fmt: skip
