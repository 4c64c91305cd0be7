"""Do memory, open files and the run directory stay as they are, however long a run is? python scripts/long_run.py

    python scripts/long_run.py                     # 10,000 steps in memory; 50 epochs of files, decoded by two workers
    python scripts/long_run.py --steps 100000

Both runs save and are evaluated after every epoch, with TensorBoard. In their second half memory may grow by BOUND
bytes a step, open files and living tensors not at all, and the directory holds no more than its checkpoints, its lines and
a fixed number of pictures.
Status 1: something grows.
"""

import argparse
import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

import sslctl.training.train  # noqa: E402
from sslctl.cli import main as sslctl_main  # noqa: E402
from sslctl.runs import checkpoint  # noqa: E402
from sslctl.runs.directory import total_size  # noqa: E402
from tests.runs import command, image_folder  # noqa: E402

BOUND = 500  # bytes a step
WORDS = (
    "trainer.tensorboard=true",
    "trainer.save_every_epochs=1",
    "evaluation.knn_every_epochs=1",
    "trainer.log_every_steps=10",
)
MEMORY = ("method=moco", "method.queue_size=600", "method.batchnorm_groups=1")


@dataclass(frozen=True)
class Sample:
    """What a process holds after a step: bytes of its own memory, also swapped out; open files; tensors that Python knows of."""

    step: int
    memory: int
    files: int
    tensors: int


@contextlib.contextmanager
def sampled(every: int) -> Iterator[list[Sample]]:
    """The samples of a run in this process, one every so many steps."""
    samples, real = [], sslctl.training.train.train_step

    def train_step(setup, step, batch):
        if step % every == 0:
            gc.collect()
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            memory = sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            samples.append(Sample(step, memory, len(os.listdir("/proc/self/fd")), tensors))
        return real(setup, step, batch)

    sslctl.training.train.train_step = train_step
    gc.freeze()  # only what comes from here on is counted
    try:
        yield samples
    finally:
        gc.unfreeze()
        sslctl.training.train.train_step = real


def growth(samples: list[Sample]) -> dict[str, float]:
    """How much each grew, a step, between the third and the last quarter of the samples: what starts up is over by then."""
    half = samples[len(samples) // 2 :]
    early, late = half[: len(half) // 2], half[len(half) // 2 :]
    steps = median(s.step for s in late) - median(s.step for s in early)
    names = ("memory", "files", "tensors")
    return {n: (median(getattr(s, n) for s in late) - median(getattr(s, n) for s in early)) / steps for n in names}


def leaks(samples: list[Sample], bound: float = BOUND) -> list[str]:
    """What grows, in words."""
    allowed = {"memory": bound, "files": 0, "tensors": 0}
    return [f"{name} grow by {value:.3g} a step" for name, value in growth(samples).items() if value > allowed[name]]


def disk_excess(run: Path, keep_last: int = 2) -> str | None:
    """In words, where a run directory holds more than its checkpoints, a backbone, some bytes for each line it logged, and
    the pictures of small images, in a MiB."""
    size, kept = total_size(run), [total_size(path) for path in checkpoint.steps_on_disk(run)]
    lines = (run / "metrics.jsonl").read_text().count("\n")
    allowed = max(kept) * (keep_last + 1) + 2000 * lines + 2**20
    return f"{size:,} bytes on disk, {allowed:,} expected" if size > allowed or len(kept) > keep_last else None


def main(words: list[str]) -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("long_run.py", description=__doc__, formatter_class=as_written)
    parser.add_argument("--steps", type=int, default=10_000, help="of the run in memory (%(default)s)")
    parser.add_argument("--epochs", type=int, default=50, help="of the run of files (%(default)s)")
    parser.add_argument("--only", choices=("memory", "files"), help="one of the two")
    args = parser.parse_args(words)
    bad = []
    with tempfile.TemporaryDirectory(prefix="long-run-") as name:
        images = image_folder(Path(name) / "images", 40)
        epochs = -(-args.steps // 89)  # of 1,438 digits
        runs = {
            "memory": (*MEMORY, "trainer.batch_size=16", f"trainer.epochs={epochs}"),
            "files": (
                *("dataset=imagefolder", f"dataset.root={images}", "dataset.image_size=16", "trainer.workers=2"),
                *("method=moco", "method.queue_size=20", "method.batchnorm_groups=1", "evaluation.knn.k=5"),
                *("trainer.batch_size=4", f"trainer.epochs={args.epochs}"),
            ),
        }
        for kind, own in runs.items():
            if args.only not in (None, kind):
                continue
            run = Path(name) / kind
            with sampled(every=10 if kind == "files" else 100) as samples:
                status = sslctl_main(command(run, *WORDS, *own))
            assert status == 0, f"the run ended with status {status}"
            wrong = [*leaks(samples), *filter(None, [disk_excess(run)])]
            last = samples[-1]
            rates = ", ".join(f"{value:.3g} {name}" for name, value in growth(samples).items())
            holds = f"{last.step:,} steps, {last.memory / 2**20:.0f} MiB, {last.files} files"
            print(f"{kind}: {holds}; a step: {rates}; {wrong or 'flat'}")
            bad += wrong
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
