"""The folders of adaptation_benchmark.py: three cut from what is at hand, and one of small local defects that is made here."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sslctl.data.sources import fashion_mnist

PER_CLASS = {
    "train": 150,
    "test": 60,
}  # images of Fashion-MNIST and CIFAR-10: few are judged, that judging costs little
MARKS = ("cross", "dot", "none", "ring", "scratch")
MARKED = {"train": 240, "test": 100}  # images of each mark
SIDE = 64  # pixels of an image with a mark
SMALLEST, LARGEST = 6, 10  # pixels of a mark
CONTRAST = 0.5  # of a mark, of the range of values
DEVIATION = 0.12  # of a texture's values around the middle, likewise
_THICK = 0.8  # half of a line's pixels


def texture(generator: np.random.Generator) -> np.ndarray:
    """Returns (SIDE, SIDE) float64 noise around 0.5 whose amplitudes fall with the frequency as 1/f.

    Natural images have such spectra (Field, 1987, JOSA A 4, 2379); random phases make no shape, so that nothing but a mark
    tells classes apart. It needs no data.
    """
    rows, columns = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf  # no mean of its own
    noise = np.fft.irfft2(np.fft.rfft2(generator.standard_normal((SIDE, SIDE))) / frequency, (SIDE, SIDE))
    return 0.5 + DEVIATION * noise / noise.std()


def shape(mark: str, size: int, angle: float) -> np.ndarray:
    """Returns which pixels of a square of `size` a mark covers, (size, size) float64 from 0 to 1, softly at its border."""
    place = np.arange(size) - (size - 1) / 2
    y, x = np.meshgrid(place, place, indexing="ij")
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    radius, end = np.hypot(x, y), size / 2 - 0.5
    outside = radius - end  # pixels beyond the circle that holds the mark
    distance = {
        "dot": outside,
        "ring": np.abs(radius - end + _THICK) - _THICK,
        "scratch": np.maximum(np.abs(across) - _THICK, outside),
        "cross": np.maximum(np.minimum(np.abs(across), np.abs(along)) - _THICK, outside),
        "none": np.full_like(x, np.inf),
    }[mark]
    return np.clip(0.5 - distance, 0, 1)


def marked(mark: str, seed: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Returns a texture with a mark at a random place, darker or brighter, (SIDE, SIDE, 3) uint8, and its (top, left, size).

    The seed decides texture, place, size, angle and sign, whichever the mark is: two marks of one seed differ inside of
    the mark's square alone.
    """
    generator = np.random.default_rng(seed)
    values = texture(generator)
    size = int(generator.integers(SMALLEST, LARGEST + 1))
    top, left = (int(place) for place in generator.integers(0, SIDE - size + 1, 2))
    angle, sign = generator.uniform(0, np.pi), generator.choice([-1, 1])
    values[top : top + size, left : left + size] += sign * CONTRAST * shape(mark, size, angle)
    grey = np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2), (top, left, size)


def write_marks(root: Path, counts: dict[str, int] = MARKED) -> Path:
    """Writes root/<split>/<mark>_<number>.png, with so many images of each mark. No two images of any split share a seed."""
    seed = 0
    for split, count in counts.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            for mark in MARKS:
                Image.fromarray(marked(mark, seed)[0]).save(root / split / f"{mark}_{number:03}.png")
                seed += 1
    return root


def write_neu_det(source: Path, root: Path) -> Path:
    """Copies the flat folder <class>_<number>.jpg of NEU-DET: numbers up to 240 for training, the others are judged."""
    files = sorted(source.rglob("*_*.jpg"))
    if not files:
        raise SystemExit(f"{source}: no images called <class>_<number>.jpg")
    for file in files:
        split = "train" if int(file.stem.rpartition("_")[2]) <= 240 else "test"
        (root / split).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, root / split / file.name)
    return root


def write_fashion_mnist(source: Path | None, root: Path) -> Path:
    """Writes the first images of each class of Fashion-MNIST. source: the folder of its idx files; None: Debian's."""

    def images(split: str) -> Iterator[tuple[str, Image.Image]]:
        whole = fashion_mnist(split, 28, str(source) if source else None, download=False)
        for label, name in enumerate(whole.classes):
            for row in torch.nonzero(whole.labels == label)[: PER_CLASS[split], 0].tolist():
                yield name.replace("/", " or "), Image.fromarray(whole.images[row, 0].numpy())

    return _write(root, images)


def write_cifar10(source: Path, root: Path) -> Path:
    """Copies the first images of each class of a folder with train/<class>/*.jpg and test/<class>/*.jpg."""

    def images(split: str) -> Iterator[tuple[str, Image.Image]]:
        for folder in sorted(path for path in (source / split).iterdir() if path.is_dir()):
            for file in sorted(folder.glob("*.jpg"))[: PER_CLASS[split]]:
                yield folder.name, Image.open(file)

    return _write(root, images)


def _write(root: Path, images: Callable[[str], Iterator[tuple[str, Image.Image]]]) -> Path:
    """Writes root/<split>/<class>_<number>.png. images: of a split, each with its class."""
    for split in PER_CLASS:
        (root / split).mkdir(parents=True, exist_ok=True)
        for number, (name, image) in enumerate(images(split)):
            image.save(root / split / f"{name}_{number:04}.png")
    return root
