"""From a batch of images, uint8 or float32 in [0, 1], to the views a method asks for."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.config.keys import OPERATIONS
from sslctl.ops.image_size import ImageSize, height_width, image_size_of, shorter_side
from sslctl.random import Key
from sslctl.views import colour
from sslctl.views.blur import gaussian_blur, kernel_size
from sslctl.views.resample import box_taps, by_columns, crop_boxes, cut_image, resample_

_LARGE, _PART = 1 << 14, 1 << 20  # values: an image that is worked on alone, and those that are worked on together
_Step = Callable[[Tensor, slice], None]
_NEEDS_COLOUR = ("saturation", "hue", "grayscale")
_SAME_CROPS = {"gram": "global"}  # a group whose views are crops of the same places as another's
_OF_PICTURES = (*_NEEDS_COLOUR, "solarize")  # what other bands than grey, or red, green and blue, have not got


def dropped_operations(augmentation: dict, drops: list[str], channels: int) -> list[str]:
    """The operations of an augmentation that a dataset cannot use: those it names, and colour where there is none."""
    without_colour = {1: _NEEDS_COLOUR, 3: ()}.get(channels, _OF_PICTURES)
    unwanted = {*drops, *without_colour}
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

    augmentation: group ("global", "local", "gram") -> its settings, as in configs/augmentation. The gram views are the global
    ones' places once more, where scale, ratio and flip are theirs: at another size, or in other colours.
    image_size: pixels; a group's `size` is relative to it. dropped: operations left out, see `dropped_operations`.
    multiple: each side of a view is the nearest multiple of so many pixels.
    """

    augmentation: dict
    image_size: ImageSize
    dropped: tuple[str, ...] = ()
    multiple: int = 1

    def __call__(self, images: Tensor, key: Key) -> dict[str, Tensor]:
        """images: (B, C, H, W), all of one size. Returns group -> (V, B, C, h, w) float in [0, 1]."""
        batch, channels, height, width = images.shape
        sides = torch.full_like(key.index, height), torch.full_like(key.index, width)
        views, plans = {}, []
        for group, settings in self.augmentation.items():
            size, count = self._pixels(settings), settings["count"]
            views[group] = torch.empty(count, batch, channels, *height_width(size), device=images.device)
            for view, crops in enumerate(views[group]):
                boxes, flip = self._geometry(settings, key, group, view, *sides)
                taps = box_taps(boxes, height, width, size, settings["interpolation"], flip)
                plans.append((crops, *taps, self._photometric(settings, key, group, view, shorter_side(size))))
        for rows in _parts(images):
            columns = by_columns(images[rows])
            columns = columns.div_(255) if images.dtype == torch.uint8 else columns
            for crops, vertical, horizontal, steps in plans:
                resample_(crops[rows], columns, vertical[rows], horizontal[rows])
                for step in steps:
                    step(crops[rows], rows)
        return views

    def cut(self, images: list[Tensor], key: Key) -> dict[str, Tensor]:
        """The crops of images of any size, for a loader's worker: what is left is `finish`, on the whole batch.

        images: (C, H, W) each. Returns group -> (V, B, C, h, w): of uint8 the same, as PIL would round them.
        """
        height, width = (torch.tensor([image.shape[axis] for image in images]) for axis in (1, 2))
        crops = {}
        for group, settings in self.augmentation.items():
            size, kernel = self._pixels(settings), settings["interpolation"]
            stack = images[0].new_empty(settings["count"], len(images), len(images[0]), *height_width(size))
            for view in range(settings["count"]):
                boxes, flip = self._geometry(settings, key, group, view, height, width)
                for image, box, flipped, place in zip(images, boxes.tolist(), flip.tolist(), stack[view], strict=True):
                    place.copy_(cut_image(image, box, size, kernel, flipped))
            crops[group] = stack
        return crops

    def finish(self, crops: dict[str, Tensor], key: Key) -> dict[str, Tensor]:
        """What follows `cut`. crops: group -> (V, B, C, h, w), may be overwritten. Returns the same shapes, float in [0, 1]."""
        views = {}
        for group, settings in self.augmentation.items():
            views[group] = clean(crops[group])
            for view, images in enumerate(views[group]):
                steps = self._photometric(settings, key, group, view, min(images.shape[-2:]))
                for rows in _parts(images):
                    for step in steps:
                        step(images[rows], rows)
        return views

    def sizes(self) -> dict[str, tuple[int, ImageSize]]:
        """group -> (number of views, size in pixels)."""
        return {group: (settings["count"], self._pixels(settings)) for group, settings in self.augmentation.items()}

    def _pixels(self, settings: dict) -> ImageSize:
        sides = height_width(self.image_size)
        return image_size_of([max(1, round(settings["size"] * side / self.multiple)) * self.multiple for side in sides])

    def _geometry(
        self, settings: dict, key: Key, group: str, view: int, height: Tensor, width: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, 4) boxes and (B,) whether to flip."""
        name = f"{_SAME_CROPS.get(group, group)}/{view}"
        rows, columns = height_width(self._pixels(settings))
        boxes = crop_boxes(key, f"{name}/crop", height, width, settings["scale"], settings["ratio"], columns / rows)
        return boxes, key.chance(f"{name}/flip", 0.0 if "flip" in self.dropped else settings["flip"])

    def _photometric(self, settings: dict, key: Key, group: str, view: int, side: int) -> list[_Step]:
        """Everything after crop and flip, which commutes with the flip."""
        name = f"{group}/{view}"
        steps = [self._jitter(settings["jitter"], key, name, view), self._grayscale(settings, key, name, view)]
        if settings["grayscale_first"]:
            steps.reverse()
        steps += [self._blur(settings["blur"], key, name, view, side)]
        steps += [self._solarize(settings["solarize"], key, name, view)]
        return [step for step in steps if step is not None]

    # Each of the following draws an operation's parameters for the whole batch, and returns what applies it, in place,
    # to the images that lie at some rows; None where there is nothing to do.

    def _jitter(self, jitter: dict, key: Key, name: str, view: int) -> _Step | None:
        names = [n for n in colour.JITTER if n not in self.dropped and jitter[n] > 0]
        probability = _per_view(jitter["probability"], view)
        if not names or probability == 0:
            return None
        factors = {}
        for operation in names:
            strength = jitter[operation] * jitter["strength"]
            low, high = (-strength, strength) if operation == "hue" else (max(0.0, 1 - strength), 1 + strength)
            factors[operation] = key.between(f"{name}/{operation}", low, high)
        order, chosen = key.permutation(f"{name}/order", len(names)), key.chance(f"{name}/jitter", probability)
        return colour.Jitter(factors, order, chosen).apply_

    def _grayscale(self, settings: dict, key: Key, name: str, view: int) -> _Step | None:
        return self._where("grayscale", settings["grayscale"], key, name, view, colour.grayscale)

    def _blur(self, blur: dict, key: Key, name: str, view: int, side: int) -> _Step | None:
        sigma = key.between(f"{name}/sigma", *blur["sigma"])
        operation = functools.partial(gaussian_blur, size=kernel_size(side))
        return self._where("blur", blur["probability"], key, name, view, operation, sigma)

    def _solarize(self, solarize: dict, key: Key, name: str, view: int) -> _Step | None:
        operation = functools.partial(colour.solarize, threshold=solarize["threshold"])
        return self._where("solarize", solarize["probability"], key, name, view, operation)

    def _where(
        self, what: str, probability: Any, key: Key, name: str, view: int, operation: Callable, *values: Tensor
    ) -> _Step | None:
        """An operation that is done to some of the images, with values (B,) of each image's own."""
        probability = _per_view(probability, view)
        if what in self.dropped or probability == 0:
            return None
        chosen = key.chance(f"{name}/{what}", probability)
        return lambda images, rows: colour.change_(images, chosen[rows], operation, *(value[rows] for value in values))


def _parts(images: Tensor) -> Iterator[slice]:
    """On a CPU a part of a batch that fits in its cache goes through all operations before the next one is looked at."""
    size = images[0].numel()
    length = len(images) if images.device.type != "cpu" else 1 if size > _LARGE else _PART // size
    for start in range(0, len(images), length):
        yield slice(start, min(start + length, len(images)))


def clean(images: Tensor) -> Tensor:
    """(B, C, H, W), uint8 or float32 in [0, 1], -> float32 in [0, 1], for evaluation."""
    if images.dtype != torch.uint8:
        return images
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def resize_and_crop(image: Tensor, size: ImageSize, resize: int) -> Tensor:
    """The evaluation transform for images of any size: shorter side to `resize`, central square of `size`.

    Where the size is no square, its shape enlarged to a shorter side of `resize` is what the image is made to cover.
    image: (C, H, W), uint8 or float32. Returns (C, h, w) of the same type.
    """
    (height, width), (rows, columns) = image.shape[1:], height_width(size)
    least_height, least_width = (resize * side // min(rows, columns) for side in (rows, columns))
    # One side gets its least length, the other what that makes of it in proportion.
    new = [max(least_height, height * least_width // width), max(least_width, width * least_height // height)]
    if new != [height, width]:
        image = F.interpolate(image[None], new, mode="bilinear", antialias=True)[0]
    top, left = round((new[0] - rows) / 2), round((new[1] - columns) / 2)
    return image[:, top : top + rows, left : left + columns]
