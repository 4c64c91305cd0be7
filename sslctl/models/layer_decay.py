"""How deep in a network each parameter lies, and the learning rate that follows from it."""

from sslctl.errors import InputError
from sslctl.models.network import Network


def layers_of(network: Network, otherwise: str) -> list[tuple[str, ...]]:
    """Returns which modules and parameters make each layer of a network, from its input on: its `layer_names`.

    otherwise: words that need none. Raises InputError, with them, for a network that does not say.
    """
    layers = network.layer_names() if hasattr(network, "layer_names") else []
    if not layers:
        name = getattr(network, "model_name", type(network).__name__)
        raise InputError(f"{name} does not say what its layers are (layer_names): {otherwise}", advice=[otherwise])
    return layers


def layer_depths(network: Network) -> tuple[dict[str, int], int]:
    """Returns {parameter: depth} and the depth of a classifier behind the network: 0 for the first layer, then one more each.

    A network says with `layer_names() -> [(name, …), …]` which of its modules and parameters make each layer, from its
    input on. What is in none of them (a final norm) is as deep as the classifier. Raises InputError for a network that
    does not say.
    """
    layers = layers_of(network, "optimizer.layer_decay=1")

    def depth(parameter: str) -> int:
        within = (i for i, names in enumerate(layers) if any(f"{parameter}.".startswith(f"{name}.") for name in names))
        return next(within, len(layers))

    return {name: depth(name) for name, _ in network.named_parameters()}, len(layers)


def decayed(groups: list[dict], network: Network, layer_decay: float) -> list[dict]:
    """Divides a method's groups by depth: lr_scale = layer_decay^(L + 1 - depth) times that of the group.

    L + 1 is the classifier's depth, whose scale is 1; what lies outside of the network, a method's heads, is as deep.
    Clark et al. 2020 (ELECTRA, arXiv:2003.10555); BEiT (arXiv:2106.08254); MAE's official code, util/lr_decay.py.
    """
    if layer_decay == 1:
        return groups
    depths, classifier = layer_depths(network)
    depth_of = {id(parameter): depths[name] for name, parameter in network.named_parameters()}
    result = []
    for group in groups:
        by_depth = {}
        for parameter in group["params"]:
            by_depth.setdefault(depth_of.get(id(parameter), classifier), []).append(parameter)
        for depth in sorted(by_depth):
            scale = group.get("lr_scale", 1.0) * layer_decay ** (classifier - depth)
            result.append({**group, "params": by_depth[depth], "lr_scale": scale})
    return result


def describe_decay(network: Network, layer_decay: float) -> list[str]:
    """Returns the plan's line about the layers' learning rates, where they differ."""
    if layer_decay == 1:
        return []
    _, classifier = layer_depths(network)
    least = layer_decay**classifier
    return [f"layers     lr × {layer_decay:g} from each to the one before, × {least:.2g} at the first of {classifier}"]
