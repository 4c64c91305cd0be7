"""From a batch of uint8 images to the views a method asks for."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.views import colour
from sslctl.views.blur import gaussian_blur, kernel_size
from sslctl.views.random import Key
from sslctl.views.resample import crop_boxes, resample

OPERATIONS = ("flip", *colour.JITTER, "grayscale", "blur", "solarize")
_NEEDS_COLOUR = ("saturation", "hue", "grayscale")


def dropped_operations(augmentation: dict, drops: list[str], channels: int) -> list[str]:
    """The operations of an augmentation that a dataset cannot use: those it names, and colour where there is none."""
    unwanted = set(drops) | (set(_NEEDS_COLOUR) if channels == 1 else set())
    wanted = set()
    for group in augmentation.values():
        wanted |= {name for name in ("flip", "grayscale") if _at_least_once(group[name])}
        wanted |= {name for name in ("blur", "solarize") if _at_least_once(group[name]["probability"])}
        if _at_least_once(group["jitter"]["probability"]):
            wanted |= {name for name in colour.JITTER if group["jitter"][name] > 0}
    return [name for name in OPERATIONS if name in wanted & unwanted]


def _at_least_once(probability: float | list[float]) -> bool:
    return max(probability) > 0 if isinstance(probability, list) else probability > 0


def _per_view(probability: float | list[float], view: int) -> float:
    """A probability given once for all views, or as a list with one entry a view (BYOL's asymmetric pair)."""
    return probability[view] if isinstance(probability, list) else probability


@dataclass(frozen=True)
class ViewMaker:
    """Makes all views of a batch; every random number comes from the batch's key.

    augmentation: group ("global", "local") -> its settings, as in configs/augmentation.
    image_size: pixels; a group's `size` is relative to it. dropped: operations left out, see `dropped_operations`.
    """

    augmentation: dict
    image_size: int
    dropped: tuple[str, ...] = ()

    def __call__(self, images: Tensor, key: Key) -> dict[str, Tensor]:
        """images: (B, C, H, W) uint8, all of one size. Returns group -> (V, B, C, h, w) float in [0, 1]."""
        images = images.float() / 255
        height = torch.full_like(key.index, images.shape[2])
        width = torch.full_like(key.index, images.shape[3])
        views = {}
        for group, settings in self.augmentation.items():
            made = []
            for view in range(settings["count"]):
                name = f"{group}/{view}"
                boxes, flip = self._geometry(settings, key, name, height, width)
                crops = resample(images, boxes, self._pixels(settings), settings["interpolation"], flip)
                made.append(self._photometric(crops, settings, key, group, view))
            views[group] = torch.stack(made)
        return views

    def cut(self, image: Tensor, key: Key) -> dict[str, Tensor]:
        """The crops of one image of any size, for a loader's worker: what is left is `finish`, on the whole batch.

        image: (C, H, W) uint8; key: of this one image. Returns group -> (V, C, h, w) uint8, as PIL would round them.
        """
        height, width = (torch.tensor([size]) for size in image.shape[1:])
        crops = {}
        for group, settings in self.augmentation.items():
            size, made = self._pixels(settings), []
            for view in range(settings["count"]):
                boxes, flip = self._geometry(settings, key, f"{group}/{view}", height, width)
                top, left, h, w = boxes[0].tolist()
                crop = image[None, :, top : top + h, left : left + w]
                crop = F.interpolate(crop, (size, size), mode=settings["interpolation"], antialias=True)
                made.append(crop[0].flip(2) if flip is not None and flip[0] else crop[0])
            crops[group] = torch.stack(made)
        return crops

    def finish(self, crops: dict[str, Tensor], key: Key) -> dict[str, Tensor]:
        """What follows `cut`. crops: group -> (V, B, C, h, w) uint8. Returns the same shapes, float in [0, 1]."""
        views = {}
        for group, settings in self.augmentation.items():
            made = [
                self._photometric(crops[group][view].float() / 255, settings, key, group, view)
                for view in range(settings["count"])
            ]
            views[group] = torch.stack(made)
        return views

    def sizes(self) -> dict[str, tuple[int, int]]:
        """group -> (number of views, side in pixels)."""
        return {group: (settings["count"], self._pixels(settings)) for group, settings in self.augmentation.items()}

    def _pixels(self, settings: dict) -> int:
        return round(settings["size"] * self.image_size)

    def _geometry(self, settings: dict, key: Key, name: str, height: Tensor, width: Tensor):
        boxes = crop_boxes(key, f"{name}/crop", height, width, settings["scale"], settings["ratio"])
        flips = "flip" not in self.dropped and settings["flip"] > 0
        return boxes, key.chance(f"{name}/flip", settings["flip"]) if flips else None

    def _photometric(self, images: Tensor, settings: dict, key: Key, group: str, view: int) -> Tensor:
        """Everything after crop and flip, which commutes with the flip. images: (B, C, h, w) float in [0, 1]."""
        name = f"{group}/{view}"
        steps = [self._jitter, self._grayscale]
        for step in reversed(steps) if settings["grayscale_first"] else steps:
            images = step(images, settings, key, name, view)
        images = self._blur(images, settings["blur"], key, name, view)
        return self._solarize(images, settings["solarize"], key, name, view)

    def _chosen(self, key: Key, name: str, probability: float | list[float], view: int) -> Tensor:
        """Rows (n,) of the images that an operation is drawn for."""
        return key.chance(name, _per_view(probability, view)).nonzero()[:, 0]

    def _jitter(self, images: Tensor, settings: dict, key: Key, name: str, view: int) -> Tensor:
        jitter = settings["jitter"]
        names = [n for n in colour.JITTER if n not in self.dropped and jitter[n] > 0]
        rows = self._chosen(key, f"{name}/jitter", jitter["probability"], view)
        if not names or not len(rows):
            return images
        chosen, factors = key.select(rows), {}
        for operation in names:
            strength = jitter[operation] * jitter["strength"]
            low, high = (-strength, strength) if operation == "hue" else (max(0.0, 1 - strength), 1 + strength)
            factors[operation] = chosen.between(f"{name}/{operation}", low, high)
        order = chosen.permutation(f"{name}/order", len(names))
        return images.index_copy(0, rows, colour.jitter(images[rows], factors, order))

    def _grayscale(self, images: Tensor, settings: dict, key: Key, name: str, view: int) -> Tensor:
        if "grayscale" in self.dropped:
            return images
        rows = self._chosen(key, f"{name}/grayscale", settings["grayscale"], view)
        return images.index_copy(0, rows, colour.grayscale(images[rows])) if len(rows) else images

    def _blur(self, images: Tensor, settings: dict, key: Key, name: str, view: int) -> Tensor:
        if "blur" in self.dropped:
            return images
        rows = self._chosen(key, f"{name}/blur", settings["probability"], view)
        if not len(rows):
            return images
        low, high = settings["sigma"]
        sigma = key.select(rows).between(f"{name}/sigma", low, high)
        return images.index_copy(0, rows, gaussian_blur(images[rows], sigma, kernel_size(images.shape[-1])))

    def _solarize(self, images: Tensor, settings: dict, key: Key, name: str, view: int) -> Tensor:
        if "solarize" in self.dropped:
            return images
        rows = self._chosen(key, f"{name}/solarize", settings["probability"], view)
        return images.index_copy(0, rows, colour.solarize(images[rows], settings["threshold"])) if len(rows) else images


def clean(images: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> float in [0, 1], for evaluation."""
    return images.float() / 255


def resize_and_crop(image: Tensor, size: int, resize: int) -> Tensor:
    """The evaluation transform for images of any size: shorter side to `resize`, central square of `size`.

    image: (C, H, W) uint8. Returns (C, size, size) uint8.
    """
    height, width = image.shape[1:]
    shorter = min(height, width)
    new = [max(resize, math.floor(side * resize / shorter)) for side in (height, width)]
    if new != [height, width]:
        image = F.interpolate(image[None], new, mode="bilinear", antialias=True)[0]
    top, left = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return image[:, top : top + size, left : left + size]
