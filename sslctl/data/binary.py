"""Binary files in which benchmarks are published: idx of MNIST's family, CIFAR-10's rows."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslctl.errors import InputError


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Reads an idx file of bytes: two zeros, type 8, the number of dimensions, big-endian sizes, then the data."""
    compressed = path.with_name(path.name + ".gz")
    if not path.exists() and not compressed.exists():
        raise InputError(f"no {path.name}[.gz] in {path.parent}")
    try:
        data = path.read_bytes() if path.exists() else gzip.decompress(compressed.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{compressed} is not a whole gzip file: {error}") from error
    header = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < header:
        raise InputError(f"{path} is not an idx file of bytes with {dimensions} dimensions")
    sizes = np.frombuffer(data, ">i4", dimensions, offset=4).tolist()
    body = np.frombuffer(data, np.uint8, offset=header)
    if len(body) != np.prod(sizes):
        raise InputError(f"{path} holds {len(body)} bytes of data, its header says {sizes}")
    return torch.from_numpy(body.copy()).view(sizes)


def read_cifar(path: Path) -> np.ndarray:
    """Reads rows (N, 3073) of a label and 32×32 pixels, red before green before blue."""
    if not path.exists():
        raise InputError(f"no {path}")
    data = np.fromfile(path, np.uint8)
    if len(data) == 0 or len(data) % 3073:
        raise InputError(f"{path} holds {len(data)} bytes, not a multiple of 3,073")
    return data.reshape(-1, 3073)
