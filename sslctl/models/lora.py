"""LoRA: linear layers learn by the product of two thin matrices beside weights that stay (Hu et al. 2021, arXiv:2106.09685)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.errors import InputError, nearest
from sslctl.models.backbones import Backbone


class Adapted(nn.Linear):
    """h = W x + α/r · B A x (section 4.1): A (r, in) begins as a linear layer's weights do (official code), B (out, r) as 0.

    An nn.Linear becomes one in place and keeps the names of its tensors. Code that reads its `weight`, as some attention does,
    gets W + α/r · B A.
    """

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, nn.Module.__getattr__(self, "weight"), self.bias) + self.scale * change

    @property
    def weight(self) -> Tensor:
        return nn.Module.__getattr__(self, "weight") + self.scale * (self.lora_b @ self.lora_a)


def adapt_(network: nn.Module, rank: int, alpha: float, targets: list[str]) -> None:
    """Makes a network's linear layers whose names end in a target learn by LoRA, and nothing else of it learn.

    Raises InputError where a target is no linear layer's name.
    """
    linear = {name: part for name, part in network.named_modules() if type(part) is nn.Linear}
    chosen = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in targets}
    ends = sorted({name.rpartition(".")[2] for name in linear if not name.rpartition(".")[2].isdigit()})
    for target, names in chosen.items():
        if not names:
            raise InputError(
                f"backbone.lora.targets: this network has no linear layer {target}{nearest(target, ends)}; it has"
                f" {', '.join(ends) or 'none'}"
            )
    if not chosen:
        raise InputError("backbone.lora.targets=[]: expected names of linear layers, [qkv,proj]")
    network.requires_grad_(False)
    for layer in {name: linear[name] for names in chosen.values() for name in names}.values():
        layer.__class__, layer.scale = Adapted, alpha / rank
        layer.lora_a = nn.Parameter(torch.empty(rank, layer.in_features))
        layer.lora_b = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))


def merge_(module: nn.Module) -> None:
    """Turns adapted layers inside a module into plain ones of the same function, to rounding; all of it may learn again."""
    layers = [part for part in module.modules() if isinstance(part, Adapted)]
    for backbone in [part for part in module.modules() if layers and isinstance(part, Backbone)]:
        backbone.frozen_modules = ()
    for layer in layers:
        weight, a, b = nn.Module.__getattr__(layer, "weight"), layer.lora_a, layer.lora_b
        weight.data = merged(weight.data, a.data, b.data, layer.scale)
        del layer.lora_a, layer.lora_b, layer.scale
        layer.__class__ = nn.Linear


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale · B A (out, in), in double precision: the same on every device."""
    return (weight.double() + scale * (b.double() @ a.double())).to(weight.dtype)


def merge_tensors(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Returns named tensors of an adapted network as those of the plain one."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith((".lora_a", ".lora_b"))}
    for name in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        plain[f"{name}.weight"] = merged(plain[f"{name}.weight"], a, b, alpha / len(a))
    return plain


def merged_parameters(module: nn.Module) -> list[Tensor]:
    """Returns a module's parameters, those of adapted layers merged: what a teacher, which is not adapted, is a mean of."""
    adapted = {name: part for name, part in module.named_modules() if isinstance(part, Adapted)}
    if not adapted:
        return list(module.parameters())
    parameters = []
    for name, parameter in module.named_parameters():
        owner, _, own = name.rpartition(".")
        if owner not in adapted or own == "bias":
            parameters.append(parameter)
        elif own == "weight":
            parameters.append(adapted[owner].weight)
    return parameters


def describe_lora(network: nn.Module) -> str:
    """Returns what of a network is adapted, in words."""
    layers = {name: part for name, part in network.named_modules() if isinstance(part, Adapted)}
    ends = sorted({name.rpartition(".")[2] for name in layers})
    count = sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in layers.values())
    return f"{len(layers)} layers ({', '.join(ends)}): {count:,} of {sum(p.numel() for p in network.parameters()):,} parameters"
