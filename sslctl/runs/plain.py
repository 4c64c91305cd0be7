"""What a checkpoint can hold beside tensors: values that are read without running code. NumPy's come back bit for bit."""

import io
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device)
_NUMPY = "sslctl.numpy"  # the mark of a NumPy value: {_NUMPY: its dtype, "shape": None of a scalar, "bytes": uint8}


class NotPlain(RuntimeError):
    """A value that no checkpoint can hold. Names it, and its type."""


def to_plain(value: Any, name: str) -> Any:
    """Returns a value as a checkpoint holds it, tensors as they are. Raises NotPlain, with the name, where none can."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in (dict, OrderedDict):
        return kind((to_plain(key, f"a key of {name}"), to_plain(v, f"{name}[{key!r}]")) for key, v in value.items())
    if kind in (list, tuple):
        return kind(to_plain(v, f"{name}[{i}]") for i, v in enumerate(value))
    if (kind is np.ndarray or isinstance(value, np.generic)) and value.dtype.kind in "biufc":
        content = torch.from_numpy(np.ascontiguousarray(value).reshape(-1).view(np.uint8).copy())
        return {_NUMPY: value.dtype.str, "shape": list(value.shape) if kind is np.ndarray else None, "bytes": content}
    if not _comes_back(value):
        raise NotPlain(
            f"{name} is a {kind.__name__}, which no checkpoint can hold: keep numbers, tensors, lists or dictionaries"
        )
    return value


def _comes_back(value: Any) -> bool:
    """Tells whether torch reads a value of some other type again: which it does differs between its versions."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        return type(torch.load(buffer, weights_only=True)) is type(value)
    except Exception:  # whatever a type of the user's own raises
        return False


def from_plain(value: Any) -> Any:
    """Undoes `to_plain`. Raises ValueError, TypeError or KeyError for what it has not written."""
    kind = type(value)
    if kind is dict and _NUMPY in value:
        array = value["bytes"].numpy().copy().view(np.dtype(value[_NUMPY]))
        return array[0] if value["shape"] is None else array.reshape(value["shape"])
    if kind in (dict, OrderedDict):
        return kind((key, from_plain(v)) for key, v in value.items())
    if kind in (list, tuple):
        return kind(from_plain(v) for v in value)
    return value
