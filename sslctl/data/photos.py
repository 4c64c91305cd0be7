"""Colour images that are already on the machine: patches of scikit-learn's two sample photographs."""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F

from sslctl.data import files
from sslctl.data.pixels import Reading
from sslctl.data.sources import Source, from_tensors

NAMES, THIRDS = ("china", "flower"), ("top", "middle", "bottom")
PATCH, STEP, STRIP = 32, 16, 64  # pixels; a patch is half over the next, a strip is as high as its photograph


def photos(split: str, image_size: int) -> Source:
    """Patches of 32×32 pixels of a temple in China and of a flower: 1,450 to train on, 300 to test.

    A photograph of 427×640 pixels is ten strips side by side. The third and the eighth are the test split's, and no patch lies
    across the edge of one: no pixel is in both splits. A patch's class is its photograph and the third of the photograph's height
    that its centre is in. Patches of one strip overlap and look alike: they are fewer images than they count.
    """
    folder = (
        Path(importlib.util.find_spec("sklearn").origin).parent / "datasets/images"
    )  # found, not imported: see digits
    patches, labels = [], []
    for number, name in enumerate(NAMES):
        photograph = files.read(str(folder / f"{name}.jpg"), Reading(3))  # (3, 427, 640)
        _, height, width = photograph.shape
        for x in range(0, width - PATCH + 1, STEP):
            if any(_is_test(edge) != (split == "test") for edge in (x, x + PATCH - 1)):
                continue
            for y in range(0, height - PATCH + 1, STEP):
                patches.append(photograph[:, y : y + PATCH, x : x + PATCH])
                labels.append(len(THIRDS) * number + len(THIRDS) * (y + PATCH // 2) // height)
    images = torch.stack(patches)
    if image_size != PATCH:
        images = F.interpolate(images.float(), (image_size, image_size), mode="bilinear", antialias=True)
        images = images.round().to(torch.uint8)
    classes = tuple(f"{name}, {third}" for name in NAMES for third in THIRDS)
    return from_tensors("photos", split, images, torch.tensor(labels), classes, image_size)


def _is_test(column: int) -> bool:
    """Whether a column of pixels is in the third or the eighth strip."""
    return column // STRIP % 5 == 2
