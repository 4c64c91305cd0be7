"""What of a run's state a checkpoint can hold: refused by name otherwise, where it would be saved and could not be loaded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslctl.errors import InputError
from sslctl.methods.base import Method
from sslctl.runs.checkpoint import compare
from sslctl.runs.plain import to_plain


class OtherLayout(RuntimeError):
    """A method whose tensors are no longer those that it was built with."""


def layout_of(method: Method) -> dict[str, Tensor]:
    """Returns the method's tensors without their values. Raises InputError for state of a method that is no tensor."""
    state = method.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"method: its state {name} is a {type(value).__name__}, which no checkpoint can hold: keep it in a buffer"
            )
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}


def refuse_other_layout(method: Method, layout: dict[str, Tensor]) -> None:
    """Raises OtherLayout for tensors that have come, gone or changed their shape: a resume builds them as they were."""
    differences = compare(method.state_dict(), layout)
    if differences:
        raise OtherLayout(
            "\n".join(
                [
                    "the method's tensors are not as they were built, so that a checkpoint could not be loaded:",
                    *differences,
                    "a buffer has one shape: register it with its largest, beside a count of what is filled",
                ]
            )
        )


def optimizer_state(optimizer: torch.optim.Optimizer, method: Method) -> dict[str, Any]:
    """Returns an optimizer's state_dict as a checkpoint holds it. Raises NotPlain, which names what none can hold."""
    parameter_names = {id(parameter): name for name, parameter in method.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict()
    plain = {}
    for key, values in state[
        "state"
    ].items():  # by the parameter's number; an optimizer may keep more under keys of its own
        owner = parameter_names.get(id(parameters[key]), key) if key in range(len(parameters)) else None
        of = "" if owner is None else f" of parameter {owner}"
        if isinstance(values, dict):
            plain[key] = {name: to_plain(value, f"optimizer state {name!r}{of}") for name, value in values.items()}
        else:
            plain[key] = to_plain(values, f"optimizer state {key!r}")
    rest = {name: value for name, value in state.items() if name != "state"}
    return {"state": plain} | to_plain(rest, "optimizer")


class _Held:
    """Hides a value from torch, which takes apart what can be iterated over while it loads: arrays and strings too."""

    def __init__(self, value: Any):
        self.value = value


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Gives an optimizer the state that `optimizer_state` returned, NumPy's values and strings as they were.

    What is of a parameter's shape takes its memory layout: the run that saved it may have had another, and torch's fused
    optimizers go through both as they lie in memory.
    """

    def hold(value: Any) -> Any:
        return _Held(value) if isinstance(value, np.ndarray | str) else value

    def release(value: Any) -> Any:
        return value.value if isinstance(value, _Held) else value

    optimizer.load_state_dict(state | {"state": _mapped(state["state"], hold)})
    for key, values in list(optimizer.state.items()):
        optimizer.state[key] = _mapped(values, release)
        if isinstance(key, Tensor) and isinstance(values, dict):
            optimizer.state[key].update(_in_layout_of(key, optimizer.state[key]))


def _in_layout_of(parameter: Tensor, values: dict[str, Any]) -> dict[str, Tensor]:
    """Returns what of a parameter's state has its shape and another layout, in its layout."""
    return {
        name: torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        for name, value in values.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride()
    }


def take_over_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Gives an optimizer what another one remembers of each parameter, its settings as they are. Raises InputError where the
    two are not of one kind, over the same parameters."""
    groups = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in groups] != [group["params"] for group in state["param_groups"]]:
        raise InputError(
            "the other run's optimizer has other groups of parameters: continue_optimizer=false begins with a new one",
            advice=["continue_optimizer=false"],
        )
    load_optimizer_state(optimizer, {"state": state["state"], "param_groups": groups})


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Returns a value with a function applied to what its dictionaries, lists and tuples hold."""
    if isinstance(value, dict):
        return type(value)((key, _mapped(v, function)) for key, v in value.items())
    if type(value) in (list, tuple):
        return type(value)(_mapped(v, function) for v in value)
    return function(value)
