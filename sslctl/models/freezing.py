"""Parts of a network that do not learn, for ever or until a step: no gradient, and BatchNorm's statistics stay."""

from dataclasses import dataclass

from torch import nn

from sslctl.errors import InputError, nearest
from sslctl.models.backbones import Backbone
from sslctl.models.layer_decay import layers_of
from sslctl.models.network import Network


@dataclass(frozen=True)
class FrozenParts:
    """What of a network is frozen. words: which, for the plan; modules: those with no other parameters."""

    words: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...]


def frozen_parts(network: Network, freeze: int | str | list[str]) -> FrozenParts:
    """Finds what backbone.freeze= names: the first so many layers of a network, or modules and parameters by their names.

    Names may leave out the `model.` of timm's models. Raises InputError for what the network has not.
    """
    if isinstance(freeze, int):
        layers = layers_of(network, "backbone.freeze=[NAME,…] names its modules")
        if not 1 <= freeze <= len(layers):
            raise InputError(
                f"backbone.freeze={freeze}: this network has 1 to {len(layers)} layers: backbone.freeze={len(layers)}",
                advice=[f"backbone.freeze={len(layers)}"],
            )
        names = [name for layer in layers[:freeze] for name in layer]
        words = f"the first {freeze} of {len(layers)} layers"
    else:
        names = [_full_name(network, name) for name in ([freeze] if isinstance(freeze, str) else freeze)]
        words = ", ".join([freeze] if isinstance(freeze, str) else freeze)
    if not names:
        raise InputError("backbone.freeze=[]: expected a name; null freezes nothing", advice=["backbone.freeze=null"])

    def is_inside(name: str) -> bool:
        return any(f"{name}.".startswith(f"{part}.") for part in names)

    parameters = [name for name, _ in network.named_parameters() if is_inside(name)]
    ids = {id(parameter) for name, parameter in network.named_parameters() if is_inside(name)}
    modules = [
        name
        for name, module in network.named_modules()
        if (own := list(module.parameters())) and all(id(parameter) in ids for parameter in own)
    ]
    return FrozenParts(words, tuple(parameters), tuple(modules))


def _full_name(network: Network, name: str) -> str:
    names = {n for n, module in network.named_modules() if n and any(True for _ in module.parameters())}
    names |= {n for n, _ in network.named_parameters()}
    full = next((n for n in (name, f"model.{name}") if n in names), None)
    if full is None:
        choices = {n.removeprefix("model.") for n in names}
        raise InputError(f"backbone.freeze={name}: this network has no part of that name{nearest(name, choices)}")
    return full


def describe_frozen(network: Network, freeze: int | str | list[str]) -> str:
    """Returns what is frozen, and how much of a network that is, in words."""
    parts = frozen_parts(network, freeze)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    names = [name.removeprefix("model.") for name in _outermost(parts)]
    examples = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
    which = parts.words if examples == parts.words else f"{parts.words} ({examples})"
    count, total = sum(sizes[name] for name in parts.parameters), sum(sizes.values())
    return f"{which}: {count:,} of {total:,} parameters"


def _outermost(parts: FrozenParts) -> list[str]:
    """Returns the names of the frozen parts, without those of what lies inside another one."""
    names = [*parts.modules, *parts.parameters]
    inside = [name for name in names if any(name.startswith(f"{outer}.") or not outer for outer in parts.modules)]
    return [name or "all of it" for name in names if name not in inside or not name]


def copies_of(method: nn.Module) -> list[Backbone]:
    """Returns a method's backbone and its copies, teachers: all backbones inside of the same parts."""
    parts = {name for name, _ in method.backbone.network.named_modules()}
    backbones = [part for part in method.modules() if isinstance(part, Backbone)]
    return [part for part in backbones if {name for name, _ in part.network.named_modules()} == parts]


class Freezing:
    """Freezes parts of a method's backbone until a step, and lets them learn from there on: a function of the step alone.

    A teacher's copy of these parts is the same function meanwhile: it has their weights, and keeps their statistics as well.
    until: the first step at which they learn; None: never.
    """

    def __init__(self, method: nn.Module, freeze: int | str | list[str], until: int | None):
        network = method.backbone.network
        self.method, self.until = method, until
        self.parts = frozen_parts(network, freeze)
        by_name = dict(network.named_parameters())
        # What a method keeps fixed itself, as a vision transformer's sine positions, does not learn later either.
        self.parameters = [by_name[name] for name in self.parts.parameters if by_name[name].requires_grad]
        self.backbones, self.others = copies_of(method), method.backbone.frozen_modules
        self.is_frozen = False

    def at(self, step: int) -> None:
        """Freezes the parts, or lets them learn, as a step asks for."""
        frozen = self.until is None or step < self.until
        if frozen == self.is_frozen:
            return
        self.is_frozen = frozen
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)
        for backbone in self.backbones:
            backbone.frozen_modules = (*self.others, *(self.parts.modules if frozen else ()))
        self.method.train(self.method.training)
