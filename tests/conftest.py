"""Fixtures shared by all tests: sslctl in this process or another one, small folders of images, one tiny finished run."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_benchmark_data import write_texts, write_videos

from sslctl.cli import main
from sslctl.config import targets as binding
from tests.methods import words_of
from tests.runs import finish
from tests.sequences import KINDS

REPOSITORY = Path(__file__).parents[1]

# A pretraining that takes a second on small images; what a test gives after these wins.
QUICK = (
    *("trainer.epochs=1", "trainer.batch_size=16", "trainer.device=cpu", "trainer.threads=1", "trainer.workers=0"),
    *("trainer.tensorboard=false", "scheduler.warmup_epochs=0", "method=simclr", "backbone=mlp", "backbone.widths=[8]"),
    *("evaluation.closing=false", "evaluation.knn_every_epochs=null", "evaluation.cache_gb=0"),
)


@dataclass(frozen=True)
class Result:
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


def write_images(
    root: Path, *folders: str, count: int = 16, size: tuple[int, int] = (16, 16), suffix: str = ".png", seed: int = 0
) -> Path:
    """Writes `count` random RGB images of (height, width) into each folder below root; returns root."""
    generator = np.random.default_rng(seed)
    for folder in folders or (".",):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number:03d}{suffix}")
    return root


@pytest.fixture(autouse=True)
def _clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread; what a command changes in the process (allowed packages, import paths, environment) is undone."""
    torch.set_num_threads(1)
    before = set(sys.modules)
    monkeypatch.setattr(binding, "_allowed", list(binding._allowed))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("HYDRA_FULL_ERROR", "COMP_LINE"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    yield
    own = (str(REPOSITORY), sys.prefix, sys.base_prefix)
    for name in set(sys.modules) - before:  # a test's own modules, so that the next test may use the same names
        file = getattr(sys.modules[name], "__file__", None)
        if file and not file.startswith(own):
            del sys.modules[name]


@pytest.fixture
def workdir(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tmp_path as the current directory; caches and downloads go elsewhere in the temporary folder."""
    monkeypatch.chdir(tmp_path)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("SSLCTL_DATA", str(home / "data"))
    return tmp_path


@pytest.fixture
def cli(workdir: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """cli(*words): runs sslctl in this process, in tmp_path."""

    def run(*words: str) -> Result:
        capfd.readouterr()  # what came before is not this command's
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # --help
            status = stop.code or 0
        finally:
            torch.set_num_threads(1)
        printed = capfd.readouterr()
        return Result(status, printed.out, printed.err)

    return run


@pytest.fixture
def spawn(workdir: Path) -> Callable[..., Result]:
    """spawn(*words): runs sslctl in a process of its own, in tmp_path. program: what Python runs instead."""

    def run(
        *words: str, program: tuple[str, ...] = ("-m", "sslctl"), timeout: float = 120, **environment: str
    ) -> Result:
        done = subprocess.run(
            [sys.executable, *program, *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def labelled_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ with two classes of 16 images of 16×16 each. To be read only."""
    return write_images(tmp_path_factory.mktemp("labelled"), "train/a", "train/b", "test/a", "test/b")


@pytest.fixture(scope="session")
def finished_run(labelled_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps on labelled_images. To be read only: copy it before changing it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    words = ["pretrain", *QUICK, "dataset=imagefolder", f"dataset.root={labelled_images}", f"run_dir={run}"]
    assert main(words) == 0
    return run


@pytest.fixture(scope="session")
def run_of_method(tmp_path_factory):
    """run_of_method(name): the finished tiny run of a method, trained once. To be read only."""
    return functools.cache(lambda name: finish(tmp_path_factory.mktemp(name) / "run", *words_of(name)))


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """96 folders of frames, of two classes, a fifth of them for the test split."""
    return write_videos(tmp_path_factory.mktemp("videos"), 96)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """The licences of two packages, a class each."""
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def sequences(videos, texts):
    """A kind of KINDS -> (method, root, overrides)."""

    def of(kind):
        method, more = KINDS[kind]
        return method, texts if kind == "language" else videos, more

    return of
