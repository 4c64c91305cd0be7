"""What a folder's images are, file by file, before any training: which cannot be read, which are alike."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from sslctl.data import files, windows
from sslctl.data.encoded import Encoded, ImageFile
from sslctl.data.files import UNREADABLE, Headers
from sslctl.data.layout import Layout
from sslctl.data.pixels import SIXTEEN_BITS, Reading, finite_range, from_array
from sslctl.errors import reason_of
from sslctl.ops.special_files import refuse_special

_OUTLINE = 8  # rows and columns of the differences that a hash holds
_ALIKE = 4.0  # mean difference of small copies, of 255, up to which images of one hash are near duplicates


@dataclass(frozen=True)
class Look:
    """What one file shows. outline: a difference hash of its brightness; small: 16×16 of it. error: why it cannot be read."""

    path: str
    digest: bytes = b""
    size: tuple[int, int] = (0, 0)
    kind: str = ""
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


def look_at(path: ImageFile) -> Look:
    """Decodes one image, at reduced scale where its format has that; deep ones by their own range of values."""
    try:
        digest = _digest(path)
        size, kind, values = files.header_and_values(path, draft=(64, 64))
        grey = _brightness(values)
    except UNREADABLE as error:
        return Look(str(path), error=reason_of(error))
    outline = np.asarray(grey.resize((_OUTLINE + 1, _OUTLINE), Image.Resampling.BOX), np.int16)
    small = np.asarray(grey.resize((16, 16), Image.Resampling.BOX), np.int16)
    bits = np.packbits(outline[:, 1:] > outline[:, :-1]).tobytes()
    return Look(str(path), digest, size, kind, bits, small)


def look_at_header(path: str) -> Look:
    """Looks at the bytes and the header of an image of any size, whose pixels are none of what is said of it."""
    try:
        digest = _digest(path)
        size, kind = windows.header_of(path)
    except UNREADABLE as error:
        return Look(path, error=reason_of(error))
    return Look(path, digest, size, kind)


def _digest(path: ImageFile) -> bytes:
    """Returns a hash of a file's bytes."""
    if isinstance(path, Encoded):
        return hashlib.blake2b(path.content, digest_size=16).digest()
    refuse_special(path)
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).digest()


def _brightness(values: np.ndarray) -> Image.Image:
    """Returns an image in grey of 8 bits, the mean of its bands where it is none of the usual kinds."""
    values = values.mean(2) if values.ndim == 3 else values
    if values.dtype != np.uint8:
        reading = Reading(1, finite_range([values]) or SIXTEEN_BITS)
        values = (from_array(values[..., None], reading)[0] * 255).round().byte().numpy()
    return Image.fromarray(values)


def audit(
    layouts: dict[str, Layout],
    images: dict[str, Sequence[ImageFile]],
    progress: Callable[[int], None] = lambda done: None,
    *,
    look_at: Callable[[ImageFile], Look] = look_at,
) -> Audit:
    """Looks at every image of the splits. images: of each, read where they are looked at. progress: is told after each how many
    have been. look_at: a file; `look_at_header` where images are too large to be decoded."""
    looks, done = {split: [] for split in layouts}, 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for split, of_split in images.items():
            for look in pool.map(lambda row, own=of_split: look_at(own[row]), range(len(of_split))):
                looks[split].append(look)
                progress(done := done + 1)
    result = Audit(layouts, looks)
    whole = [look for of_split in looks.values() for look in of_split if not look.error]
    result.copies = [[look.path for look in group] for group in _groups(whole, "digest")]
    # Of copies the first stands for all; what has no outline, as all its pixels are one, is like everything.
    first = list({look.digest: look for look in whole if any(look.outline)}.values())
    for group in _groups(first, "outline"):
        alike = [look.path for look in group if _difference(look, group[0]) <= _ALIKE]
        if len(alike) > 1:
            result.near.append(alike)
    return result


def headers_of(looks: list[Look]) -> Headers:
    """Returns sizes and kinds of those that can be read."""
    whole = [look for look in looks if not look.error]
    return Headers(Counter(look.size for look in whole), Counter(look.kind for look in whole))


def _groups(looks: list[Look], key: str) -> list[list[Look]]:
    """Returns those that share a value, in order."""
    groups: dict = {}
    for look in looks:
        groups.setdefault(getattr(look, key), []).append(look)
    return [group for group in groups.values() if len(group) > 1]


def _difference(one: Look, other: Look) -> float:
    return float(np.abs(one.small - other.small).mean())
