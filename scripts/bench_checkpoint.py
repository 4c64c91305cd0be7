"""What a checkpoint every epoch costs on Fashion-MNIST: python scripts/bench_checkpoint.py [--epochs E] [--steps N]

Two ways. `sslctl pretrain experiment=fashion_mnist_cpu` with a checkpoint every epoch and with one at the end, in turn:
seconds by its log, in which E - 1 of the E checkpoints lie. And the saving itself, of such a run's state, beside the time of
an epoch. --steps N makes N steps stand for an epoch in the first, so that more checkpoints fall into less time. Saves go to
the temporary folder: set TMPDIR to the disk that runs lie on.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from bench_views import table

from sslctl.runs import checkpoint

EVERY, AT_END = "every epoch", "at the end"


def run_sslctl(run_dir: Path, threads: int, *overrides: str, until: int | None = None) -> list[dict]:
    """Runs `sslctl pretrain` without evaluations and returns what it logged; `until`: stops it after so many steps."""
    quiet = ["evaluation.closing=false", "evaluation.knn_every_epochs=null", "trainer.log_every_steps=10"]
    command = [sys.executable, "-m", "sslctl", "pretrain", f"run_dir={run_dir}", f"trainer.threads={threads}"]
    metrics, output, root = run_dir / "metrics.jsonl", run_dir.with_suffix(".txt"), Path(__file__).parents[1]
    with output.open("w") as to:
        process = subprocess.Popen(
            [*command, *quiet, *overrides], stdout=to, stderr=to, cwd=root, env=environment(threads)
        )
        while until and process.poll() is None:
            time.sleep(0.2)
            if metrics.exists() and any(record["step"] >= until for record in read(metrics)):
                process.terminate()
                break
        if process.wait() not in ((0, 143) if until else (0,)):
            sys.exit(output.read_text())
    return read(metrics)


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def read(metrics: Path) -> list[dict]:
    """The complete lines of a log."""
    return [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


def seconds_and_images(records: list[dict], first: int, last: int, batch_size: int) -> tuple[float, int]:
    """What the intervals between the records of steps first … last took, and the images in them."""
    seconds, images = 0.0, 0
    for before, after in itertools.pairwise(r for r in records if first <= r["step"] <= last and "loss" in r):
        count = (after["step"] - before["step"]) * batch_size
        seconds, images = seconds + count / after["images_per_second"], images + count
    return seconds, images


def train(args: argparse.Namespace, run_dir: Path, *, saves: bool) -> tuple[float, float]:
    """Seconds of training by its log, and seconds of a whole epoch of the dataset."""
    every = f"trainer.save_every_steps={args.steps}" if args.steps else "trainer.save_every_epochs=1"
    records = run_sslctl(
        run_dir,
        args.threads,
        *("method=moco", "dataset=fashion_mnist", "experiment=fashion_mnist_cpu"),
        *([f"dataset.root={args.root}"] if args.root else []),
        *(f"trainer.epochs={args.epochs}", "trainer.batch_size=64", "scheduler.warmup_epochs=0"),
        every if saves else "trainer.save_every_epochs=null",
        until=args.epochs * args.steps if args.steps else None,
    )
    last = args.epochs * args.steps if args.steps else records[-1]["step"]
    seconds, images = seconds_and_images(records, 0, last, 64)
    per_epoch = round(records[-1]["step"] / records[-1]["epoch"]) * 64
    return seconds, seconds / images * per_epoch


def time_saves(run_dir: Path, count: int, place: Path) -> list[float]:
    """Seconds of each of `count` saves of a run's last state, its convolutions in channels_last as while it trains."""
    newest = checkpoint.newest_valid(run_dir)
    tensors = checkpoint.load_tensors(newest / "weights.safetensors")
    tensors = {n: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in tensors.items()}
    state = checkpoint.load_pickle(newest / "state.pt")
    taken = []
    for step in range(count):
        began = time.perf_counter()
        checkpoint.save(place, step, SimpleNamespace(state_dict=lambda: tensors), state, keep_last=2)
        taken.append(time.perf_counter() - began)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="a folder with Fashion-MNIST's idx files; default: sslctl's own")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of an epoch, a multiple of 10; default: the dataset's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.epochs < 2 or (args.steps or 0) % 10:
        parser.error("--epochs: at least 2; --steps: a multiple of 10")
    torch.set_num_threads(args.threads)
    rounds, epochs = [], []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for number in range(args.rounds):
            every, _ = train(args, place / f"every-{number}", saves=True)
            at_end, epoch = train(args, place / f"end-{number}", saves=False)
            rounds.append({AT_END: at_end, EVERY: every})
            epochs.append(epoch)
        taken = time_saves(place / "end-0", args.saves, place / "saves")
        size = sum(path.stat().st_size for path in checkpoint.newest_valid(place / "end-0").iterdir())
    print(f"{args.epochs} epochs of {args.steps or 'all'} steps, {args.threads} threads\n")
    print(table(rounds, "seconds", AT_END))
    save, epoch = statistics.median(taken), statistics.median(epochs)
    print(
        f"\none save  {1000 * save:.0f} ms ({1000 * min(taken):.0f} to {1000 * max(taken):.0f}), {size / 2**20:.1f} MiB"
    )
    print(f"an epoch  {epoch:.1f} s: {100 * save / epoch:.3f} % of it goes into a checkpoint")


if __name__ == "__main__":
    main()
