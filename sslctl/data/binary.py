"""Binary files in which benchmarks are published: idx of MNIST's family, CIFAR-10's rows."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslctl.errors import InputError

_IDX_TYPES = {8: np.dtype(np.uint8), 12: np.dtype(">i4")}


def plain_or_compressed(path: Path) -> Path:
    """Returns a file, or what gzip made of it. Raises InputError where there is neither."""
    compressed = path.with_name(path.name + ".gz")
    if not path.exists() and not compressed.exists():
        raise InputError(f"no {path.name}[.gz] in {path.parent}")
    return path if path.exists() else compressed


def read_idx(path: Path, dimensions: int, kind: int = 8) -> Tensor:
    """Reads an idx file: two zeros, its type, the number of dimensions, big-endian sizes, then the data.

    kind: the type, 8 for bytes, 12 for integers of four.
    """
    file = plain_or_compressed(path)
    try:
        data = file.read_bytes() if file == path else gzip.decompress(file.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file} is not a whole gzip file: {error}") from error
    header = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, kind, dimensions]) or len(data) < header:
        of = "bytes" if kind == 8 else "integers"
        raise InputError(f"{path} is not an idx file of {of} with {dimensions} dimensions")
    sizes = np.frombuffer(data, ">i4", dimensions, offset=4).tolist()
    dtype, count = _IDX_TYPES[kind], len(data) - header
    if count != np.prod(sizes) * dtype.itemsize:
        raise InputError(f"{path} holds {count} bytes of data, its header says {sizes}")
    body = np.frombuffer(data, dtype, offset=header)
    return torch.from_numpy(body.astype(dtype.newbyteorder("="))).view(sizes)


def read_cifar(path: Path, labels: int = 1) -> np.ndarray:
    """Reads rows (N, labels + 3072) of one label or two and 32×32 pixels, red before green before blue."""
    if not path.exists():
        raise InputError(f"no {path}")
    size, row = path.stat().st_size, 3072 + labels
    if size == 0 or size % row:
        raise InputError(f"{path} holds {size} bytes, not a multiple of {row:,}")
    return np.memmap(path, np.uint8, "r").reshape(-1, row)
