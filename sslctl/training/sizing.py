"""What an adaptation chooses by the images, the network and the machine: size, batch, epochs; each a word that can be typed."""

import contextlib

import torch
from torch import Tensor

from sslctl import distributed
from sslctl.data.sources import Source
from sslctl.ops.image_size import height_width
from sslctl.ops.memory import in_gib, total_memory
from sslctl.training.dry_run import measure_steps
from sslctl.training.plan import choose_device, fitting_batch
from sslctl.training.setup import Setup

SIDES = {"cpu": 128, "mps": 160, "cuda": 224}  # pixels of images that are larger: what a step can be made of there
SMALL = 96  # squares up to this size keep their own
LOOKS = 6  # online evaluations of a run, at most, after the first
_LEAST_BATCH = 16  # images: memory that holds no more is said to be too little


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
    height, width = height_width(source.image_size)
    return width, height


def choose_batch(images: int, most: int) -> tuple[int, str]:
    """Returns the images of a batch, and why. most: the recipe's."""
    fitting = fitting_batch(images)
    if fitting >= most:
        return most, "the recipe's"
    return fitting, f"{images:,} images fill it four times, the recipe's {most} less often"


def fit_memory(batch: int, needed: int, device: torch.device) -> tuple[int, str | None]:
    """Returns the batch, halved as often as it takes until what a step keeps for its backward fits half of the memory, and why.

    needed: bytes that the whole batch keeps. None where it fits as it is.
    """
    room, fitting = total_memory(device) / 2, batch
    while fitting > _LEAST_BATCH and needed * fitting / batch > room:
        fitting //= 2
    if fitting == batch:
        return batch, None
    return (
        fitting,
        f"{batch} images keep {in_gib(needed)} for a step's backward, half of {device}'s memory is {in_gib(room)}",
    )


def kept_bytes(setup: Setup) -> int:
    """Returns what a step of the whole batch keeps for its backward, by the forward of some sixteen images of it."""
    plan, method, kept = setup.plan, setup.method, {}
    parts = max(n for n in range(1, max(1, plan.batch_size // 16) + 1) if plan.batch_size % n == 0)
    own = {p.untyped_storage().data_ptr() for p in method.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()  # none of them is freed while the graph is there
        return tensor

    with contextlib.closing(setup.batches(0)) as feed, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = method(next(feed).split(parts)[0], method.schedules(0))
    del output
    return parts * sum(size for place, size in kept.items() if place not in own)


def choose_epochs(minutes: float, seconds: float, steps_per_epoch: int, look: float = 0.0) -> int:
    """Returns how many whole epochs fit a time, with the online evaluations that a run of so many has; one at least.

    seconds: of a step. look: seconds of an online evaluation, 0 where there is none.
    """
    time, epoch = (
        60 * minutes - look,
        seconds * steps_per_epoch,
    )  # the first evaluation is of the weights as they are given
    with_every_look = int((time - LOOKS * look) // epoch)
    return max(1, with_every_look if with_every_look >= LOOKS else min(LOOKS, int(time // (epoch + look))))


def epochs_between_looks(epochs: int) -> int:
    """Returns every how many epochs a run of so many is looked at: LOOKS times at most."""
    return -(-epochs // LOOKS)


def time_step(setup: Setup, processes: int) -> tuple[float, int]:
    """Returns the seconds that a step takes here, in so many processes, and the steps of an epoch.

    They are those of the middle of a run: in its first ones parts may be frozen, which take less. Processes on the CPU share its
    cores: they are faster than one by no more than one has left idle.
    """
    plan, times = setup.plan, processes
    seconds, _ = measure_steps(setup, plan.total_steps // 2)
    if plan.device.type == "cpu":
        cores = max(distributed.default_threads(), plan.threads)
        times = min(processes * plan.threads, cores) / plan.threads
    return seconds / times, plan.steps_per_epoch
