"""From a batch of images, uint8 or float32 in [0, 1], to the views a method asks for."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.config.keys import OPERATIONS
from sslctl.ops.image_size import ImageSize, height_width, image_size_of
from sslctl.random import Key, StackedKey
from sslctl.views import colour, waiting
from sslctl.views.blur import gaussian_blur, kernel_size
from sslctl.views.resample import ATTEMPTS, box_taps, by_columns, crop_boxes, cut_image, resample_

# Values: of an image that a CPU works on alone, of those that it works on together, and of those that a GPU does.
_LARGE, _PART, _PART_OF_GPU = 1 << 14, 1 << 20, 1 << 25
# What is drawn for each view: name -> how many numbers.
_PLACE = {"crop/area": ATTEMPTS, "crop/aspect": ATTEMPTS, "crop/place": 2, "flip": 1}
_COLOURS = dict.fromkeys(["jitter", *colour.JITTER, "grayscale", "sigma", "blur", "solarize"], 1)
_COLOURS["order"] = len(colour.JITTER)
_Step = Callable[[Tensor, slice], None]
_NEEDS_COLOUR = ("saturation", "hue", "grayscale")
_SAME_CROPS = {"gram": "global"}  # a group whose views are crops of the same places as another's
_OF_PICTURES = (*_NEEDS_COLOUR, "solarize")  # what other bands than grey, or red, green and blue, have not got


def dropped_operations(augmentation: dict, drops: list[str], channels: int) -> list[str]:
    """The operations of an augmentation that a dataset cannot use: those it names, and colour where there is none."""
    without_colour = {1: _NEEDS_COLOUR, 3: ()}.get(channels, _OF_PICTURES)
    unwanted = {*drops, *without_colour}
    wanted = set().union(*map(_wanted, augmentation.values()))
    return [name for name in OPERATIONS if name in wanted & unwanted]


def _wanted(settings: dict) -> set[str]:
    """The operations that a group's settings ask for."""
    wanted = {name for name in ("flip", "grayscale") if _at_least_once(settings[name])}
    wanted |= {name for name in ("blur", "solarize") if _at_least_once(settings[name]["probability"])}
    if _at_least_once(settings["jitter"]["probability"]):
        wanted |= {name for name in colour.JITTER if settings["jitter"][name] > 0}
    return wanted


def _at_least_once(probability: float | list[float]) -> bool:
    return max(probability) > 0 if isinstance(probability, list) else probability > 0


def _prefixes(group: str, settings: dict) -> list[str]:
    """What stands before the names of each view's random numbers."""
    return [f"{group}/{view}" for view in range(settings["count"])]


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
        # All parameters of all views first …
        sides = torch.full_like(key.index, height), torch.full_like(key.index, width)
        taps, crops = {}, {}
        for group, (boxes, flip) in self._geometry(key, *sides).items():
            settings = self.augmentation[group]
            size, kernel = self._pixels(settings), settings["interpolation"]
            taps[group] = box_taps(boxes, height, width, size, kernel, flip)
            shape = len(boxes), channels, *height_width(size)  # V·B, C, h, w
            crops[group] = torch.empty(shape, device=images.device)
        steps = self._photometric(key, crops)
        # … then the pixels, part by part.
        for rows in _parts(images) if waiting.may_look(images) else [slice(0, batch)]:
            columns = by_columns(images[rows])
            columns = columns.div_(255) if images.dtype == torch.uint8 else columns
            for group, (vertical, horizontal) in taps.items():
                for part in _parts_of_views(rows, images, crops[group]):
                    source = torch.arange(part.start, part.stop, device=images.device) % batch - rows.start
                    resample_(crops[group][part], columns, vertical[part], horizontal[part], source)
                    for step in steps[group]:
                        step(crops[group][part], part)
        return {group: stack.unflatten(0, (-1, batch)) for group, stack in crops.items()}

    def cut(self, images: list[Tensor], key: Key) -> dict[str, Tensor]:
        """The crops of images of any size, for a loader's worker: what is left is `finish`, on the whole batch.

        images: (C, H, W) each. Returns group -> (V, B, C, h, w): of uint8 the same, as PIL would round them.
        """
        height, width = (torch.tensor([image.shape[axis] for image in images]) for axis in (1, 2))
        crops = {}
        for group, (boxes, flip) in self._geometry(key, height, width).items():
            settings = self.augmentation[group]
            size, kernel = self._pixels(settings), settings["interpolation"]
            stack = images[0].new_empty(len(boxes), len(images[0]), *height_width(size))
            every = zip(images * settings["count"], boxes.tolist(), flip.tolist(), stack, strict=True)
            for image, box, flipped, place in every:
                place.copy_(cut_image(image, box, size, kernel, flipped))
            crops[group] = stack.unflatten(0, (-1, len(images)))
        return crops

    def finish(self, crops: dict[str, Tensor], key: Key) -> dict[str, Tensor]:
        """What follows `cut`. crops: group -> (V, B, C, h, w), may be overwritten. Returns the same shapes, float in [0, 1]."""
        stacks = {group: clean(crops[group]).flatten(0, 1) for group in self.augmentation}  # (V·B, C, h, w)
        steps = self._photometric(key, stacks)
        for group, stack in stacks.items():
            for part in _parts(stack) if steps[group] else ():
                for step in steps[group]:
                    step(stack[part], part)
        return {group: stack.unflatten(0, (-1, len(key.index))) for group, stack in stacks.items()}

    def sizes(self) -> dict[str, tuple[int, ImageSize]]:
        """group -> (number of views, size in pixels)."""
        return {group: (settings["count"], self._pixels(settings)) for group, settings in self.augmentation.items()}

    def _pixels(self, settings: dict) -> ImageSize:
        sides = height_width(self.image_size)
        return image_size_of([max(1, round(settings["size"] * side / self.multiple)) * self.multiple for side in sides])

    def _geometry(self, key: Key, height: Tensor, width: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """group -> (V·B, 4) boxes and (V·B,) whether to flip, of images of these heights and widths (B,)."""
        groups = self.augmentation.items()
        keys = key.stacked({g: _prefixes(_SAME_CROPS.get(g, g), settings) for g, settings in groups}, _PLACE)
        geometry = {}
        for group, settings in groups:
            own, count = keys[group], settings["count"]
            rows, columns = height_width(self._pixels(settings))
            sides = height.repeat(count), width.repeat(count)  # (V·B,) each
            boxes = crop_boxes(own, "crop", *sides, settings["scale"], settings["ratio"], columns / rows)
            geometry[group] = boxes, own.chance("flip", 0.0 if "flip" in self.dropped else settings["flip"])
        return geometry

    def _photometric(self, key: Key, crops: dict[str, Tensor]) -> dict[str, list[_Step]]:
        """group -> everything after crop and flip, which commutes with the flip. crops: group -> (V·B, C, h, w)."""
        steps: dict[str, list[_Step]] = {group: [] for group in self.augmentation}
        prefixes = {g: _prefixes(g, s) for g, s in self.augmentation.items() if _wanted(s) - {"flip", *self.dropped}}
        if prefixes:
            for group, own in key.stacked(prefixes, _COLOURS).items():
                steps[group] = self._steps(self.augmentation[group], own, min(crops[group].shape[-2:]))
        return steps

    def _steps(self, settings: dict, key: StackedKey, side: int) -> list[_Step]:
        """What is done to one group. side: the crops' shorter side in pixels."""
        steps = [self._jitter(settings, key), self._grayscale(settings, key)]
        if settings["grayscale_first"]:
            steps.reverse()
        steps += [self._blur(settings, key, side), self._solarize(settings, key)]
        return [step for step in steps if step is not None]

    # Each of the following draws an operation's parameters for all views of the whole batch, and returns what applies it, in
    # place, to the crops that lie at some rows of V·B; None where there is nothing to do.

    def _jitter(self, settings: dict, key: StackedKey) -> _Step | None:
        jitter = settings["jitter"]
        names = [n for n in colour.JITTER if n not in self.dropped and jitter[n] > 0]
        if not names or not _at_least_once(jitter["probability"]):
            return None
        factors = {}
        for operation in names:
            strength = jitter[operation] * jitter["strength"]
            low, high = (-strength, strength) if operation == "hue" else (max(0.0, 1 - strength), 1 + strength)
            factors[operation] = key.between(operation, low, high)
        order, chosen = key.permutation("order", len(names)), _chance(key, "jitter", jitter["probability"], settings)
        return colour.Jitter(factors, order, chosen).apply_

    def _grayscale(self, settings: dict, key: StackedKey) -> _Step | None:
        return self._where("grayscale", settings["grayscale"], settings, key, colour.grayscale)

    def _blur(self, settings: dict, key: StackedKey, side: int) -> _Step | None:
        operation = functools.partial(gaussian_blur, size=kernel_size(side))
        sigma = key.between("sigma", *settings["blur"]["sigma"])
        return self._where("blur", settings["blur"]["probability"], settings, key, operation, sigma)

    def _solarize(self, settings: dict, key: StackedKey) -> _Step | None:
        operation = functools.partial(colour.solarize, threshold=settings["solarize"]["threshold"])
        return self._where("solarize", settings["solarize"]["probability"], settings, key, operation)

    def _where(
        self, what: str, probability: Any, settings: dict, key: StackedKey, operation: Callable, *values: Tensor
    ) -> _Step | None:
        """An operation that is done to some of the crops, with values (V·B,) of each crop's own."""
        if what in self.dropped or not _at_least_once(probability):
            return None
        chosen = _chance(key, what, probability, settings)
        return lambda crops, rows: colour.change_(crops, chosen[rows], operation, *(value[rows] for value in values))


def _chance(key: StackedKey, name: str, probability: float | list[float], settings: dict) -> Tensor:
    """(V·B,) bool. probability: of all views, or a list with one entry a view (BYOL's asymmetric pair)."""
    if not isinstance(probability, list):
        return key.chance(name, probability)
    views = key.uniform(name).chunk(settings["count"])  # (B,) each
    return torch.cat([numbers < probability[view] for view, numbers in enumerate(views)])


def _parts_of_views(rows: slice, images: Tensor, crops: Tensor) -> Iterator[slice]:
    """Parts of V·B crops, those of the images at `rows`: on a CPU view by view, on a GPU, where `rows` are all, together."""
    if not waiting.may_look(crops):
        # Between its two passes a crop has its own width, and its image's height.
        yield from _parts(crops, least=math.prod(images.shape[1:3]) * crops.shape[-1])
        return
    for first in range(0, len(crops), len(images)):
        yield slice(first + rows.start, first + rows.stop)


def _parts(images: Tensor, least: int = 0) -> Iterator[slice]:
    """Parts of a batch that go through all operations before the next one is looked at: on a CPU what fits in its cache, on
    a GPU as much as leaves room in its memory. least: as how many values an image counts that has fewer."""
    size = max(least, images[0].numel())
    on_cpu = 1 if size > _LARGE else _PART // size
    length = on_cpu if waiting.may_look(images) else max(1, _PART_OF_GPU // size)
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
