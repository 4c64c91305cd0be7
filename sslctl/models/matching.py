"""Which tensors of a file are which of a backbone's, by the names that `sslctl.models.layouts` lists."""

import contextlib
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sslctl.models.backbones import Backbone
from sslctl.models.layouts import ALTERNATIVES, BACKBONE, COMPUTED, INFIXES, LAYOUTS, NO_BACKBONE, PREFERENCES, Layout

_PLAIN = Layout("")
_DEEPEST = 8  # dictionaries inside dictionaries
_TRIED = 8  # prefixes, those under which most of the network's names are
_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")  # what timm's modules call them
_HELD = {
    "patch_embed.proj.weight": 4,
    "pos_embed": 3,
}  # and their dimensions: sslctl.models.adaptation changes them, and says so


@dataclass
class Match:
    """A file's tensors in a backbone's terms. prefix: of the network in the file; alternatives: of others that fit as well.

    eps: of the BatchNorm of the file's network, where it is known.
    """

    prefix: str
    tensors: dict[str, Tensor] = field(default_factory=dict)  # the backbone's names
    unexpected: dict[str, Tensor] = field(default_factory=dict)  # of a backbone, but not of this one
    parts: Counter = field(default_factory=Counter)  # left out: what is no backbone, and how many tensors of it
    alternatives: list[str] = field(default_factory=list)
    eps: float | None = None


def flatten(content: dict, depth: int = _DEEPEST, seen: frozenset[int] | set[int] = frozenset()) -> dict[str, Tensor]:
    """Returns the tensors inside nested dictionaries under dotted names, without what compilers and wrappers put inside names.

    A dictionary that stands at several places, or in itself, is read once.
    """
    tensors, seen = {}, seen or set()
    seen.add(id(content))
    for name, value in content.items():
        name = str(name)
        for infix in INFIXES:
            name = name.replace(infix, "")
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict) and depth and id(value) not in seen:
            tensors |= {f"{name}.{inner}": tensor for inner, tensor in flatten(value, depth - 1, seen).items()}
    return tensors


def match(theirs: dict[str, Tensor], backbone: Backbone) -> Match:
    """Finds a backbone's tensors in a file: in the layout and under the prefix where most of its names and shapes are.

    Of networks that fit equally well, that which the file's project takes. Nothing is copied, resampled or refused here.
    """
    ours = backbone.state_dict()
    places = _places(ours)

    candidates = [_translate(theirs, prefix, layout, backbone, places) for prefix, layout in _entries(theirs, places)]
    if not candidates:
        return Match("", parts=_parts(theirs, ""))
    fitting = {id(candidate): _fitting(candidate.tensors, ours) for candidate in candidates}
    candidates.sort(key=lambda c: (-fitting[id(c)], -len(c.tensors), _preference(c.prefix), len(c.prefix)))
    best = candidates[0]
    best.alternatives = [
        c.prefix for c in candidates[1:] if fitting[id(c)] == fitting[id(best)] and c.prefix != best.prefix
    ]
    return best


def _fitting(tensors: dict[str, Tensor], ours: dict[str, Tensor]) -> int:
    return sum(ours[name].shape == tensor.shape for name, tensor in tensors.items())


def bare(name: str) -> str:
    """Returns a backbone's name of a tensor as its network alone has it: without `network.` and `model.`."""
    return name.removeprefix("network.").removeprefix("model.")


def _places(ours: dict[str, Tensor]) -> dict[str, str]:
    """Returns the backbone's names by those that a file may have: its own, the network's, and those of timm's model in it."""
    return {short: name for name in ours for short in (bare(name), name.removeprefix("network."), name)}


def _entries(theirs: dict[str, Tensor], places: dict[str, str]) -> Iterator[tuple[str, Layout]]:
    """Yields each prefix under which a network may stand, with the layout of its names."""
    for layout in LAYOUTS:
        anchor = re.compile(rf"^(.*?)(?:(?<=\.)|^){layout.anchor}$")
        for prefix in dict.fromkeys(hit[1] for name in theirs if (hit := anchor.match(name))):
            yield prefix, layout
    counts: Counter = Counter()
    for name in theirs:
        starts = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        counts.update(name[:start] for start in starts if name[start:] in places)
    for prefix, _ in counts.most_common(_TRIED):
        yield prefix, _PLAIN


def _preference(prefix: str) -> int:
    return next((rank for rank, pattern in enumerate(PREFERENCES) if re.search(pattern, prefix)), len(PREFERENCES))


def _translate(
    theirs: dict[str, Tensor], prefix: str, layout: Layout, backbone: Backbone, places: dict[str, str]
) -> Match:
    """Reads what stands under a prefix as a network of a layout."""
    inside = {}
    for name, tensor in theirs.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            for pattern, replacement in layout.renames:
                name = re.sub(pattern, replacement, name)
            inside[name] = _as_ours(name, tensor, layout)
    inside, expected = _with_registers_apart(inside, places), backbone.state_dict()
    placed, rest = _place(inside, places)
    if filtered := _filter(inside, backbone):
        placed_by_timm, rest_by_timm = _place(filtered, places)
        if _fitting(placed_by_timm, expected) > _fitting(placed, expected):
            placed, rest = placed_by_timm, rest_by_timm
    ours = {_numberless(bare(name)).split(".")[0] for name in set(places.values())}
    unexpected = {
        name: tensor
        for name, tensor in rest.items()
        if not NO_BACKBONE.match(name)
        and not COMPUTED.search(name)
        and (BACKBONE.match(name) or _numberless(name).split(".")[0] in ours)
    }
    parts = _parts({n: t for n, t in rest.items() if n not in unexpected}, "")
    parts += _parts({name: tensor for name, tensor in theirs.items() if not name.startswith(prefix)}, prefix)
    return Match(prefix, placed, unexpected, parts, eps=layout.eps)


def _as_ours(name: str, tensor: Tensor, layout: Layout) -> Tensor:
    """Returns a tensor in the shape and the order of values in which the network of this name has it."""
    if name.endswith(".gamma") and tensor.ndim == 3 and tensor.numel() == len(tensor):
        return tensor.flatten()  # torchvision's layer scale (C, 1, 1)
    if name == "conv_head.weight" and tensor.ndim == 2:
        return tensor[:, :, None, None]  # torchvision's linear layer of pooled features is a 1×1 convolution in timm
    if layout.unfolded and ".downsample." in name and tensor.ndim in (1, 2) and tensor.shape[-1] % 4 == 0:
        # (…, 4C): each channel's places, row by row -> place by place, column by column, with all channels.
        return tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
    return tensor


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _parts(names: dict[str, Tensor], prefix: str) -> Counter:
    """Counts tensors by the part that they belong to: the first name after what they share with the network's prefix."""
    inside, parts = prefix.split("."), Counter()
    for name in names:
        if COMPUTED.search(name):
            continue
        levels = name.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(levels, inside, strict=False)) if a != b), len(inside) - 1)
        parts[levels[min(shared, len(levels) - 1)]] += 1
    return parts


def _place(inside: dict[str, Tensor], places: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the tensors that the backbone has, under its names, and the others."""
    placed, rest = {}, {}
    for name, tensor in _with_joint_attention(inside, places).items():
        names = (name, *(re.sub(pattern, other, name) for pattern, other in ALTERNATIVES if re.search(pattern, name)))
        place = next((places[n] for n in names if n in places and places[n] not in placed), None)
        if place is None:
            rest[name] = tensor
        else:
            placed[place] = tensor
    return placed, rest


def _with_joint_attention(inside: dict[str, Tensor], places: dict[str, str]) -> dict[str, Tensor]:
    """Joins queries, keys and values, or takes them apart, as the network has them. A bias that a layer lacks is zero."""
    tensors = dict(inside)
    for name in inside:
        attention, _, kind = name.rpartition(".")
        # Three layers become one.
        if (
            attention.endswith((".attn.q", ".attn.q_proj"))
            and f"{(root := attention[: attention.rindex('.')])}.qkv.weight" in places
        ):
            three = [f"{root}.{part}{attention[len(root) + 2 :]}.{kind}" for part in "qkv"]
            apart = kind == "bias" and f"{root}.qkv.bias" not in places  # biases stay apart: BEiT, EVA
            like = tensors[name]
            alike = like.ndim and all(tensors.get(n, like).shape == like.shape for n in three)
            if not apart and three[2] in tensors and alike:
                tensors[f"{root}.qkv.{kind}"] = torch.cat([tensors.pop(n, torch.zeros_like(like)) for n in three])
        # One layer becomes three.
        elif name.endswith(("attn.qkv.weight", "attn.qkv.bias")) and name not in places and inside[name].ndim:
            joint, root = tensors.pop(name), attention.removesuffix(".qkv")
            queries, keys, values = joint.tensor_split(3)
            zero_keys = f"{root}.qkv.bias_mask" in inside or not keys.any()  # DINOv3 masks them
            if kind == "bias" and f"{root}.q_bias" in places and zero_keys:
                tensors |= {f"{root}.q_bias": queries, f"{root}.v_bias": values}
            elif f"{root}.q_proj.weight" in places:
                tensors |= {f"{root}.q_proj.{kind}": queries, f"{root}.v_proj.{kind}": values}
                if kind == "weight" or not zero_keys:
                    tensors[f"{root}.k_proj.{kind}"] = keys
            elif kind == "weight" or joint.any():  # biases of zero change nothing
                tensors[name] = joint
    return tensors


def _with_registers_apart(inside: dict[str, Tensor], places: dict[str, str]) -> dict[str, Tensor]:
    """Adds the class token's position to it where the network has positions of patches alone (DINOv2 with registers in timm)."""
    names = ("register_tokens", "cls_token", "pos_embed")
    if "reg_token" not in places or any(name not in inside or inside[name].ndim != 3 for name in names):
        return inside
    tensors = dict(inside)
    tensors["reg_token"] = tensors.pop("register_tokens")
    position = tensors["pos_embed"]
    return tensors | {"cls_token": tensors["cls_token"] + position[:, :1], "pos_embed": position[:, 1:]}


def _filter(inside: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor] | None:
    """Returns the tensors as the filter of the timm model's module renames them, None where there is none or it cannot.

    The patches' weights and positions stay as they are: a filter would resample them without a word.
    """
    model = getattr(backbone.network, "model", None)
    module = sys.modules.get(type(model).__module__) if isinstance(model, nn.Module) else None
    rename = next((getattr(module, name) for name in _FILTERS if hasattr(module, name)), None)
    if rename is None or not type(model).__module__.startswith("timm."):
        return None
    held = {
        name: inside[name] for name, dimensions in _HELD.items() if name in inside and inside[name].ndim == dimensions
    }
    rest = {name: tensor for name, tensor in inside.items() if name not in held}
    try:
        # Those of RegNet, VGG and DenseNet take no model.
        with contextlib.redirect_stdout(io.StringIO()):  # one prints what it tries
            filtered = rename(rest, model) if rename.__name__ == _FILTERS[0] else rename(rest)
    except (LookupError, AttributeError, RuntimeError, ValueError, TypeError, AssertionError):
        return None  # written for the official files of one model, which this is not
    return {name: tensor for name, tensor in (filtered | held).items() if isinstance(tensor, Tensor)}
