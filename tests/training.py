"""Tiny real runs for the tests of exact resume and of faults: `sslctl pretrain` on 8×8 digits, in process or not."""

import contextlib
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import sslctl.training.train
from sslctl import distributed
from sslctl.cli import main
from sslctl.methods.base import Method
from sslctl.methods.moco import MoCo
from sslctl.methods.simclr import SimCLR
from sslctl.runs import checkpoint

REPOSITORY = Path(__file__).parents[1]
STEPS_PER_EPOCH, STEPS = 5, 10
TINY = (
    *("dataset.image_size=8", "method.out_dim=16"),
    *("trainer.batch_size=256", "trainer.epochs=2", "trainer.device=cpu", "trainer.threads=1"),
    *("trainer.log_every_steps=1", "trainer.tensorboard=false"),
    *("evaluation.closing=false", "evaluation.knn_every_epochs=null", "evaluation.cache_gb=0"),
)
SIMCLR = ("method=simclr", "scheduler.warmup_epochs=1")
MOCO = ("method=moco", "method.queue_size=600", "method.batchnorm_groups=4")  # 256 keys a step: the queue wraps
SUPERVISED = ("method=supervised",)
# A linear probe of 300 steps, the least there are, in batches that make epochs few: each draws an order of its own.
PROBE = ("probe.epochs=1", "probe.batch_size=128", "probe.lr=[0.1]", "probe.weight_decay=[0.0]")


def slow(*values: Any):
    """A parameter set of a test that is left out of the fast suite."""
    return pytest.param(*values, marks=pytest.mark.slow)


# --- Running ---


def command(run_dir: Path, *overrides: str) -> list[str]:
    """The words of a tiny pretraining; what is given last wins."""
    backbone = () if any(o.startswith("backbone=") for o in overrides) else ("backbone.widths=[4,8]",)
    method = next((word[7:] for word in overrides if word.startswith("method=")), "moco")
    projects = "out_dim:" in (REPOSITORY / "configs" / "method" / f"{method}.yaml").read_text()
    tiny = [word for word in TINY if projects or not word.startswith("method.")]
    return ["pretrain", *tiny, *backbone, f"run_dir={run_dir}", *overrides]


def pretrain(run_dir: Path, *overrides: str, stop_after: int | None = None) -> int:
    """Runs or continues a tiny run in this process and returns its exit status.

    stop_after: a SIGTERM arrives while this step (counted from 1) is being calculated.
    """
    with signal_at(stop_after):
        return main(command(run_dir, *overrides))


def finish(run_dir: Path, *overrides: str, stops: tuple[int, ...] = ()) -> Path:
    """A run that is stopped after each of these steps and continued by the same command, to its end."""
    for stop in stops:
        status = pretrain(run_dir, *overrides, stop_after=stop)
        assert status == 143, f"expected to be stopped after step {stop}, found status {status}"
        assert newest(run_dir).name == f"step-{stop}"
    status = pretrain(run_dir, *overrides)
    assert status == 0, f"expected a finished run, found status {status}"
    return run_dir


@contextlib.contextmanager
def signal_at(step: int | None, number: int = signal.SIGTERM) -> Iterator[None]:
    """Sends this process a signal when a step (counted from 1) begins."""
    real = sslctl.training.train.train_step

    def train_step(setup, at, batch):
        if at + 1 == step:
            os.kill(os.getpid(), number)
        return real(setup, at, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sslctl.training.train, "train_step", train_step)
        yield


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: writes fail with EFBIG as they do with ENOSPC on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- What a run left ---


def newest(run_dir: Path) -> Path:
    """The newest checkpoint, valid or not."""
    return checkpoint.steps_on_disk(run_dir)[0]


def state_of(path: Path) -> dict[str, Any]:
    """state.pt of a checkpoint."""
    return torch.load(path / "state.pt", weights_only=True)


def tensors(run_dir: Path) -> dict[str, Any]:
    """Every tensor and number of the newest checkpoint: the method's, the optimizer's, the generator that dropout uses."""
    path = newest(run_dir)
    checkpoint.verify(path)
    state = state_of(path)
    for generators in state["generators"]:
        for unused in ("numpy", "python"):  # two processes begin with other ones
            del generators[unused]
    return dict(_leaves("method", checkpoint.load_tensors(path / "weights.safetensors"))) | dict(
        _leaves("state", state)
    )


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        yield prefix, value
        return
    for name, item in items:
        yield from _leaves(f"{prefix}/{name}", item)


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names that only one side has, or that are not the same bit for bit."""
    found = sorted(left.keys() ^ right.keys())
    return found + [name for name in sorted(left.keys() & right.keys()) if not _same(left[name], right[name])]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right


def metrics(run_dir: Path) -> list[dict]:
    """What the run logged, without times and speed, which are never the same."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k != "images_per_second" and not k.startswith("time_")} for r in records]


def results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path, without: tuple[str, ...] = ()) -> dict[str, tuple[int, bytes]]:
    """(modification time, bytes) of every file below a folder."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and not f.is_symlink() and f.name not in without)
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


def edit(
    path: Path,
    weights: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    state: Callable[[dict[str, Any]], Any] = lambda state: None,
) -> None:
    """Changes a checkpoint in place and signs it again, so that it verifies."""
    stored, rest = checkpoint.load_tensors(path / "weights.safetensors"), state_of(path)
    weights(stored)
    state(rest)
    checkpoint.save_tensors(path / "weights.safetensors", stored)
    torch.save(rest, path / "state.pt")
    sign(path)


def sign(path: Path) -> None:
    """Makes a checkpoint's manifest that of the files that are there now."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: checkpoint._digest(path / name) for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.verify(path)


# --- Processes ---


def start(
    words: list[str], folder: Path, environment: dict[str, str] | None = None, module: str = "sslctl"
) -> subprocess.Popen:
    """`python -m sslctl …` in a process group of its own; its output goes to folder/output."""
    with (folder / "output").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
            | (environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def call(words: list[str], folder: Path, **keywords) -> int:
    """`python -m sslctl …` to its end; returns the exit status."""
    return start(words, folder, **keywords).wait(timeout=120)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen | None = None, seconds: float = 60) -> None:
    """Waits for a condition; fails when the process ends before it, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"the process ended with status {process.returncode}"
        assert time.monotonic() < deadline, f"still waiting after {seconds} s"
        time.sleep(0.02)


def logged_steps(run_dir: Path) -> int:
    """The last step that a living run has logged."""
    path = run_dir / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+)', path.read_text()) if path.exists() else []
    return int(steps[-1]) if steps else 0


# --- Several processes, forked from one that has imported everything already: in milliseconds ---


def in_processes(function: Callable, *arguments: Any, count: int = 2, seconds: float = 60) -> list[Any]:
    """What a module's function returns in each of so many gloo processes; fails where one of them raises or hangs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sslctl.commands.pretrain", "timm", "torch._dynamo", "tests.training"])
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(rank) for rank in range(count)]
        workers = [
            context.Process(target=_work, args=(place, rank, count, function, arguments))
            for rank, place in enumerate(places)
        ]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + seconds
        for worker in workers:
            worker.join(max(0, deadline - time.monotonic()))
        hanging = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        for worker in workers:
            worker.kill()
            worker.join()
        assert not hanging, f"processes {hanging} still run after {seconds} s"
        outcomes = [torch.load(place, weights_only=False) for place in places]
    errors = [f"process {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    assert not errors, "\n".join(errors)
    return [value for value, _ in outcomes]


def _work(place: Path, rank: int, count: int, function: Callable, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ["SSLCTL_RENDEZVOUS"] = f"file://{place.parent}/rendezvous"
    os.chdir(place.parent)
    torch.set_num_threads(1)
    value = error = None
    try:
        distributed.join("cpu")
        value = function(*arguments)
    except BaseException:
        error = traceback.format_exc()
    torch.save((value, error), place)


def said_by_pretrain(run_dir: Path, *overrides: str, stop_after: int | None = None) -> tuple[int, str]:
    """A tiny run in one of several processes: its exit status and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        status = pretrain(run_dir, *overrides, stop_after=stop_after)
    return status, said.getvalue()


def pretrain_in(processes: int, run_dir: Path, *overrides: str, stop_after: int | None = None) -> str:
    """Runs or continues a tiny run in so many processes; returns what the first printed.

    stop_after: a SIGTERM arrives in all of them while this step (counted from 1) is being calculated.
    """
    outcomes = in_processes(_pretrain, run_dir, overrides, stop_after, count=processes)
    assert {status for status, _ in outcomes} == {143 if stop_after else 0}, outcomes
    return outcomes[0][1]


def _pretrain(run_dir: Path, overrides: tuple[str, ...], stop_after: int | None) -> tuple[int, str]:
    return said_by_pretrain(run_dir, *overrides, stop_after=stop_after)


def children_of(parent: int) -> dict[int, int]:
    """Process id -> rank of the processes that a process has started for a run."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end at any moment
            ours = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes()) if ours else None
            if rank:
                found[int(folder.name)] = int(rank[1])
    return found


def running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- Data ---


def image_folder(root: Path, images: int, classes: int = 2) -> Path:
    """root/<class>/<number>.png: noise of different sizes, so that it is streamed and never held in memory."""
    generator = np.random.default_rng(0)
    for number in range(images):
        folder = root / f"class{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        height, width = generator.integers(18, 30, 2)
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return root


# --- Methods of a user's own, reached by method._target_=tests.training.<name> allow=[tests] ---


def own(name: str) -> tuple[str, ...]:
    """The overrides that choose one of the methods below."""
    return "allow=[tests]", f"method._target_=tests.training.{name}"


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


class Silent(SimCLR):
    """SimCLR by someone who does not say whether the images of a batch meet."""

    batch_coupling = Method.batch_coupling


class NappingMoCo(MoCo):
    """MoCo whose steps take 50 ms longer than they have to, the first ones a quarter of a second."""

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
