"""Times what `sslctl evaluate` does with 50,000 × 512 features: python scripts/bench_evaluation.py [--threads N] [--part …]

protocols   every protocol and label-free figure, in seconds and CPU seconds, and the most memory
knn         weighted kNN as a ratio to the bare chunked product with top-k, interleaved, median of 5
extraction  small_resnet on images in memory, as a ratio to a bare forward loop; and on a folder of large images, as a
            ratio to a loop that only decodes, interleaved, median of 5
"""

import argparse
import functools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sslctl.config.command_line import Prepared
from sslctl.config.diagnose import compose_choices
from sslctl.data import files
from sslctl.data.folders import FolderKeys
from sslctl.data.pixels import Reading
from sslctl.data.sources import Source, folder
from sslctl.evaluation import label_free
from sslctl.evaluation.features import Features, extract
from sslctl.evaluation.knn import knn_votes
from sslctl.evaluation.linear import LinearProbe, ProbeGrid
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.suite import build_protocols
from sslctl.evaluation.task import Reader, Task
from sslctl.models.backbones import Backbone, SmallResNet
from sslctl.models.preprocess import Preprocess

TRAIN, TEST, DIM, CLASSES, K = 50_000, 10_000, 512, 10, 200
LIDAR_IMAGES, LIDAR_VIEWS = 1000, 10


def made_up(rows: int, centers: torch.Tensor, generator: torch.Generator) -> Features:
    """Overlapping Gaussian classes."""
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return Features(centers[labels] + 3 * torch.randn(rows, DIM, generator=generator), labels, CLASSES)


class InMemory(Reader):
    """Features that are there, whatever the subject."""

    def __init__(self, train: Features, test: Features):
        super().__init__(torch.device("cpu"), workers=0, cache_gb=0)
        self.splits = {"train": train, "test": test}

    def __call__(self, subject: Subject, source: Source) -> Features:
        return self.splits[source.split]


def source_of(split: str, data: Features) -> Source:
    """What a result line is told of the images."""
    names = tuple(str(c) for c in range(CLASSES))
    return Source("synthetic", split, None, (), data.labels, names, 3, 32, split)


def bare(queries: torch.Tensor, bank: torch.Tensor, chunk: int) -> None:
    """The least a kNN must do: similarities and the k largest."""
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    for part in queries.split(chunk):
        (part @ bank.T).topk(K, dim=1, sorted=False)


def seconds(function, *arguments, **settings) -> float:
    began = time.perf_counter()
    function(*arguments, **settings)
    return time.perf_counter() - began


def compare(words: str, ours: Callable[[], object], least: Callable[[], object], times: int = 5) -> None:
    """Prints both medians, and the ratio least / ours: 1 when nothing is lost."""
    ours(), least()
    pairs = [(seconds(ours), seconds(least)) for _ in range(times)]
    ratios = [b / a for a, b in pairs]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{words}: {a:.2f} s, the least {b:.2f} s, ratio {statistics.median(ratios):.2f}", end="")
    print(f" ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def knn(train: Features, test: Features) -> None:
    compare(
        "kNN, bare product with top-k",
        lambda: knn_votes(test.features, train, k=K, temperature=0.1),
        lambda: bare(test.features, train.features, 1000),
    )


def protocols(train: Features, test: Features) -> None:
    """Each part of the suite as `evaluate` calls it, with its own configuration."""
    config = compose_choices("evaluate", Prepared(), [])
    subject = Subject("trained", None, Preprocess(3, 32, 32, [0.5] * 3, [0.25] * 3), "backbone", "none", 0)
    task = Task(source_of("train", train), source_of("test", test), InMemory(train, test))
    grid, chosen = ProbeGrid(**config.probe), build_protocols(config.protocols)

    def without_labels() -> None:
        z = train.features[: config.label_free.images]
        views = train.features[:LIDAR_IMAGES, None] + torch.randn(LIDAR_IMAGES, LIDAR_VIEWS, DIM)
        label_free.rankme(z), label_free.alpha_req(z), label_free.feature_std(z)
        label_free.uniformity(z[: config.label_free.pairs])
        label_free.lidar(views)
        label_free.alignment(views[:, 0], views[:, 1])

    measured = {"linear, all labels": LinearProbe(grid)}
    measured |= {f"linear, {amount:g}": LinearProbe(grid, amount, config.draws) for amount in config.few_labels}
    measured |= {name: chosen[name] for name in ("knn", "retrieval", "clustering")}  # one search for the first two
    parts = {name: functools.partial(protocol, subject, task) for name, protocol in measured.items()}
    parts["without labels"] = without_labels
    whole = 0.0
    for name, part in parts.items():
        began = time.process_time()
        taken = seconds(part)
        whole += taken
        print(f"{name:<20} {taken:6.1f} s, {time.process_time() - began:6.1f} CPU s", flush=True)
    print(f"{'all':<20} {whole:6.1f} s")
    print(f"memory  {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at most")


def extraction(rows: int, images: int) -> None:
    """Extraction against the loop that it cannot beat."""
    network = SmallResNet([64, 128, 256], 1, 0, "batch", channels=3, image_size=32)
    backbone = Backbone(network, [0.5] * 3, [0.25] * 3).eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8, generator=generator)
    source = Source("memory", "train", pixels, (), torch.zeros(rows, dtype=torch.long), ("a",), 3, 32, "none")
    clean = pixels[:512].float() / 255

    @torch.no_grad()
    def forward() -> None:
        for _ in range(rows // 512):
            backbone(clean)

    compare(
        f"extraction of {rows:,} images in memory, bare forward",
        lambda: extract(backbone, source, torch.arange(rows), resize=32),
        forward,
    )
    with tempfile.TemporaryDirectory() as place:
        random = np.random.default_rng(0)
        for number in range(images):
            small = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(small).resize((2000, 1500), Image.BICUBIC).save(
                Path(place) / f"{number:03}.jpg", quality=90
            )
        large = folder("train", FolderKeys(place, 64, 3, 0.0))
        compare(
            f"extraction of {images} JPEG files of 2000 × 1500, decoding alone",
            lambda: extract(backbone, large, torch.arange(images), resize=73),
            lambda: [files.read(path, Reading(3)) for path in large.paths],
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=("protocols", "knn", "extraction"))
    parser.add_argument("--rows", type=int, default=4096, help="images in memory, for extraction")
    parser.add_argument("--images", type=int, default=256, help="image files, for extraction")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, DIM, generator=generator) / 4
    train, test = (made_up(rows, centers, generator) for rows in (TRAIN, TEST))
    if options.part in (None, "protocols"):
        protocols(train, test)
    if options.part in (None, "knn"):
        knn(train, test)
    if options.part in (None, "extraction"):
        extraction(options.rows, options.images)


if __name__ == "__main__":
    main()
