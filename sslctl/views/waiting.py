"""What a GPU would have to be waited for."""

from torch import Tensor


def may_look(values: Tensor) -> bool:
    """Returns whether what is done next may depend on values: on a CPU. Elsewhere everything is calculated, wanted or not,
    as a look would stop the device, and few operations on large tensors are better than small ones."""
    return values.device.type == "cpu"
