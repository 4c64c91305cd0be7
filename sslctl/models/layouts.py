"""How public projects name a backbone's tensors: data for `sslctl.models.matching`, which asks for nothing else.

Names on the right are those of torchvision's ResNets and of timm's transformers, which sslctl's own backbones have too.
"""

import re
from dataclasses import dataclass

from sslctl.models.mobile_layouts import (
    EFFICIENTNET,
    EFFICIENTNET_V2,
    MOBILENET_V2,
    MOBILENET_V3_LARGE,
    MOBILENET_V3_SMALL,
)

# Put inside names by compilation, sharding and activation checkpointing.
INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")


@dataclass(frozen=True)
class Layout:
    """anchor: a tensor that only this layout has, whose prefix is that of all. renames: (pattern, replacement), in order.

    unfolded: its patch merging reads channel by channel, the four places of each, as torch's Unfold gives them; timm's reads
    place by place. eps: of its BatchNorm, which no tensor holds, where timm has networks of these names with other ones.
    """

    anchor: str
    renames: tuple[tuple[str, str], ...] = ()
    unfolded: bool = False
    eps: float | None = None


_STAGES = range(4)

# Hugging Face transformers: ViT, ViT-MAE, DINOv2 (with registers), DINOv3.
_TRANSFORMERS = (
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    *(
        (rf"\.attention\.(?:attention\.)?(?:{name}|{name[0]}_proj)\.", f".attn.{name[0]}.")
        for name in ("query", "key", "value")
    ),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"^(?:layernorm|model\.norm)\.", "norm."),
)
_TRANSFORMERS_RESNET = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    *((rf"^encoder\.stages\.{stage}\.layers\.", f"layer{stage + 1}.") for stage in _STAGES),
    *((rf"\.layer\.{n}\.convolution\.", f".conv{n + 1}.") for n in range(3)),
    *((rf"\.layer\.{n}\.normalization\.", f".bn{n + 1}.") for n in range(3)),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)
_TORCHVISION_VIT = (
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:linear_2|3)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)
_TORCHVISION_SWIN = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    *((rf"^features\.{2 * stage + 1}\.", f"layers.{stage}.blocks.") for stage in _STAGES),
    *((rf"^features\.{2 * stage}\.", f"layers.{stage}.downsample.") for stage in _STAGES),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
_TORCHVISION_CONVNEXT = (
    (r"^features\.0\.", "stem."),
    *((rf"^features\.{2 * stage + 1}\.", f"stages.{stage}.blocks.") for stage in _STAGES),
    *((rf"^features\.{2 * stage}\.", f"stages.{stage}.downsample.") for stage in _STAGES),
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"\.layer_scale$", ".gamma"),
    (r"^classifier\.0\.", "head.norm."),
)
_TRANSFORMERS_CONVNEXT = (  # DINOv3's
    (r"^stages\.0\.downsample_layers\.", "stem."),
    (r"\.downsample_layers\.", ".downsample."),
    (r"\.layers\.", ".blocks."),
    (r"\.depthwise_conv\.", ".conv_dw."),
    (r"\.pointwise_conv([12])\.", r".mlp.fc\1."),
    (r"\.layer_norm\.", ".norm."),
    (r"^layer_norm\.", "head.norm."),
)
_MMPRETRAIN_VIT = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.attn\.gamma1\.weight$", ".ls1.gamma"),
    (r"\.ffn\.gamma2\.weight$", ".ls2.gamma"),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^(?:ln1|norm1)\.", "norm."),
)

_MMPRETRAIN_SWIN = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    *((rf"^stages\.{stage}\.downsample\.", f"layers.{stage + 1}.downsample.") for stage in _STAGES),
    (r"^stages\.", "layers."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^norm3\.", "norm."),
)

# Which number a ResNet's children have in an nn.Sequential, with its activation and pooling among them and without.
_NUMBERS = ((r"^0\.", "conv1."), (r"^1\.", "bn1."))
_SEQUENTIAL = (*_NUMBERS, *((rf"^{3 + stage}\.", f"layer{stage}.") for stage in range(1, 5)))
_SEQUENTIAL_SHORT = (*_NUMBERS, *((rf"^{1 + stage}\.", f"layer{stage}.") for stage in range(1, 5)))

LAYOUTS = (
    Layout(r"embeddings\.patch_embeddings\.(?:projection\.)?weight", _TRANSFORMERS),
    Layout(r"embedder\.embedder\.convolution\.weight", _TRANSFORMERS_RESNET),
    Layout(r"conv_proj\.weight", _TORCHVISION_VIT),
    Layout(r"features\.1\.0\.attn\.relative_position_bias_table", _TORCHVISION_SWIN),
    Layout(r"features\.1\.0\.layer_scale", _TORCHVISION_CONVNEXT),
    Layout(r"stages\.0\.downsample_layers\.0\.weight", _TRANSFORMERS_CONVNEXT),
    Layout(r"patch_embed\.projection\.weight", _MMPRETRAIN_VIT),
    Layout(r"stages\.0\.blocks\.0\.attn\.w_msa\.relative_position_bias_table", _MMPRETRAIN_SWIN, unfolded=True),
    Layout(r"features\.6\.8\.block\.1\.0\.weight", EFFICIENTNET, eps=1e-3),  # B5 to B7 are as deep
    Layout(r"features\.1\.0\.block\.1\.fc1\.weight", EFFICIENTNET, eps=1e-5),
    Layout(r"features\.2\.0\.block\.1\.0\.weight", EFFICIENTNET_V2, eps=1e-3),
    Layout(r"features\.1\.conv\.0\.0\.weight", MOBILENET_V2, eps=1e-5),
    Layout(r"features\.1\.block\.0\.0\.weight", MOBILENET_V3_LARGE, eps=1e-3),
    Layout(r"features\.1\.block\.0\.0\.weight", MOBILENET_V3_SMALL, eps=1e-3),
    Layout(r"7\.0\.conv1\.weight", _SEQUENTIAL),
    Layout(r"5\.0\.conv1\.weight", _SEQUENTIAL_SHORT),
    Layout(r"blocks\.0\.0\.norm1\.weight", ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),)),  # DINOv2's chunks of blocks
    # Renamed by timm's own checkpoint_filter_fn: ConvNeXt's official names, OpenAI's CLIP.
    Layout(r"downsample_layers\.0\.0\.weight"),
    Layout(r"visual\.class_embedding"),
)

# Other names of one tensor, tried where the network has none of the name so far.
ALTERNATIVES = (
    (r"^(?:register_tokens|storage_tokens)$", "reg_token"),
    (r"\.ls(\d)\.gamma$", r".gamma_\1"),
    (r"\.gamma_(\d)$", r".ls\1.gamma"),
    (r"\.attn\.([qv])(?:_proj)?\.bias$", r".attn.\1_bias"),
    (r"\.attn\.([qkv])\.", r".attn.\1_proj."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.shortcut\.([01])\.", r".downsample.\1."),  # lightly's ResNet for small images
    (r"\.downsample\.([01])\.", r".shortcut.\1."),
)

# Of several networks in a file, that which its project takes: the first of these that a prefix matches.
PREFERENCES = (
    r"(?:^|[._])ema(?:[._]|$)",  # timm
    r"^(?:model\.|state_dict\.)?teacher\.",  # DINO, iBOT, DINOv2
    r"(?:^|[._])online[._]",  # BYOL
    r"^target_encoder\.",  # I-JEPA, MSN
    r"(?:^|[._])(?:encoder_q|base_encoder|student)[._]",  # MoCo, SEED
    r"^(?!.*(?:teacher|target|momentum|encoder_k|ema))",
)

# Computed by the network itself, in some versions saved as well.
COMPUTED = re.compile(
    r"(?:relative_position_index|relative_coords_table|attn_mask|k_bias|bias_mask|num_batches_tracked)$|^rope|\.rope\."
)

# Where a backbone's tensors are, in whatever network: none of these is left out silently. Numbers stand for each other.
BACKBONE = re.compile(
    r"^(?:cls_token|class_token|dist_token|reg_token|register_tokens|storage_tokens|pos_embed|patch_embed|norm|norm_pre|fc_norm"
    r"|rel_pos_bias|blocks|layers?|layer\d+|stages|stem|conv\d*|bn\d*|conv_stem|features)(?:\.|$)"
)

# Parts that have a backbone's place or name and are none: heads, decoders, what only pretraining needs.
NO_BACKBONE = re.compile(
    r"^(?:fc|heads?|head_dist|classifier|last_linear|mask_token|masked_embed|decoder\w*|predictor|projector|projection_head"
    r"|prototypes|pooler|lm_head|local_cls_norm)(?:\.|$)"
)

# What makes the network that of the file: (a pattern of the names that are too many or missing, the advice).
ADVICE = {
    "unexpected": (
        (
            r"^rel_pos_bias\.",
            "+{key}.kwargs.use_rel_pos_bias=false +{key}.kwargs.use_shared_rel_pos_bias=true (SimMIM)",
        ),
        (r"^blocks\.\d+\.norm1\.weight$", "the file's network is deeper: +{key}.kwargs.depth={depth}"),
        (r"\.ls\d\.gamma$|\.gamma_\d$", "+{key}.kwargs.init_values=1e-5 gives the network layer scales"),
        (
            r"^(?:reg_token|register_tokens|storage_tokens)$",
            "{key}.model=… with registers, or +{key}.kwargs.reg_tokens={rows}",
        ),
        (
            r"^cls_token$",
            "+{key}.kwargs.class_token=true +{key}.kwargs.global_pool=token gives the network a class token",
        ),
        (
            r"\.attn\.[qv](?:_bias|\.bias)$|\.attn\.qkv\.bias$",
            "the file has biases of queries and values: {key}.model=…_qkvb",
        ),
    ),
    "missing": (
        (
            r"^fc_norm\.",
            "+{key}.kwargs.global_pool=token keeps the file's norm in its place; for a mean so does +{key}.kwargs.fc_norm=false",
        ),
        (r"^cls_token$", "+{key}.kwargs.class_token=false +{key}.kwargs.global_pool=avg +{key}.kwargs.fc_norm=false"),
        (r"^reg_token$", "the file's network has no registers: {key}.model=… without them"),
        (r"\.ls\d\.gamma$|\.gamma_\d$", "the file's network has no layer scales: {key}.model=… without them"),
    ),
}
