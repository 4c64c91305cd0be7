"""Times one SimCLR view, on one thread, against its rivals: python scripts/bench_views.py [--size 32 224] [--rounds N]

32: out of 32 pixels, without blur, batches of 256. 224: out of 256 pixels, with blur, batches of 32. All begin with uint8
images in memory (PIL with its own) and end with a float batch. PIL and v2 work image by image, kornia by batches; kornia's
crop has no antialiasing. Needs `pip install kornia`. Microseconds a view, median of the rounds; all take turns.
"""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import v2

from sslctl.config.command_line import Prepared
from sslctl.config.diagnose import compose_choices
from sslctl.ops.allocator import keep_freed_memory
from sslctl.views import Key, ViewMaker

JITTER = (0.4, 0.4, 0.4, 0.1)  # half of the recipe's, as for small images
CASES = {32: (32, 256), 224: (256, 32)}  # view -> image, batch
BICUBIC = transforms.InterpolationMode.BICUBIC


def table(rounds: list[dict[str, float]], unit: str, base: str, inverse: bool = False) -> str:
    """Median and range of each contender, and of its per-round ratio to `base` (inverse: of `base` to it)."""
    cells = [["", unit, "range", f"{base} / it" if inverse else f"it / {base}", "range"]]
    for name in rounds[0]:
        values = [taken[name] for taken in rounds]
        ratios = [taken[base] / taken[name] if inverse else taken[name] / taken[base] for taken in rounds]
        own = ["", ""] if name == base else _median_and_range(ratios)
        cells.append([name, *_median_and_range(values), *own])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [
        [f"{c:>{w}}" if i else f"{c:<{w}}" for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in cells
    ]
    aligned.insert(1, ["-" * (width - 1) + (":" if i else "-") for i, width in enumerate(widths)])
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def _median_and_range(values: list[float]) -> list[str]:
    form = next(f for limit, f in ((100, ",.0f"), (10, ".1f"), (2, ".2f"), (0, ".3f")) if min(values) >= limit)
    return [f"{statistics.median(values):{form}}", f"{min(values):{form}} to {max(values):{form}}"]


def smooth(count: int, height: int, width: int, seed: int) -> Tensor:
    """(N, 3, H, W) uint8: noise of all scales, the coarse ones stronger and the channels alike, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    images, cells = torch.zeros(count, 3, height, width), 2
    while cells < min(height, width):
        noise = torch.randn(count, 1, cells, cells, generator=generator)
        noise = noise + 0.4 * torch.randn(count, 3, cells, cells, generator=generator)
        images += F.interpolate(noise, (height, width), mode="bicubic") * (2 / cells) ** 0.3
        cells *= 2
    return (128 + 40 * images).round().clamp(0, 255).byte()


def recipe(blur: bool) -> dict:
    """Settings of configs/augmentation/simclr.yaml at half the jitter."""
    settings = OmegaConf.to_container(compose_choices("views", Prepared(), ["augmentation=simclr"]).augmentation)
    settings["global"]["jitter"]["strength"] = 0.5
    settings["global"]["blur"]["probability"] = 0.5 if blur else 0.0
    return settings


class PILBlur:
    """The blur of MoCo's code: Gaussian, sigma in [0.1, 2]."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def pil_pipeline(size: int, blur: bool) -> transforms.Compose:
    """torchvision's transforms on PIL images."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, (0.08, 1.0), interpolation=BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(*JITTER)], p=0.8),
            transforms.RandomGrayscale(0.2),
            *([transforms.RandomApply([PILBlur()], p=0.5)] if blur else []),
            transforms.ToTensor(),
        ]
    )


def v2_pipeline(size: int, blur: bool) -> v2.Compose:
    """torchvision's transforms.v2 on uint8 tensors."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.08, 1.0), interpolation=BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*JITTER)], p=0.8),
            v2.RandomGrayscale(0.2),
            *([v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5)] if blur else []),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def kornia_pipeline(size: int, blur: bool) -> nn.Sequential:
    """kornia's augmentations on a float batch."""
    import kornia.augmentation as K

    return nn.Sequential(
        K.RandomResizedCrop((size, size), (0.08, 1.0), resample="bicubic"),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(*JITTER, p=0.8),
        K.RandomGrayscale(p=0.2),
        *([K.RandomGaussianBlur((23, 23), (0.1, 2.0), p=0.5)] if blur else []),
    )


def contenders(size: int) -> dict[str, Callable[[], Tensor]]:
    """Name -> a function that makes a float batch of views (N, 3, size, size)."""
    side, batch = CASES[size]
    blur = size > 32
    images = smooth(batch, side, side, seed=0)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    maker = ViewMaker(recipe(blur), size, () if blur else ("blur",))
    epochs, index = itertools.count(), torch.arange(batch)
    pil, tensors, kornia = pil_pipeline(size, blur), v2_pipeline(size, blur), kornia_pipeline(size, blur)
    return {
        "sslctl": lambda: maker(images, Key(0, next(epochs), index))["global"].flatten(0, 1),
        "torchvision, PIL": lambda: torch.stack([pil(picture) for picture in pictures]),
        "torchvision v2, tensors": lambda: torch.stack([tensors(image) for image in images]),
        "kornia, batched": lambda: kornia(images.float() / 255),
    }


def microseconds(make: Callable[[], Tensor], seconds: float) -> float:
    """Per view, over at least so many seconds."""
    views, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        views += len(make())
    return 1e6 * spent / views


@torch.no_grad()
def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="at least, of each contender in each round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    for size in args.size:
        makers = contenders(size)
        for make in makers.values():
            microseconds(make, args.seconds / 4)  # warm-up
        rounds = [{name: microseconds(make, args.seconds) for name, make in makers.items()} for _ in range(args.rounds)]
        print(
            f"\n{size} px, {'with' if size > 32 else 'without'} blur\n\n{table(rounds, 'µs a view', 'sslctl')}",
            flush=True,
        )


if __name__ == "__main__":
    main()
