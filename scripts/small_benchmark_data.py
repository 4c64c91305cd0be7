"""Videos and texts for small_benchmark.py: moving shapes, and the licences of two packages."""

import importlib.metadata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CHARACTERS = 60_000
SIDE, SHOTS = 20, 8  # pixels and frames of `write_passing`'s videos


def moving_shape(kind: str, seed: int, count: int = 10, side: int = 24) -> np.ndarray:
    """(count, side, side, 3) uint8: a disc or a square that moves to the right and downwards on a plain ground."""
    generator = np.random.default_rng(seed)
    (left, top), (dx, dy), size = generator.uniform(0, 4, 2), generator.uniform(1.0, 1.6, 2), generator.integers(5, 8)
    shots = []
    for t in range(count):
        image = Image.new("RGB", (side, side), (30, 40, 60))
        draw, x, y = ImageDraw.Draw(image), left + dx * t, top + dy * t
        (draw.rectangle if kind == "square" else draw.ellipse)((x, y, x + size, y + size), fill=(220, 180, 200))
        shots.append(np.asarray(image))
    return np.stack(shots)


def write_folder(path: Path, shots: np.ndarray) -> Path:
    """A folder of frames, 0.png to 9.png."""
    path.mkdir(parents=True, exist_ok=True)
    for number, shot in enumerate(shots):
        Image.fromarray(shot).save(path / f"{number}.png")
    return path


def write_videos(root: Path, count: int) -> Path:
    """Folders of frames of two classes."""
    for number in range(count):
        kind = ("disc", "square")[number % 2]
        write_folder(root / kind / f"{number:03}", moving_shape(kind, number))
    return root


def write_passing(root: Path, count: int, seed: int) -> None:
    """Videos of a disc that moves to the right and downwards, in two folders: is it near the corner in the middle, or far?"""
    generator = np.random.default_rng(seed)
    for number in range(count):
        start, speed = generator.uniform(0, 8, 2), generator.uniform(0.7, 1.2, 2)
        middle = (start + SHOTS // 2 * speed).sum()
        folder = root / ("near" if middle < 15.6 else "far") / f"{number:03}"
        folder.mkdir(parents=True, exist_ok=True)
        for t in range(SHOTS):
            image, (x, y) = Image.new("RGB", (SIDE, SIDE), (30, 40, 60)), start + t * speed
            ImageDraw.Draw(image).ellipse((x, y, x + 4, y + 4), fill=(220, 180, 200))
            image.save(folder / f"{t}.png")


def write_texts(root: Path) -> Path:
    """The licences of two packages, a class each."""
    for name in ("torch", "numpy"):
        actual = [f for f in importlib.metadata.files(name) or [] if "LICENSE" in f.name.upper()]
        licences = [f.locate() for f in actual if f.suffix in ("", ".txt")]
        whole = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in licences)
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "licence.txt").write_text(whole[:CHARACTERS])
    return root


def most_frequent_token(root: Path) -> float:
    """Percent of the tokens that are the most frequent one: what always saying it gets."""
    from sslctl.data.text import text

    tokens = text("train", str(root), 32, 600, None).tokens[:, 1:].flatten()
    return 100 * (tokens.bincount().max() / tokens.numel()).item()
