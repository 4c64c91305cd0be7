"""Methods of a user's own, some of which fail, reached by method._target_=tests.own_methods.<name> allow=[tests]."""

import collections
import dataclasses
import errno
import os
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sslctl import distributed
from sslctl.methods.base import Method
from sslctl.methods.moco import MoCo
from sslctl.methods.simclr import SimCLR
from sslctl.runs import checkpoint


def own(name: str) -> tuple[str, ...]:
    """The overrides that choose one of the methods below."""
    return "allow=[tests]", f"method._target_=tests.own_methods.{name}"


def own_optimizer(name: str) -> tuple[str, ...]:
    """The overrides that choose one of the optimizers below."""
    return "allow=[tests]", "optimizer=sgd", f"optimizer._target_=tests.own_methods.{name}"


class DropoutSimCLR(SimCLR):
    """SimCLR with dropout before its projector."""

    def __init__(self, backbone, facts, **arguments):
        super().__init__(backbone, facts, **arguments)
        self.projector = nn.Sequential(nn.Dropout(0.2), self.projector)


class BeginningSimCLR(SimCLR):
    """SimCLR that adds to its loss what it draws, embeds and writes before an epoch."""

    def __init__(self, backbone, facts, **arguments):
        super().__init__(backbone, facts, **arguments)
        self.register_buffer("drawn", torch.full((3,), torch.nan))

    def start_epoch(self, epoch: int, features) -> None:
        for place in range(3):
            self.drawn[place] = torch.randn(()) + features(self.backbone).mean()

    def training_step(self, batch, schedules: dict) -> dict:
        out = super().training_step(batch, schedules)
        out["loss"] = out["loss"] * (2 + self.drawn.sum().tanh())
        return out


class NoisySimCLR(SimCLR):
    """SimCLR whose loss is scaled by NumPy's and Python's global generators."""

    def training_step(self, batch, schedules: dict) -> dict:
        out = super().training_step(batch, schedules)
        out["loss"] = out["loss"] * (1 + random.random() + np.random.standard_normal())
        return out


class FailingMoCo(MoCo):
    """MoCo in which something goes wrong at one step (from 0), as the environment says: TEST_FAULT=nan loss@3.

    TEST_RANK: in this process only. After torchrun has started everything anew, nothing goes wrong.
    """

    alive: "FailingMoCo"

    def __init__(self, backbone, facts, **arguments):
        super().__init__(backbone, facts, **arguments)
        FailingMoCo.alive = self

    def schedules(self, step: int) -> dict[str, float]:
        return super().schedules(step) | {"at": step}

    def training_step(self, batch, schedules: dict) -> dict:
        out = super().training_step(batch, schedules)
        fault, _, step = os.environ.get("TEST_FAULT", "none@-1").partition("@")
        here = os.environ.get("TEST_RANK") in (None, str(distributed.rank()))
        if schedules["at"] == int(step) and here and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            out["loss"] = out["loss"] + self.wrong(fault)
        return out

    def wrong(self, fault: str) -> Tensor | float:
        """Does the wrong thing, or returns what spoils the loss."""
        if fault == "exception":
            raise LookupError("a mistake of the user's own")
        if fault in ("SIGKILL", "SIGTERM", "SIGINT"):
            os.kill(os.getpid(), signal.Signals[fault])
            return 0
        if fault == "full disk":
            checkpoint.save_tensors = _no_space
            return 0
        weight = next(self.backbone.parameters())
        bad = {
            "nan loss": weight.sum() * float("nan"),
            "inf loss": weight.sum() * 0 + float("inf"),
            "nan gradient": (weight * 0).sqrt().sum(),  # 0, with the derivative 0 · ∞
        }
        return bad[fault]


def _no_space(path: Path, *_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


class GrowingSimCLR(SimCLR):
    """SimCLR with a buffer that has one more value after each step."""

    def __init__(self, backbone, facts, **arguments):
        super().__init__(backbone, facts, **arguments)
        self.register_buffer("losses", torch.empty(0))

    def after_step(self, schedules: dict, carry: dict) -> None:
        super().after_step(schedules, carry)
        self.losses = torch.cat([self.losses, torch.ones(1)])


class NumpySGD(torch.optim.SGD):
    """SGD whose steps depend on NumPy's values in its state: a float32 that shrinks, and an array of its powers."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.0, nesterov: bool = False):
        super().__init__(params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                scale = state.setdefault("scale", np.float32(1))
                state["scale"] = scale * np.float32(0.9)
                state["powers"] = state.get("powers", np.ones((2, 2), np.float32)) * scale
                weight.grad *= float(state["powers"].sum())
        super().step(closure)


class HistorySGD(NumpySGD):
    """An optimizer that keeps the last gradients' norms in a deque."""

    def step(self, closure=None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight].setdefault("norms", collections.deque(maxlen=3)).append(weight.grad.norm())


class Silent(SimCLR):
    """SimCLR by someone who does not say whether the images of a batch meet."""

    batch_coupling = Method.batch_coupling


class NappingMoCo(MoCo):
    """MoCo that sleeps 50 ms in each step, a quarter of a second in the first ones."""

    def schedules(self, step: int) -> dict[str, float]:
        return super().schedules(step) | {"at": step}

    def training_step(self, batch, schedules: dict) -> dict:
        time.sleep(0.25 if schedules["at"] < 3 else 0.05)
        return super().training_step(batch, schedules)


class SlowSimCLR(SimCLR):
    """SimCLR whose steps take a minute, looking at nothing."""

    def training_step(self, batch, schedules: dict) -> dict:
        print("in the step", flush=True)
        time.sleep(60)
        return super().training_step(batch, schedules)


class OverflowingMoCo(MoCo):
    """MoCo that leaves fp16's range at some steps (from 0): TEST_FAULT=loss@3-5 or images@3-3."""

    def schedules(self, step: int) -> dict[str, float]:
        return super().schedules(step) | {"at": step}

    def training_step(self, batch, schedules: dict) -> dict:
        fault, _, steps = os.environ["TEST_FAULT"].partition("@")
        first, last = map(int, steps.split("-"))
        bad = first <= schedules["at"] <= last
        if bad and fault == "images":  # activations, and with them BatchNorm's statistics
            batch = dataclasses.replace(batch, views={name: views * 1e9 for name, views in batch.views.items()})
        out = super().training_step(batch, schedules)
        if bad and fault == "loss":  # finite itself; its gradient is not
            out["loss"] = out["loss"] * 1e36
        return out


class HungryMoCo(MoCo):
    """MoCo that finds no memory at step 3, as the environment says: TEST_MEMORY=cuda, cpu, torch, python or limit."""

    def schedules(self, step: int) -> dict[str, float]:
        return super().schedules(step) | {"at": step}

    def training_step(self, batch, schedules: dict) -> dict:
        if schedules["at"] == 3:
            self.starve(os.environ["TEST_MEMORY"], batch)
        return super().training_step(batch, schedules)

    @staticmethod
    def starve(kind: str, batch) -> None:
        if kind == "limit":  # the system's own refusal
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))
            batch.views["global"].repeat(1, 1 + (4 << 30) // batch.views["global"].nbytes, 1, 1, 1)
        raise {
            "cuda": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free"),
            "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "cpu": RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 4 bytes"
            ),
            "python": MemoryError(),
            "none": RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        }[kind]


class HoardingMoCo(MoCo):
    """MoCo that keeps what it logs."""

    def training_step(self, batch, schedules: dict) -> dict:
        out = super().training_step(batch, schedules)
        self.__dict__.setdefault("hoard", []).append(out["loss"].detach())
        return out
