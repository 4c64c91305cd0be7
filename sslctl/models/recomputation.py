"""Activation checkpointing: blocks keep their input alone and are calculated again in the backward pass.

Chen et al. 2016, arXiv:1604.06174. Losses, gradients and statistics are those of the blocks as they are, bit for bit.
"""

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sslctl.errors import InputError
from sslctl.models.batchnorm import without_updates
from sslctl.models.layer_decay import layers_of
from sslctl.models.network import Network

_OFF = "trainer.activation_checkpointing=false"


class _Recomputed:
    """Stands for a block's forward. Dropout draws in the second calculation what it drew in the first."""

    def __init__(self, block: nn.Module):
        self.block, self.forward = block, block.forward

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*inputs, **keywords)
        return checkpoint(self.forward, *inputs, use_reentrant=False, context_fn=self.contexts, **keywords)

    def contexts(self) -> tuple[Any, Any]:
        """Returns what the first and the second calculation run in: BatchNorm counts a batch once."""
        return contextlib.nullcontext(), without_updates(self.block)


def recompute_(network: Network) -> None:
    """Makes a network's blocks keep no activations. Raises InputError for a network that has none, or does not say them."""
    blocks = blocks_of(network)
    if not blocks:
        raise InputError(f"{type(network).__name__} has no blocks to calculate again: {_OFF}", advice=[_OFF])
    for name in blocks:
        block = network.get_submodule(name)
        block.forward = _Recomputed(block)


def blocks_of(network: Network) -> list[str]:
    """Returns the names of the largest modules that lie in one of the network's layers each and hold several of torch's."""
    modules = {name: module for name, module in network.named_modules() if name and not isinstance(module, _LISTS)}
    parameters = {name: {id(p) for p in module.parameters()} for name, module in modules.items()}
    blocks = []
    for names in layers_of(network, _OFF):
        layer = {id(p) for n, p in network.named_parameters() if any(f"{n}.".startswith(f"{name}.") for name in names)}
        for name, own in parameters.items():
            is_inside = any(name.startswith(f"{block}.") for block in blocks)
            if own and own <= layer and not is_inside and _torch_layers(modules[name]) > 1:
                blocks.append(name)
    return blocks


_LISTS = (nn.ModuleList, nn.ModuleDict)  # nobody calls them


def _torch_layers(module: nn.Module) -> int:
    """Counts the modules inside that have parameters of their own."""
    return sum(any(True for _ in part.parameters(recurse=False)) for part in module.modules())
