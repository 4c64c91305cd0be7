"""DINOv2 and DINOv3 beside their official SSLMetaArch, which is given small networks."""

from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from omegaconf import DictConfig, OmegaConf
from parity_crops import CROPS, resampling_as_timm
from parity_harness import Comparison, Side, Sides, copy_weights, shake
from parity_networks import EPSILON, MEAN, PATCH, SIDE, STD, Without, batch, facts, optimizer_of, ours, transformer
from parity_official import Official, absent
from torch import Tensor, nn

from sslctl.data.batch import Batch
from sslctl.methods.dinov2 import DINOv2
from sslctl.methods.dinov3 import DINOv3
from sslctl.models.backbones import Backbone, Timm

LR, DECAY, WIDTH, DEPTH, HEADS, REGISTERS, CLIP = 2e-3, 1e-2, 16, 2, 2, 2, 0.3
SIZES = {"hidden_dim": 16, "bottleneck_dim": 8, "prototypes": 10}
OF_PATCHES = {"patch_hidden_dim": 12, "patch_bottleneck_dim": 6, "patch_prototypes": 9}
SHARED = {f"patch_{name}": size for name, size in SIZES.items()}
COMMON = SIZES | {
    "mask_chance": 0.7,
    "mask_ratio_low": 0.2,
    "mask_ratio_high": 0.6,
    "patch_weight": 1.5,
    "koleo_weight": 0.1,
    "student_temperature": 0.1,
    "teacher_temperature_start": 0.04,
    "teacher_temperature": 0.07,
    "teacher_temperature_warmup_epochs": 3,
    "teacher_momentum": 0.9,
    "teacher_momentum_end": 1.0,
    "freeze_epochs": 0,
    "patch_lr_scale": 0.2,
    "clip_grad": CLIP,
}


# --- Their side, of both ---


def joined(parts: list[Tensor]) -> tuple[SimpleNamespace, Tensor]:
    """xformers' BlockDiagonalMask.from_tensor_list: tensors (1, n, D) behind one another, and what takes them apart."""
    sizes = [part.shape[1] for part in parts]
    return SimpleNamespace(split=lambda x: list(x.split(sizes, 1))), torch.cat(parts, 1)


XFORMERS = SimpleNamespace(fmha=SimpleNamespace(BlockDiagonalMask=SimpleNamespace(from_tensor_list=joined)))
STUBS = {
    "xformers": MagicMock(),
    "xformers.ops": XFORMERS,
    **absent("fvcore", "fvcore.common"),
    "fvcore.common.checkpoint": SimpleNamespace(Checkpointer=object, PeriodicCheckpointer=object),
}


def collated(data: Batch, backbone: Backbone, masks: Tensor) -> dict[str, Any]:
    """What the official collate_data_and_cast would hand over, with our masks (2B, L)."""
    names = {"global": "collated_global_crops", "local": "collated_local_crops", "gram": "collated_gram_teacher_crops"}
    images = {names[group]: backbone.normalize(views.flatten(0, 1)) for group, views in data.views.items()}
    places, shares = masks.flatten().nonzero().flatten(), 1 / masks.sum(1).clamp(min=1.0)
    return images | {
        "collated_masks": masks,
        "mask_indices_list": places,
        "masks_weight": shares[:, None].expand_as(masks)[masks],
        "upperbound": len(places),
        "n_masked_patches": torch.full((1,), len(places)),
        "global_batch_size": len(data.index),
    }


def configured(official: Official, name: str, **changes: dict[str, Any]) -> DictConfig:
    """The official defaults, with the sizes of this comparison."""
    head = {"head_n_prototypes": "prototypes", "head_bottleneck_dim": "bottleneck_dim", "head_hidden_dim": "hidden_dim"}
    own = {
        "dino": {key: COMMON[size] for key, size in head.items()} | {"koleo_loss_weight": COMMON["koleo_weight"]},
        "ibot": {key: OF_PATCHES[f"patch_{size}"] for key, size in head.items()} | {"separate_head": True},
        "train": {"OFFICIAL_EPOCH_LENGTH": 1},
        "crops": {"local_crops_number": CROPS["local"][0], "global_crops_size": SIDE},
        "student": {"patch_size": PATCH},
        "optim": {"layerwise_decay": 1.0, "patch_embed_lr_mult": COMMON["patch_lr_scale"]},
    }
    own["ibot"]["loss_weight"] = COMMON["patch_weight"]
    defaults = OmegaConf.load(official.folder(name) / name / "configs" / "ssl_default_config.yaml")
    return OmegaConf.merge(defaults, own, *({group: values} for group, values in changes.items()))


def official_loop(arch: nn.Module, train: ModuleType, optimizer: torch.optim.Optimizer) -> Callable:
    """One turn of the official do_train: rates, forward and backward by `total`, clipping of each part, and the optimizer."""
    momenta = train.CosineScheduler(0.9, 1.0, 100)
    temperatures = train.CosineScheduler(0.07, 0.07, 4, warmup_iters=4, start_warmup_value=0.04)

    def turn(number: int, total: Callable[[float], Tensor]) -> Tensor:
        train.apply_optim_scheduler(optimizer, LR, DECAY, LR)
        optimizer.zero_grad(set_to_none=True)
        loss = total(temperatures[number])
        for part in arch.student.values():
            nn.utils.clip_grad_norm_(part.parameters(), CLIP)
        optimizer.step()
        arch.momentum = momenta[number]
        return loss

    return turn


# --- DINOv2 ---


def dinov2(official: Official, *, centred: bool) -> Sides:
    """centred: the targets are, and class tokens and patches share a head, as in the official short setup."""
    sizes = SHARED if centred else OF_PATCHES
    method = DINOv2(
        transformer(), facts(steps_per_epoch=1), separate_heads=not centred, centered=centred,
        sinkhorn_iterations=3,
        center_momentum=0.9, **COMMON, **sizes,
    ).double()  # fmt: skip
    with patch.dict("os.environ", {"XFORMERS_DISABLED": "1"}):
        package = official.load("dinov2", "dinov2.train", STUBS)
        vit = official.load("dinov2", "dinov2.models.vision_transformer")
    script, train = package.ssl_meta_arch, package.train
    script.build_model_from_cfg = lambda cfg: (dinov2_network(vit), dinov2_network(vit), WIDTH)
    script.get_fsdp_modules = lambda module: [SimpleNamespace(params=list(module.parameters()))]
    changes = {"train": {"centering": "centering" if centred else "sinkhorn_knopp"}}
    changes |= {"ibot": {"separate_head": not centred}, "compute_precision": {"grad_scaler": False}}
    arch = script.SSLMetaArch(configured(official, "dinov2", **changes))
    arch.need_to_synchronize_fsdp_streams = False
    arch.train()

    shake(method.heads, method.teacher_backbone, method.teacher_heads)
    with torch.no_grad():
        method.mask_token.copy_(torch.linspace(-0.5, 0.5, WIDTH))
    trained = [method.backbone, method.mask_token, *parts_of_heads(method.heads, "lengths")]
    slow = [method.teacher_backbone, *parts_of_heads(method.teacher_heads, "lengths")]
    theirs, their_slow = (
        [Without(side.backbone, "mask_token"), *token, *parts_of_heads(their_heads(side), "weight_g")]
        for side, token in ((arch.student, [arch.student.backbone.mask_token]), (arch.teacher, []))
    )
    copy_weights(trained, theirs)
    copy_weights(slow, their_slow)
    state = their_state = dict
    if centred:
        method.center.copy_(torch.linspace(-0.1, 0.1, 10))
        method.patch_center.copy_(torch.linspace(0.2, -0.1, 10))
        arch.dino_loss.center.copy_(method.center)
        arch.ibot_patch_loss.center.copy_(method.patch_center[None])

        def state() -> dict[str, Tensor]:
            return {"center": method.center, "patch_center": method.patch_center}

        def their_state() -> dict[str, Tensor]:
            arch.dino_loss.apply_center_update()  # theirs waits for the next step
            arch.ibot_patch_loss.apply_center_update()
            return {"center": arch.dino_loss.center, "patch_center": arch.ibot_patch_loss.center[0]}

    turn = official_loop(arch, train, torch.optim.AdamW(arch.get_params_groups(), eps=EPSILON))

    def step(number: int) -> Tensor:
        data = batch(number, CROPS)
        inputs = collated(data, method.backbone, hidden(method, data))

        def total(temperature: float) -> Tensor:
            out = arch.forward_backward(inputs, temperature)  # calls backward; KoLeo and iBOT are shown by halves
            class_loss = out["dino_local_crops_loss"] + out["dino_global_crops_loss"]
            return class_loss + 2 * out["koleo_loss"] + COMMON["patch_weight"] * 2 * out["ibot_loss"]

        loss = turn(number, total)
        arch.update_teacher(arch.momentum)
        return loss

    own = optimizer_of(method, "adamw", lr=LR, weight_decay=DECAY)
    return (
        ours(method, own, partial(batch, sizes=CROPS), trained, slow, state),
        Side(step, theirs, their_slow, their_state),
    )


def dinov2_network(vit: ModuleType) -> nn.Module:
    """Their network, which takes tensors of several sizes one after the other: as one it would ask for xformers."""
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    network = vit.DinoVisionTransformer(
        **sizes, block_fn=partial(vit.Block, attn_class=vit.MemEffAttention), block_chunks=0
    )
    network.forward_features_list = lambda inputs, masks: [
        network.forward_features(*pair) for pair in zip(inputs, masks, strict=True)
    ]
    return resampling_as_timm(network)


def hidden(method: DINOv2, data: Batch) -> Tensor:
    """Our masks (2B, L) of the global views."""
    return method.masks(data)[0].flatten(0, 1)


def their_heads(side: nn.ModuleDict) -> list[nn.Module]:
    return [side[name] for name in ("dino_head", "ibot_head") if name in side]


def parts_of_heads(heads: Iterable[nn.Module], lengths: str) -> list[nn.Module | nn.Parameter]:
    """Each head's parameters with the lengths of its prototypes, under the given name, behind the others."""
    return [
        part
        for head in heads
        for part in (Without(head, lengths), *(p for name, p in head.named_parameters() if name.endswith(lengths)))
    ]


# --- DINOv3 ---

GRAM = {"gram_weight": 1.5, "local_weight": 0.5, "gram_teacher_from": 0.0, "gram_start": 0.02, "gram_ramp": 0.02}
GRAM |= {"gram_refresh": 0.01, "gram_refreshes": 2}  # of 100 steps: anchored from 2 on, in full from 4 on
GRAM_CROPS = CROPS | {"gram": (2, 2 * SIDE)}


def dinov3(official: Official) -> Sides:
    method = DINOv3(
        rotary(), facts(steps_per_epoch=1), sinkhorn_iterations=3, **COMMON, **OF_PATCHES, **GRAM
    ).double()  # fmt: skip
    script = official.load("dinov3", "dinov3.train.ssl_meta_arch", DINOV3_STUBS)
    train = official.load("dinov3", "dinov3.train.train", DINOV3_STUBS)
    vit = official.load("dinov3", "dinov3.models.vision_transformer")
    script.build_model_from_cfg = lambda cfg, only_teacher=False: (
        (dinov3_network(vit), WIDTH) if only_teacher else (dinov3_network(vit), dinov3_network(vit), WIDTH)
    )
    ramp = {"peak": 0, "warmup_epochs": 2, "cosine_epochs": 3}
    gram = {"use_loss": True, "ckpt": "ignore", "img_level": True, "update_frequency": 1, "it_first_update": 3}
    gram |= {"max_updates": 2, "loss_weight_schedule": ramp | {"start": 0, "end": GRAM["gram_weight"]}}
    local = {"local_loss_weight_schedule": {**ramp, "start": 1, "peak": 1, "end": GRAM["local_weight"]}}
    changes = {"gram": gram, "crops": {"gram_teacher_crops_size": 2 * SIDE}}
    changes["dino"] = local | {"reweight_dino_local_loss": True}
    arch = script.SSLMetaArch(configured(official, "dinov3", **changes))
    arch.ibot_patch_loss.sinkhorn_knopp_teacher._compiled_call_impl = None
    arch.gram_teacher_initialized = True
    arch.train()

    shake(method.heads, method.teacher_backbone, method.teacher_heads)
    shake(method.gram_teacher, seed=8)
    with torch.no_grad():
        method.mask_token.copy_(torch.linspace(-0.5, 0.5, WIDTH))
    trained = [*in_order(method.backbone), method.mask_token, *method.heads]
    slow = [*in_order(method.teacher_backbone), *method.teacher_heads, *in_order(method.gram_teacher)]
    theirs, their_slow = (
        [*in_order(side.backbone), *token, *their_heads(side)]
        for side, token in ((arch.student, [arch.student.backbone.mask_token]), (arch.teacher, []))
    )
    their_slow += in_order(arch.gram_teacher.backbone)
    copy_weights(trained, theirs)
    copy_weights(slow, their_slow)
    turn = official_loop(arch, train, torch.optim.AdamW(plain(arch.get_params_groups()), eps=EPSILON))
    updates = []

    def step(number: int) -> Tensor:
        data = batch(number, GRAM_CROPS)
        inputs = collated(data, method.backbone, hidden(method, data))
        loss = turn(number, lambda t: arch.forward_backward(inputs, teacher_temp=t, iteration=number)[0].detach())
        arch.update_ema(arch.momentum)
        due = number + 1 >= arch.gram_it_first_update and (number + 1) % arch.gram_update_frequency == 0
        if due and len(updates) < arch.cfg.gram.max_updates:  # as in their do_train
            arch.update_gram()
            updates.append(number)
        return loss

    own = optimizer_of(method, "adamw", lr=LR, weight_decay=DECAY)
    return ours(method, own, partial(batch, sizes=GRAM_CROPS), trained, slow), Side(step, theirs, their_slow)


def rotary() -> Backbone:
    """timm's DINOv3, with registers and rotary positions, of the same sizes as the other transformers here."""
    torch.manual_seed(0)
    sizes = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_reg_tokens": REGISTERS}
    model = Timm("vit_small_patch16_dinov3", 3, SIDE, sizes | {"global_pool": "token"})
    backbone = Backbone(model, MEAN, STD).double()
    shake(backbone)
    return backbone


def dinov3_network(vit: ModuleType) -> nn.Module:
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    network = vit.DinoVisionTransformer(
        **sizes, n_storage_tokens=REGISTERS, layerscale_init=1e-5, norm_layer="layernormbf16", qkv_bias=False,
        pos_embed_rope_dtype="fp32",
    ).double()  # fmt: skip
    network.rope_embed.dtype = torch.float64  # of periods that are made as fp32, as timm's
    return network


def in_order(network: nn.Module) -> list[nn.Parameter]:
    """A network's parameters but its mask token, in an order by what they are: layer scales have other names and places."""

    def place(name: str) -> str:
        for theirs, here in OF_TIMM.items():
            name = name.replace(theirs, here)
        return name

    named = {place(name.removeprefix("network.model.")): p for name, p in network.named_parameters()}
    named.pop("mask_token", None)
    return [named[name] for name in sorted(named)]


OF_TIMM = {"storage_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
DINOV3_STUBS = absent("termcolor")


def plain(groups: Iterable[dict]) -> list[dict]:
    """Optimizer groups without "fused", which is for a GPU's."""
    return [{key: value for key, value in group.items() if key != "fused"} for group in groups]


ARCH = "`SSLMetaArch` with its `forward_backward`, `get_params_groups`"
WORDS = "loop in our words; our masks; positions of local crops as timm has them; AdamW"
DINOV2 = [
    Comparison(
        "DINOv2", "dinov2", f"`DinoVisionTransformer`, {ARCH}, `update_teacher`; `apply_optim_scheduler`",
        partial(dinov2, centred=False), 6, remark=WORDS,
    ),
    Comparison(
        "DINOv2, shared head, centred", "dinov2", "as above", partial(dinov2, centred=True), 6,
        remark=WORDS,
    ),
    Comparison(
        "DINOv3", "dinov3", f"`DinoVisionTransformer`, {ARCH}, `update_ema`, `update_gram`; `apply_optim_scheduler`",
        dinov3, 6, remark="loop in our words; our masks; timm's DINOv3 with registers; AdamW",
    ),
]  # fmt: skip
