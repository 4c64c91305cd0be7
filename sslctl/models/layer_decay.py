"""How deep in a network each parameter lies, and the learning rate that follows from it."""

from sslctl.errors import InputError
from sslctl.models.network import Network


def layer_depths(network: Network) -> tuple[dict[str, int], int]:
    """Returns {parameter: depth} and the depth of a classifier behind the network: 0 for the first layer, then one more each.

    A network says with `layer_names() -> [(name, …), …]` which of its modules and parameters make each layer, from its
    input on. What is in none of them (a final norm) is as deep as the classifier. Raises InputError for a network that
    does not say.
    """
    if not hasattr(network, "layer_names"):
        raise InputError(
            f"{type(network).__name__} does not say what its layers are (layer_names): layer_decay=1",
            advice=["layer_decay=1"],
        )
    layers = network.layer_names()

    def depth(parameter: str) -> int:
        within = (i for i, names in enumerate(layers) if any(f"{parameter}.".startswith(f"{name}.") for name in names))
        return next(within, len(layers))

    return {name: depth(name) for name, _ in network.named_parameters()}, len(layers)


def decayed_groups(network: Network, layer_decay: float) -> list[dict]:
    """Returns groups with lr_scale = layer_decay^(L + 1 - depth), where L + 1 is the classifier's depth, whose scale is 1.

    Clark et al. 2020 (ELECTRA, arXiv:2003.10555); BEiT (arXiv:2106.08254); MAE's official code, util/lr_decay.py.
    """
    if layer_decay == 1:
        return [{"params": list(network.parameters())}]
    depths, classifier = layer_depths(network)
    groups = {depth: [] for depth in sorted(set(depths.values()))}
    for name, parameter in network.named_parameters():
        groups[depths[name]].append(parameter)
    return [{"params": params, "lr_scale": layer_decay ** (classifier - depth)} for depth, params in groups.items()]
