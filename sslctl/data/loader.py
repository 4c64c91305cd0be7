"""From a source to batches of views: an index into memory where the images fit, worker processes where they do not."""

import contextlib
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslctl import distributed
from sslctl.clock import Clock
from sslctl.data import files
from sslctl.data.batch import Batch
from sslctl.data.sampler import batch_indices
from sslctl.data.sources import Source
from sslctl.views import Key, ViewMaker
from sslctl.views.maker import resize_and_crop


def batches(
    source: Source,
    views: ViewMaker,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    total_steps: int,
    workers: int,
    device: torch.device,
    clock: Clock,
) -> Iterator[Batch]:
    """The batches of steps first_step … total_steps - 1, the same for any number of workers. Close it when done.

    batch_size: of the global batch; a process gets its own rows of it.
    """
    size = len(source)
    steps_per_epoch = size // batch_size
    if source.images is not None:
        images, labels = _near(source, device)
        for step in range(first_step, total_steps):
            rows = torch.from_numpy(_own_indices(step, size, batch_size, seed))
            index = _moved(rows, device)
            taken, label = (t[rows] if t.device == rows.device else t[index] for t in (images, labels))
            taken, label = _moved(taken, device), _moved(label, device)
            key = Key(seed, step // steps_per_epoch, index)
            clock.lap("data")
            made = views(taken, key)
            clock.lap("views")
            yield Batch(made, label, index, key)
        return
    steps = _Steps(size, batch_size, seed, first_step, total_steps)
    loader = DataLoader(
        _Cuts(source, views, seed),
        batch_sampler=steps,
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else every iter() draws from the global one
        worker_init_fn=_start_worker,
        pin_memory=device.type == "cuda",
    )
    with _fetched(loader) as fetched:
        for step, (crops, rows) in enumerate(fetched, start=first_step):
            index = _moved(rows, device)
            key = Key(seed, step // steps_per_epoch, index)
            crops = {group: _moved(cut, device) for group, cut in crops.items()}
            label = _moved(source.labels[rows], device)
            clock.lap("data")
            made = views.finish(crops, key)
            clock.lap("views")
            yield Batch(made, label, index, key)


def _near(source: Source, device: torch.device) -> tuple[Tensor, Tensor]:
    """A source's images and labels: on a GPU, where they take at most half of what is free there."""
    if device.type != "cuda" or source.images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return source.images, source.labels
    return source.images.to(device), source.labels.to(device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; a GPU is not waited for."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def _own_indices(step: int, size: int, batch_size: int, seed: int) -> np.ndarray:
    """The images of a step's global batch that this process takes."""
    return batch_indices(step, size, batch_size, seed)[distributed.local_rows(batch_size)]


def clean_batches(
    source: Source, rows: np.ndarray | Tensor, *, resize: int, batch_size: int, workers: int
) -> Iterator[Tensor]:
    """The images at `rows`, in that order, as (B, C, S, S) uint8 without augmentation."""
    rows = torch.as_tensor(rows)
    if source.images is not None:
        for part in rows.split(batch_size):
            images = source.images[part]
            if images.shape[2:] != (source.image_size, source.image_size):
                images = torch.stack([resize_and_crop(image, source.image_size, resize) for image in images])
            yield images
        return
    loader = DataLoader(
        _Clean(source, rows, resize),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_stack,
        generator=torch.Generator(),
        worker_init_fn=_start_worker,
    )
    with _fetched(loader) as fetched:
        yield from fetched


@contextlib.contextmanager
def _fetched(loader: DataLoader) -> Iterator[Iterator]:
    """What a loader fetches; its workers end with the block.

    They ignore SIGTERM, so that an exception which keeps the iterator alive would leave the interpreter waiting for
    them at its exit. torch has no public way to end them.
    """
    iterator = iter(loader)
    try:
        yield map(_raised, iterator)
    finally:
        if loader.num_workers:
            iterator._shutdown_workers()


class _Steps:
    """Batch sampler: for each step, the (epoch, image) pairs it takes."""

    def __init__(self, size: int, batch_size: int, seed: int, first_step: int, total_steps: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.steps = range(first_step, total_steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            epoch = step // (self.size // self.batch_size)
            yield [(epoch, row) for row in _own_indices(step, self.size, self.batch_size, self.seed).tolist()]


class _Cuts(Dataset):
    """A batch's crops: every image is decoded once and cut for all views."""

    TOGETHER = 16  # images held decoded at a time; their boxes are calculated together

    def __init__(self, source: Source, views: ViewMaker, seed: int):
        self.source, self.views, self.seed = source, views, seed

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[dict[str, Tensor], Tensor] | files.ImageError:
        """(epoch, image) pairs -> group -> (V, B, C, h, w) uint8, and the images (B,)."""
        epoch, rows = items[0][0], [row for _, row in items]
        parts = []
        try:
            for start in range(0, len(rows), self.TOGETHER):
                part = rows[start : start + self.TOGETHER]
                parts.append(
                    self.views.cut([self.source.read(row) for row in part], Key(self.seed, epoch, torch.tensor(part)))
                )
        except files.ImageError as error:
            return error
        return {group: torch.cat([part[group] for part in parts], 1) for group in parts[0]}, torch.tensor(rows)


class _Clean(Dataset):
    def __init__(self, source: Source, rows: Tensor, resize: int):
        self.source, self.rows, self.resize = source, rows, resize

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Tensor | files.ImageError:
        try:
            return resize_and_crop(self.source.read(int(self.rows[position])), self.source.image_size, self.resize)
        except files.ImageError as error:
            return error


# A bad image comes out of a worker as a value: raised there, torch would wrap its one line in a traceback.


def _first_error(items: list) -> files.ImageError | None:
    return next((item for item in items if isinstance(item, files.ImageError)), None)


def _raised(batch):
    """A batch, unless it is an error."""
    if isinstance(batch, files.ImageError):
        raise batch
    return batch


def _as_it_is(batch):
    """What `__getitems__` returned."""
    return batch


def _stack(images: list[Tensor]) -> Tensor | files.ImageError:
    """[(C, S, S)] -> (B, C, S, S)."""
    return _first_error(images) or torch.stack(images)


def _start_worker(worker: int) -> None:
    """Signals are the main process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
