"""What a pack costs as it grows: seconds to open it, memory after a thousand random reads, of 10,000 and 1,000,000 images.

    python scripts/bench_pack.py [--images 10000 1000000] [--reads 1000]

Small JPEG images (32×32) of random pixels, packed as `sslctl pack` packs files. Each is opened by a process of its own, after its
imports: torch, datasets and all that dataset=hf needs; the seconds of a processor are those that other programs cannot lengthen.
Resident memory is VmRSS, with the mapped pages that the reads touched.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sslctl.data.packing import new_folder, write_pack
from sslctl.data.source import Source

OPENING = """
import json, sys, time
import datasets, datasets.arrow_dataset, numpy, torch
from sslctl.data import packed
start, cpu = time.perf_counter(), time.process_time()
source = packed.hf("train", sys.argv[1], None, 3, 0)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
for row in numpy.random.default_rng(0).integers(0, len(source), int(sys.argv[2])).tolist():
    source.read(row)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({"seconds": seconds, "cpu": cpu, "MiB": int(status["VmRSS"].split()[0]) / 1024}))
"""


def write(folder: Path, images: int) -> float:
    """Packs so many images; returns the seconds it takes."""
    draw, paths = np.random.default_rng(0), []
    for number in range(1000):
        path = folder / f"{number}.jpg"
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    labels = torch.arange(images) % 10
    repeated = tuple(paths[number % 1000] for number in range(images))
    source = Source("small", "train", None, repeated, labels, tuple("abcdefghij"), 3, 32, "")
    start = time.perf_counter()
    with new_folder(folder / "pack") as inside:
        write_pack(inside, {"train": source}, lambda done: None)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--reads", type=int, default=1000)
    arguments = parser.parse_args()
    rows = []
    for images in arguments.images:
        with tempfile.TemporaryDirectory() as folder:
            written = write(Path(folder), images)
            command = [sys.executable, "-c", OPENING, f"{folder}/pack", str(arguments.reads)]
            rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        own = rows[-1]
        print(
            f"{images:>9,} images: packed in {written:,.0f} s, opened in {own['seconds']:.2f} s ({own['cpu']:.2f} of a"
            f" processor), {own['MiB']:,.0f} MiB"
            f" after {arguments.reads:,} reads, {own['MiB'] / rows[0]['MiB']:.3f} of the first",
            flush=True,
        )


if __name__ == "__main__":
    main()
