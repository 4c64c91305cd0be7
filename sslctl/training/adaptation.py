"""What an adaptation chooses by the images, the network and the machine: size, batch, epochs; each a word that can be typed."""

from typing import Any

from sslctl.data.sources import Source
from sslctl.errors import say
from sslctl.training.beginning import begin
from sslctl.training.dry_run import measure_steps
from sslctl.training.plan import choose_device, fitting_batch
from sslctl.training.setup import set_up

SIDES = {"cpu": 128, "mps": 160, "cuda": 224}  # pixels of images that are larger: what a step can be made of there
SMALL = 96  # squares up to this size keep their own


def choose_size(source: Source, device: str, patch: int) -> tuple[int, str]:
    """Returns the side in pixels that images are trained at, and why. patch: of a vision transformer; 1 of others."""
    width, height = _most_common_size(source)
    if width == height <= SMALL:
        return source.image_size, f"most images have {width}×{height} pixels"
    kind = choose_device(device).type
    side = min(SIDES[kind], max(32, min(width, height) // 32 * 32))
    size = max(1, side // patch) * patch
    patches = f", in patches of {patch}" if patch > 1 else ""
    return size, f"most images have {width}×{height} pixels, a {kind} takes {SIDES[kind]} at most{patches}"


def _most_common_size(source: Source) -> tuple[int, int]:
    if source.description is not None and source.description.sizes:
        return source.description.sizes.most_common(1)[0][0]
    if source.images is not None:
        height, width = source.images.shape[-2:]
        return width, height
    return source.image_size, source.image_size


def choose_batch(images: int, most: int) -> tuple[int, str]:
    """Returns the images of a batch, and why. most: the recipe's."""
    fitting = fitting_batch(images)
    if fitting >= most:
        return most, "the recipe's"
    return fitting, f"{images:,} images fill it four times, the recipe's {most} less often"


def choose_epochs(minutes: float, seconds: float, steps_per_epoch: int) -> int:
    """Returns how many whole epochs fit a time, one at least. seconds: of a step."""
    return max(1, int(60 * minutes / (seconds * steps_per_epoch)))


def time_step(config: Any, resolved: dict) -> tuple[float, int]:
    """Returns the seconds that a step of a configuration's run takes here, and its steps an epoch; nothing is written."""
    run = begin(config, resolved).run
    seconds, _ = measure_steps(set_up(config, run))
    seconds /= max(1, config.trainer.processes)
    say(f"  {1000 * seconds:.0f} ms a step, {run.plan.steps_per_epoch} steps an epoch")
    return seconds, run.plan.steps_per_epoch
