"""Files as public projects write them: their nesting, prefixes, names and companions, written by hand from the projects' code.

Each function takes a network's state under torchvision's or timm's names and returns what the project saves; a second network
in the file, of equal shapes, has other values.
"""

import re

import torch

T = torch.ones  # a tensor that no backbone has


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def other(state):
    """Another network: a momentum encoder, a student."""
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def renamed(state, *rules):
    result = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def numbered(state, first=4):
    """A ResNet as nn.Sequential(*list(resnet.children())[:-1])."""
    stages = [(rf"^layer{n + 1}\.", f"{first + n}.") for n in range(4)]
    return renamed(state, (r"^conv1\.", "0."), (r"^bn1\.", "1."), *stages)


def mlp(prefix, *layers):
    return {f"{prefix}{layer}.weight": T(3, 3) for layer in layers}


def two(state, query, key):
    return under(query, state | mlp("fc.", 0, 2)) | under(key, other(state) | mlp("fc.", 0, 2))


QUEUE = {"module.queue": T(4, 8), "module.queue_ptr": torch.zeros(1)}

RESNET = {
    "torchvision": lambda r: r | {"fc.weight": T(5, 10), "fc.bias": T(5)},
    "DINO, ResNet": lambda r: {
        "student": under("module.backbone.", other(r)) | mlp("module.head.mlp.", 0, 2),
        "teacher": under("backbone.", r) | mlp("head.mlp.", 0, 2) | {"head.last_layer.weight_g": T(4, 1)},
        "optimizer": {"state": {0: {"exp_avg": T(2)}}, "param_groups": []},
        "dino_loss": {"center": T(1, 4)},
    },
    "MoCo v1, v2": lambda r: {"state_dict": two(r, "module.encoder_q.", "module.encoder_k.") | QUEUE, "epoch": 200},
    "MoCo v3": lambda r: {
        "state_dict": two(r, "module.base_encoder.", "module.momentum_encoder.") | mlp("module.predictor.", 0, 3)
    },
    "SimSiam": lambda r: {"state_dict": under("module.encoder.", r | mlp("fc.", 0, 3)) | mlp("module.predictor.", 0)},
    "SwAV": lambda r: (
        under("module.", r) | mlp("module.projection_head.", 0, 1, 3) | {"module.prototypes.weight": T(4, 3)}
    ),
    "DeepCluster-v2": lambda r: {
        "state_dict": under("module.", r) | {f"module.prototypes.prototypes{n}.weight": T(4, 3) for n in range(3)}
    },
    "Barlow Twins": lambda r: {
        "epoch": 9,
        "model": under("module.backbone.", r) | mlp("module.projector.", 0, 1, 3) | {"module.bn.running_mean": T(3)},
        "optimizer": {"state": {1: {"mu": T(2)}}},
    },
    "VICReg": lambda r: {"model": under("module.backbone.", r) | mlp("module.projector.", 0, 1, 3)},
    "BYOL, lucidrains": lambda r: (
        under("online_encoder.net.", r)
        | mlp("online_encoder.projector.", 0, 1, 3)
        | under("target_encoder.net.", other(r))
        | mlp("online_predictor.", 0, 1, 3)
    ),
    "BYOL, sthalles": lambda r: {
        "online_network_state_dict": under("encoder.", numbered(r)) | mlp("projetion.net.", 0, 1, 3),
        "target_network_state_dict": under("encoder.", numbered(other(r))),
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]},
    },
    "SEED": lambda r: {"state_dict": two(r, "module.student.", "module.teacher.") | QUEUE},
    "solo-learn": lambda r: {
        "state_dict": under("backbone.", r)
        | under("momentum_backbone.", other(r))
        | mlp("projector.", 0, 1, 3)
        | {"classifier.weight": T(5, 10)},
        "hyper_parameters": {"method": "byol"},
        "pytorch-lightning_version": "2.1.2",
    },
    "solo-learn before 1.0.5": lambda r: {"state_dict": under("encoder.", r) | under("momentum_encoder.", other(r))},
    "lightly": lambda r: under("backbone.", numbered(r)) | mlp("projection_head.layers.", 0, 3),
    "lightly, momentum": lambda r: {
        "state_dict": under("backbone.", numbered(r)) | under("backbone_momentum.", numbered(other(r)))
    },
    "lightly, small images": lambda r: under("backbone.", renamed(numbered(r, 2), (r"\.downsample\.", ".shortcut."))),
    "mmselfsup": lambda r: {
        "meta": {"epoch": 200},
        "state_dict": under("backbone.", r)
        | under("encoder_q.0.", r)
        | under("encoder_k.0.", other(r))
        | {"neck.fc0.weight": T(3, 3), "head.predictor.fc0.weight": T(3, 3), "data_preprocessor.mean": T(3, 1, 1)},
    },
    "VISSL": lambda r: {
        "phase_idx": 3,
        "classy_state_dict": {
            "base_model": {"model": {"trunk": under("_feature_blocks.", r), "heads": mlp("0.clf.", 0)}, "meta": {}}
        },
    },
    "Lightning": lambda r: {"state_dict": under("model.backbone.", r) | mlp("model.head.", 0), "global_step": 5},
    "torch.compile in DDP": lambda r: {"state_dict": under("module._orig_mod.", r)},
    "transformers": lambda r: under(
        "resnet.",
        renamed(
            r,
            (r"^conv1\.", "embedder.embedder.convolution."),
            (r"^bn1\.", "embedder.embedder.normalization."),
            (r"^layer(\d)\.(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}."),
            (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
            (r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
            (r"\.downsample\.0\.", ".shortcut.convolution."),
            (r"\.downsample\.1\.", ".shortcut.normalization."),
        ),
    ),
}


def apart(state, *names):
    """Queries, keys and values as three layers, under these names."""
    result = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, own in zip(tensor.chunk(3), names, strict=True):
                result[name.replace("attn.qkv", own)] = part
        else:
            result[name] = tensor
    return result


def transformers_vit(state):
    """ViTModel, ViTMAEModel."""
    layers = apart(state, *(f"attention.attention.{name}" for name in ("query", "key", "value")))
    return renamed(
        layers,
        (r"^(cls_token|mask_token)$", r"embeddings.\1"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^norm\.", "layernorm."),
    )


def transformers_dinov2(state):
    """Dinov2Model, Dinov2WithRegistersModel."""
    layers = apart(state, *(f"attention.attention.{name}" for name in ("query", "key", "value")))
    return renamed(
        layers,
        (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
        (r"^norm\.", "layernorm."),
    )


def mmpretrain_vit(state):
    return renamed(
        state,
        (r"^patch_embed\.proj\.", "patch_embed.projection."),
        (r"^norm\.", "ln1."),
        (r"^blocks\.", "layers."),
        (r"\.norm([12])\.", r".ln\1."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    )


def mmpretrain_swin(state):
    """SwinTransformer, whose PatchMerging is torch's Unfold: where each value of timm's order stands in its is unfolded here."""
    result = renamed(
        state,
        (r"^patch_embed\.proj\.", "patch_embed.projection."),
        (r"^norm\.", "norm3."),
        (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
        (r"^layers\.", "stages."),
        (r"\.attn\.", ".attn.w_msa."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    )
    for name, tensor in result.items():
        if ".downsample." in name:
            channels = tensor.shape[-1] // 4
            places = torch.arange(4.0 * channels).view(1, 2, 2, channels)  # (B, H, W, C), each value at its place
            timms = places.reshape(1, 1, 2, 1, 2, channels).permute(0, 1, 3, 4, 2, 5).flatten()  # as its PatchMerging
            unfolded = torch.nn.Unfold(2, stride=2)(places.permute(0, 3, 1, 2)).flatten()
            result[name] = tensor[..., [timms.tolist().index(place) for place in unfolded.tolist()]]
    return result | {"stages.0.blocks.0.attn.w_msa.relative_position_index": T(4, 4).long()}


def mae_decoder(prefix=""):
    names = ("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.norm1.weight")
    return {f"{prefix}{name}": T(1, 1, 24) for name in (*names, "decoder_norm.weight", "decoder_pred.weight")}


VIT = {
    "timm": lambda v: v | {"head.weight": T(5, 24), "head.bias": T(5)},
    "timm, in training": lambda v: {"state_dict": other(v), "state_dict_ema": v, "epoch": 3, "metric": 0.5},
    "DINO": lambda v: {
        "student": under("module.backbone.", other(v)) | mlp("module.head.mlp.", 0, 2),
        "teacher": under("backbone.", v) | mlp("head.mlp.", 0, 2),
    },
    "iBOT": lambda v: {
        "student": under("module.backbone.", other(v) | {"masked_embed": T(1, 24)}),
        "teacher": under("module.backbone.", v | {"masked_embed": T(1, 24)}) | mlp("module.head.mlp.", 0, 2),
    },
    "iBOT, backbone": lambda v: {"state_dict": v | {"masked_embed": T(1, 24)}},
    "MAE": lambda v: {"model": v | mae_decoder(), "epoch": 800},
    "MSN": lambda v: {
        "encoder": under("module.", other(v) | mlp("fc.", "fc1", "fc2")),
        "target_encoder": under("module.", v | mlp("fc.", "fc1", "fc2")),
        "prototypes": T(8, 3),
        "epoch": 800,
    },
    "MoCo v3, ViT": lambda v: {
        "state_dict": under("module.base_encoder.", v | mlp("head.", 0, 3))
        | under("module.momentum_encoder.", other(v))
    },
    "solo-learn, MAE": lambda v: {"state_dict": under("backbone.", v) | under("decoder.", mae_decoder())},
    "mmpretrain": lambda v: {
        "state_dict": under("backbone.", mmpretrain_vit(v)) | {"head.layers.head.weight": T(5, 24)}
    },
    "transformers, ViT": lambda v: (
        under("vit.", transformers_vit(v)) | {"classifier.weight": T(5, 24), "vit.pooler.dense.weight": T(24, 24)}
    ),
    "transformers, MAE": lambda v: (
        under("vit.", transformers_vit(v | {"mask_token": T(1, 1, 24)}))
        | {"decoder.mask_token": T(1, 1, 24), "decoder.decoder_layers.0.layernorm_before.weight": T(24)}
    ),
    "FSDP": lambda v: {"model": under("_fsdp_wrapped_module.", v)},
}
SCALED = {  # layer scales
    "DINOv2": lambda v: v | {"mask_token": T(1, 24)},
    "DINOv2, in training": lambda v: {
        "model": under("teacher.backbone.", renamed(v, (r"^blocks\.(\d)\.", r"blocks.0.\1.")))
        | under("student.backbone.", renamed(other(v), (r"^blocks\.(\d)\.", r"blocks.0.\1.")))
        | {"dino_loss.center": T(1, 4), "teacher.dino_head.mlp.0.weight": T(3, 3)}
    },
    "transformers, DINOv2": lambda v: under("dinov2.", transformers_dinov2(v | {"mask_token": T(1, 24)})),
}


def dinov2_registers(state):
    """The official positions have one of the class token, which timm adds to the token."""
    state, position = dict(state), torch.full((1, 1, 24), 0.25)
    tokens = {"cls_token": state["cls_token"] - position, "register_tokens": state.pop("reg_token")}
    return state | tokens | {"pos_embed": torch.cat([position, state["pos_embed"]], 1), "mask_token": T(1, 24)}


REGISTERS = {
    "DINOv2 with registers": dinov2_registers,
    "transformers, DINOv2 with registers": lambda v: transformers_dinov2(dinov2_registers(v)),
}
GAP = {
    "I-JEPA": lambda v: {
        "encoder": under("module.", other(v)),
        "predictor": {"module.mask_token": T(1, 1, 12), "module.predictor_blocks.0.norm1.weight": T(12)},
        "target_encoder": under("module.", v),
        "opt": {"state": {0: {"exp_avg": T(2)}}, "param_groups": []},
    },
    "transformers, I-JEPA": lambda v: transformers_vit(v),
}


def dinov3(state):
    """The official names; the bias of keys is masked."""
    result = {"mask_token": T(1, 24), "rope_embed.periods": T(3)}
    for name, tensor in state.items():
        root = name.rpartition(".")[0]
        if name.endswith("v_bias"):
            continue
        if name.endswith("q_bias"):
            keys = torch.full_like(tensor, 0.5)
            result[f"{root}.qkv.bias"] = torch.cat([tensor, keys, state[f"{root}.v_bias"]])
            result[f"{root}.qkv.bias_mask"] = torch.cat([T(24), torch.zeros(24), T(24)])
        else:
            result |= renamed({name: tensor}, (r"gamma_(\d)$", r"ls\1.gamma"), ("^reg_token$", "storage_tokens"))
    return result


def transformers_dinov3(state):
    """DINOv3ViTModel: no bias of keys."""
    names = [f"attention.{part}_proj" for part in "qkv"]
    return renamed(
        apart(state, *names) | {"mask_token": T(1, 1, 24)},
        (r"^(cls_token|mask_token)$", r"embeddings.\1"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
        (r"^blocks\.", "layer."),
        (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.gamma_(\d)$", r".layer_scale\1.lambda1"),
        (r"\.mlp\.fc1\.", ".mlp.up_proj."),
        (r"\.mlp\.fc2\.", ".mlp.down_proj."),
    )


DINOV3 = {"DINOv3": dinov3, "transformers, DINOv3": transformers_dinov3}
BEIT = {
    "SimMIM, ViT": lambda v: {
        "model": under(
            "encoder.", v | {"mask_token": T(1, 1, 24), "rel_pos_bias.relative_position_index": T(5, 5).long()}
        )
        | {"decoder.0.weight": T(3, 24, 1, 1), "decoder.0.bias": T(3)},
        "optimizer": {"state": {}, "param_groups": []},
    },
}
SWIN = {
    "mmpretrain, Swin": lambda v: {
        "state_dict": under("backbone.", mmpretrain_swin(v)) | {"head.fc.weight": T(5, 16), "head.fc.bias": T(5)}
    },
    "SimMIM, Swin": lambda v: {
        "model": under(
            "encoder.",
            renamed(v, (r"^layers\.(\d)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."))
            | {"mask_token": T(1, 1, 24), "layers.0.blocks.0.attn.relative_position_index": T(4, 4).long()},
        )
        | {"decoder.0.weight": T(3, 24, 1, 1)},
    },
}
CONVNEXT = {
    "ConvNeXt, DINOv3": lambda v: renamed(
        v,
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
        (r"^head\.norm\.", "norm."),
    ),
    "transformers, ConvNeXt of DINOv3": lambda v: renamed(
        v,
        (r"^head\.norm\.", "layer_norm."),
        (r"^stem\.", "stages.0.downsample_layers."),
        (r"\.downsample\.", ".downsample_layers."),
        (r"\.blocks\.", ".layers."),
        (r"\.conv_dw\.", ".depthwise_conv."),
        (r"\.norm\.", ".layer_norm."),
        (r"\.mlp\.fc(\d)\.", r".pointwise_conv\1."),
    ),
}

SIMMIM = (("use_rel_pos_bias", False), ("use_shared_rel_pos_bias", True), ("global_pool", "token"))
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}
FAMILIES = {  # timm's model and its arguments -> files
    ("resnet18", (("channels", (4, 6, 8, 10)),)): RESNET,
    ("vit_tiny_patch16_224", tuple(SMALL.items())): VIT,
    ("vit_small_patch14_dinov2", (*SMALL.items(), ("patch_size", 16))): SCALED,
    ("vit_small_patch14_reg4_dinov2", (*SMALL.items(), ("patch_size", 16))): REGISTERS,
    ("vit_tiny_patch16_224", (*SMALL.items(), ("class_token", False), ("global_pool", "avg"), ("fc_norm", False))): GAP,
    ("vit_small_patch16_dinov3_qkvb", tuple(SMALL.items())): DINOV3,
    ("beit_base_patch16_224", (*SMALL.items(), *SIMMIM)): BEIT,
    (
        "swin_tiny_patch4_window7_224",
        (("embed_dim", 8), ("depths", (1, 1)), ("num_heads", (1, 1)), ("window_size", 4)),
    ): SWIN,
    ("convnext_tiny", (("dims", (4, 6, 8, 10)), ("depths", (1, 1, 1, 1)))): CONVNEXT,
}
CASES = [(model, kwargs, name, write) for (model, kwargs), files in FAMILIES.items() for name, write in files.items()]
