"""Tiny real runs for tests: `sslctl pretrain` on 8×8 digits in this process, and what they leave behind."""

import contextlib
import dataclasses
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sslctl.training.train
from sslctl.cli import main
from sslctl.runs import checkpoint
from sslctl.runs.checksums import check_json, check_yaml
from sslctl.runs.manifest import write_manifest
from sslctl.runs.metrics import read_metrics
from sslctl.runs.reading import read_lines
from sslctl.runs.results import Result

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


# What describes the smallest run there can be, for directories that nobody trains in.
CONFIG = {
    "seed": 0,
    "names": {"dataset": "d", "method": "m", "backbone": "b"},
    "method": {"size": 3},
    "backbone": {},
    "dataset": {"root": "/a", "image_size": 8},
    "scheduler": {},
    "trainer": {"epochs": 2},
}
FACTS = {"channels": 1, "image_size": 8, "num_images": 4, "num_classes": 0, "batch_size": 2, "steps_per_epoch": 2}
FACTS |= {"total_steps": 4}
PREPROCESS = {"channels": 1, "image_size": 8, "resize": 8, "mean": [0.5], "std": [0.5]}


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
    actual = sorted(left.keys() ^ right.keys())
    return actual + [name for name in sorted(left.keys() & right.keys()) if not _same(left[name], right[name])]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right


def metrics(run_dir: Path) -> list[dict]:
    """What the run logged, without times and speed, which are never the same."""
    records = read_metrics(run_dir)
    return [{k: v for k, v in r.items() if k != "images_per_second" and not k.startswith("time_")} for r in records]


def results(path: Path) -> list[dict]:
    """The lines of a results.jsonl, without their checksums."""
    return read_lines(path)


def unsigned(path: Path) -> dict:
    """What a JSON file of a run holds, without its checksum: written again, it is as its user edited it."""
    return json.loads(check_json(path.read_text()))


def without_checksum(path: Path) -> str:
    """The text of a run's config.yaml without its checksum: written again, it is as its user edited it."""
    text = path.read_text()
    check_yaml(text)
    return text.partition("\n")[2]


def unsigned_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself, without its checksum: with it, other tensors are as their user made them."""
    return {name: text for name, text in checkpoint.metadata(path).items() if name != "crc32"}


def forget_run(run_dir: Path) -> None:
    """Makes a run's checkpoints say nothing of it, as those of format 1 did."""
    for path in checkpoint.steps_on_disk(run_dir):
        write_manifest(path, checkpoint.step_of(path), None)


def blank_result(**values: Any) -> Result:
    """A result of which nothing is said but these values."""
    blank = {"str": "", "int": 1, "float": 0.0, "bool": True, "dict": {}}
    fields = {f.name: blank.get(getattr(f.type, "__name__", None)) for f in dataclasses.fields(Result)} | {
        "labels": "all"
    }
    return Result(**fields | values)


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
    write_manifest(path, manifest["step"], manifest.get("run"))
    checkpoint.verify(path)


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
