"""Two 224-pixel SimCLR views of a folder of 500×375 JPEGs: python scripts/bench_folder.py [--images N] [--rounds N]

sslctl's loader against torchvision's ImageFolder, DataLoader and PIL pipeline, both with two worker processes, up to float
views of whole batches in the training process. Images per second of CPU time (that of all processes: what a core yields)
and of wall time, median of the rounds, in turn.
"""

import argparse
import contextlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench_views import pil_pipeline, recipe, smooth, table
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from sslctl.data.folders import FolderKeys
from sslctl.data.loader import batches
from sslctl.data.sources import folder
from sslctl.ops.allocator import keep_freed_memory
from sslctl.ops.timing import Clock
from sslctl.views import ViewMaker

SIZE, HEIGHT, WIDTH = 224, 375, 500
Pass = Callable[[], Iterator[Tensor]]  # one pass over the images: float views (N, 3, 224, 224), two an image


def make_folder(place: Path, count: int) -> float:
    """Writes one class folder of JPEGs of quality 90; returns their mean size in KiB."""
    (place / "one").mkdir()
    for number in range(count):
        pixels = smooth(1, HEIGHT, WIDTH, seed=number)[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(place / "one" / f"{number:05}.jpg", quality=90)
    return sum(path.stat().st_size for path in place.glob("one/*")) / count / 2**10


def ours(root: Path, batch_size: int, workers: int) -> Pass:
    """sslctl's path; memory_gb=0 keeps the images on disk."""
    source = folder("train", FolderKeys(str(root), SIZE, 3, 0.0))
    views, cpu = ViewMaker(recipe(blur=True), SIZE), torch.device("cpu")
    settings = {"batch_size": batch_size, "seed": 0, "first_step": 0, "total_steps": len(source) // batch_size}

    def one_pass() -> Iterator[Tensor]:
        feed = batches(source, views, **settings, workers=workers, device=cpu, clock=Clock(cpu))
        with contextlib.closing(feed):
            for batch in feed:
                yield from batch.views["global"]

    return one_pass


class Twice:
    """Two views of an image."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self.transform = transform

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        return self.transform(image), self.transform(image)


def theirs(root: Path, batch_size: int, workers: int) -> Pass:
    """torchvision's path."""
    dataset = ImageFolder(str(root), Twice(pil_pipeline(SIZE, blur=True)))
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers)

    def one_pass() -> Iterator[Tensor]:
        for views, _ in loader:
            yield from views

    return one_pass


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(one_pass: Pass) -> tuple[float, float]:
    """Images per second of CPU time and of wall time."""
    began, spent, views = time.perf_counter(), cpu_seconds(), 0
    for part in one_pass():
        part.mean()  # looks at every pixel once
        views += len(part)
    return views / 2 / (cpu_seconds() - spent), views / 2 / (time.perf_counter() - began)


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of the training process; a worker has one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        size = make_folder(Path(name), args.images)
        contenders = {
            "sslctl": ours(Path(name), args.batch_size, args.workers),
            "torchvision, PIL": theirs(Path(name), args.batch_size, args.workers),
        }
        for one_pass in contenders.values():
            measure(one_pass)  # warm-up
        rounds = [{name: measure(one_pass) for name, one_pass in contenders.items()} for _ in range(args.rounds)]
    print(
        f"{args.images} JPEGs of {WIDTH}×{HEIGHT}, {size:.0f} KiB each; {args.workers} workers, {args.threads} thread(s)"
    )
    for column, unit in enumerate(("images/s a core", "images/s by the clock")):
        values = [{name: both[column] for name, both in taken.items()} for taken in rounds]
        print(f"\n{table(values, unit, 'sslctl', inverse=True)}")


if __name__ == "__main__":
    main()
