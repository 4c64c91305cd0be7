"""What a folder's images are, file by file, before any training: which cannot be read, which are alike."""

import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from sslctl.data.files import UNREADABLE, Headers, as_8_bit, is_deep
from sslctl.data.layout import Layout

_OUTLINE = 8  # rows and columns of the differences that a hash holds
_ALIKE = 4.0  # mean difference of small copies, of 255, up to which images of one hash are near duplicates


@dataclass(frozen=True)
class Look:
    """What one file shows. outline: a difference hash of its brightness; small: 16×16 of it. error: why it cannot be read."""

    path: str
    digest: bytes = b""
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    outline: bytes = b""
    small: np.ndarray | None = None
    error: str = ""


@dataclass
class Audit:
    """looks: split -> one for each image. copies, near: groups of paths with the same bytes, or that look alike."""

    layouts: dict[str, Layout]
    looks: dict[str, list[Look]]
    copies: list[list[str]] = field(default_factory=list)
    near: list[list[str]] = field(default_factory=list)

    @property
    def unreadable(self) -> list[Look]:
        return [look for looks in self.looks.values() for look in looks if look.error]

    def shared(self) -> int:
        """Counts the groups of alike images that lie in both splits."""
        of_split = [{look.path for look in looks} for looks in self.looks.values()]
        return (
            sum(all(paths & set(group) for paths in of_split) for group in self.copies + self.near)
            if len(of_split) > 1
            else 0
        )


def audit(layouts: dict[str, Layout]) -> Iterator[int | Audit]:
    """Looks at every image of the splits; yields after each how many have been, and the audit in the end."""
    paths = {split: layout.paths() for split, layout in layouts.items()}
    looks, done = {split: [] for split in paths}, 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for split, of_split in paths.items():
            for look in pool.map(look_at, of_split):
                looks[split].append(look)
                yield (done := done + 1)
    result = Audit(layouts, looks)
    whole = [look for of_split in looks.values() for look in of_split if not look.error]
    result.copies = [[look.path for look in group] for group in _groups(whole, "digest")]
    # Of copies the first stands for all; what has no outline, as all its pixels are one, is like everything.
    first = list({look.digest: look for look in whole if any(look.outline)}.values())
    for group in _groups(first, "outline"):
        alike = [look.path for look in group if _difference(look, group[0]) <= _ALIKE]
        if len(alike) > 1:
            result.near.append(alike)
    yield result


def look_at(path: str) -> Look:
    """Decodes one image, at reduced scale where its format has that."""
    try:
        with open(path, "rb") as opened:
            data = opened.read()
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                size, mode = image.size, image.mode
                image.draft("L", (64, 64))
                grey = as_8_bit(image, _own_range(image)).convert("L")
    except UNREADABLE as error:
        return Look(path, error=" ".join(str(error).split()))
    outline = np.asarray(grey.resize((_OUTLINE + 1, _OUTLINE), Image.Resampling.BOX), np.int16)
    small = np.asarray(grey.resize((16, 16), Image.Resampling.BOX), np.int16)
    bits = np.packbits(outline[:, 1:] > outline[:, :-1]).tobytes()
    return Look(path, hashlib.blake2b(data, digest_size=16).digest(), size, mode, bits, small)


def headers_of(looks: list[Look]) -> Headers:
    """Returns sizes and modes of those that can be read."""
    whole = [look for look in looks if not look.error]
    return Headers(Counter(look.size for look in whole), Counter(look.mode for look in whole))


def _own_range(image: Image.Image) -> tuple[float, float] | None:
    if not is_deep(image.mode):
        return None
    values = np.asarray(image, np.float64)
    values = values[np.isfinite(values)]
    return (values.min(), values.max()) if values.size and values.min() < values.max() else None


def _groups(looks: list[Look], key: str) -> list[list[Look]]:
    """Returns those that share a value, in order."""
    groups: dict = {}
    for look in looks:
        groups.setdefault(getattr(look, key), []).append(look)
    return [group for group in groups.values() if len(group) > 1]


def _difference(one: Look, other: Look) -> float:
    return float(np.abs(one.small - other.small).mean())
