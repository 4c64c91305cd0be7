"""Official repositories on this machine: their modules and scripts, executed where they stand, as on a single GPU."""

import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy
import torch
import torch.distributed as dist
from torch import nn

REPOSITORIES = {  # folder -> repository and the commit that the table was made with
    "moco": ("facebookresearch/moco", "132aea9"),  # the next commit removes the files
    "moco-v3": ("facebookresearch/moco-v3", "c349e6e"),
    "simsiam": ("facebookresearch/simsiam", "a7bc177"),
    "dino": ("facebookresearch/dino", "7c446df"),
    "ibot": ("bytedance/ibot", "da316d8"),
    "dinov2": ("facebookresearch/dinov2", "b8931f7"),
    "dinov3": ("facebookresearch/dinov3", "6876159"),
    "mae": ("facebookresearch/mae", "efb2a80"),
    "ijepa": ("facebookresearch/ijepa", "52c1ae9"),
    "msn": ("facebookresearch/msn", "4388dc1"),
    "swav": ("facebookresearch/swav", "06b1b7c"),
    "vicreg": ("facebookresearch/vicreg", "4e12602"),
    "barlowtwins": ("facebookresearch/barlowtwins", "8e8d284"),
    "self-supervised": ("htdt/self-supervised", "d9662c8"),
    "simmim": ("microsoft/SimMIM", "d3e29bc"),
    "supcontrast": ("HobbitLong/SupContrast", "66a8fe5"),
    "seed": ("jacobswan1/SEED", "f236cac"),
    "compress": ("UMBCvision/CompRess", "c5e57ed"),
    "dcl": ("raminnakhli/Decoupled-Contrastive-Learning", "0b9b76d"),
    "lejepa": ("rbalestr-lab/lejepa", "eddffdd"),
    "noise-robust-vit": ("RandallBalestriero/noise-robust-vit", "6840432"),
    "lightly-train": ("lightly-ai/lightly-train", "8f5a75c"),
    "deepmind": ("google-deepmind/deepmind-research", "f5de0ed"),
}


class Missing(Exception):
    """A repository's folder is not there."""


@dataclass(frozen=True)
class Official:
    """The folder that holds the repositories, each under its name in REPOSITORIES."""

    root: Path

    def folder(self, name: str) -> Path:
        """Raises Missing with the command that would bring it."""
        if not (self.root / name).is_dir():
            raise Missing(
                f"{self.root / name} is missing: git clone https://github.com/{REPOSITORIES[name][0]} {self.root / name}"
            )
        return self.root / name

    def commit(self, name: str) -> str:
        """The first seven digits of a clone's commit, or of the file .commit in an exported folder; "unknown" without either."""
        folder = self.folder(name)
        if (folder / ".git").exists():
            command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout[:7]
        return (folder / ".commit").read_text()[:7] if (folder / ".commit").exists() else "unknown"

    def load(self, name: str, module: str, stubs: Mapping[str, Any] | None = None) -> ModuleType:
        """Imports a module of a repository afresh. stubs: what stands for modules that are not there, or are too new for it."""
        folder = self.folder(name)
        own = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
        before = dict(sys.modules)
        for other in [other for other in before if other.partition(".")[0] in own]:
            del sys.modules[other]
        sys.modules.update(stubs or {})
        sys.path.insert(0, str(folder))
        written, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder stays as it was
        importlib.invalidate_caches()
        try:
            return importlib.import_module(module)
        finally:
            sys.dont_write_bytecode = written
            sys.path.remove(str(folder))
            for new in [new for new in sys.modules if new.partition(".")[0] in own or new in (stubs or {})]:
                del sys.modules[new]
            sys.modules.update(before)


def absent(*names: str) -> dict[str, Any]:
    """Stubs for modules whose contents a step does not use."""
    return {name: MagicMock() for name in names}


@contextmanager
def as_on_one_gpu() -> Iterator[None]:
    """A process group of one process, .cuda() without effect, nothing to wait for, and numpy's float as before 1.24."""
    tensor, module, wait = torch.Tensor.cuda, nn.Module.cuda, torch.cuda.synchronize
    torch.Tensor.cuda = nn.Module.cuda = lambda x, *_, **__: x
    torch.cuda.synchronize = lambda *_: None
    numpy.float = float
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if alone:
            dist.destroy_process_group()
        del numpy.float
        torch.Tensor.cuda, nn.Module.cuda, torch.cuda.synchronize = tensor, module, wait


@contextmanager
def drawing(function: str, *values: torch.Tensor) -> Iterator[None]:
    """torch.<function> returns the given tensors, one a call: an official code's random numbers are then ours."""
    original, left = getattr(torch, function), list(values)
    setattr(torch, function, lambda *_, **__: left.pop(0))
    try:
        yield
    finally:
        setattr(torch, function, original)
