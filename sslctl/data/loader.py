"""From a source to batches of views: an index into memory where the samples fit, worker processes where they do not."""

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslctl import distributed
from sslctl.data import files
from sslctl.data.batch import Batch
from sslctl.data.sampler import batch_indices
from sslctl.data.sources import Source
from sslctl.data.workers import fetching, ignore_signals, raise_if_error
from sslctl.ops.timing import Clock
from sslctl.transfer import to_device
from sslctl.views import Key, ViewMaker
from sslctl.views.maker import resize_and_crop

_READ_AHEAD = 64  # files that threads read while as many images are used


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
    """Yields the batches of steps first_step … total_steps - 1, the same for any number of workers. Close it when done.

    batch_size: G, of the global batch; a process gets its own B rows of it.
    """
    size = len(source)
    steps_per_epoch = size // batch_size
    if source.in_memory is not None:
        samples, labels = _near_device(source, device)  # (N, C, H, W) uint8 or (N, L) int64, and (N,) or (N, C)
        for step in range(first_step, total_steps):
            # Which samples: this process's rows of the step's block of the epoch's order.
            rows = torch.from_numpy(_own_rows(step, size, batch_size, seed))  # (B,) int64
            index = to_device(rows, device)
            # An index where the samples lie, then the device; a GPU is not waited for.
            batch, label = (t[rows] if t.device == rows.device else t[index] for t in (samples, labels))
            batch, label = to_device(batch, device), to_device(label, device)  # (B, …), (B,) or (B, C)
            key = Key(seed, step // steps_per_epoch, index)
            clock.lap("data")
            # Crop, flip, colour, blur: all of them on the device, by the key's random numbers.
            groups = source.modality.views_of(batch, views, key)  # group -> (V, B, …)
            clock.lap("views")
            yield Batch(groups, label, index, key, host_index=rows)
        return
    # Workers decode each file once and cut out all its crops; what is left is done to whole batches on the device.
    loader = DataLoader(
        _Crops(source, views, seed),
        batch_sampler=_StepSampler(size, batch_size, seed, first_step, total_steps),
        num_workers=workers,
        collate_fn=_leave_as_is,
        generator=torch.Generator(),  # else every iter() draws from the global one
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
    )
    with fetching(loader) as fetched:
        for step, (crops, rows) in enumerate(fetched, start=first_step):
            index = to_device(rows, device)  # (B,)
            key = Key(seed, step // steps_per_epoch, index)
            crops = {group: to_device(crop, device) for group, crop in crops.items()}  # (V, B, C, h, w) uint8
            label = to_device(source.answers[rows], device)  # (B,) or (B, C)
            clock.lap("data")
            groups = source.modality.finish(crops, views, key)  # group -> (V, B, C, h, w) in [0, 1]
            clock.lap("views")
            yield Batch(groups, label, index, key, host_index=rows)


def one_batch(source: Source, views: ViewMaker, rows: Tensor, seed: int, device: torch.device) -> Batch:
    """Returns the samples at `rows` (B,) as an epoch 0 would show them, whatever batch they would be in."""
    key = Key(seed, 0, rows.to(device))
    if source.in_memory is not None:
        groups = source.modality.views_of(source.in_memory[rows].to(device), views, key)
    else:
        crops, _ = raise_if_error(_Crops(source, views, seed).__getitems__([(0, row) for row in rows.tolist()]))
        groups = source.modality.finish({group: crop.to(device) for group, crop in crops.items()}, views, key)
    return Batch(groups, source.answers[rows].to(device), key.index, key, host_index=rows)


def drawn_views(source: Source, views: ViewMaker, rows: Tensor, epochs: int, seed: int) -> Iterator[Tensor]:
    """Yields the global views of the images at `rows` in epochs 0, 1, …: (b, epochs · V, C, h, w) in [0, 1], a few images at
    a time, each decoded once."""
    for part in rows.split(_Crops.TOGETHER):
        images = None if source.images is not None else [source.read(row) for row in part.tolist()]
        groups_by_epoch = []
        for epoch in range(epochs):
            key = Key(seed, epoch, part)
            groups_by_epoch.append(
                views(source.images[part], key) if images is None else views.finish(views.cut(images, key), key)
            )
        yield torch.cat([groups["global"] for groups in groups_by_epoch]).transpose(0, 1)


def _near_device(source: Source, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns a source's samples and labels: on a GPU, where they take at most half of what is free there."""
    samples, labels = source.in_memory, source.answers
    if device.type != "cuda" or samples.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return samples, labels
    return samples.to(device), labels.to(device)


def _own_rows(step: int, size: int, batch_size: int, seed: int) -> np.ndarray:
    """Returns the samples (B,) of a step's global batch that this process takes."""
    return batch_indices(step, size, batch_size, seed)[distributed.local_rows(batch_size)]


def clean_batches(
    source: Source, rows: np.ndarray | Tensor, *, resize: int | None, batch_size: int, workers: int
) -> Iterator[Tensor]:
    """Yields the images at `rows`, in that order, as (B, C, S, S) uint8 without augmentation; of texts, (B, L) int64.

    Raises ImageError for the first that cannot be read.
    """
    reading = {"resize": resize, "batch_size": batch_size, "workers": workers}
    with contextlib.closing(readable_batches(source, rows, **reading)) as batches:
        for images, unread in batches:
            for error in unread.values():
                raise error
            yield images


def readable_batches(
    source: Source, rows: np.ndarray | Tensor, *, resize: int | None, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, dict[int, files.ImageError]]]:
    """Yields what `clean_batches` does of the images that can be read, and place in the batch -> error of those that cannot."""
    rows = torch.as_tensor(rows)
    if source.in_memory is not None:
        for part in rows.split(batch_size):
            batch = source.in_memory[part]
            if not source.all_of_one_size:
                batch = torch.stack([resize_and_crop(image, source.image_size, resize) for image in batch])
            yield batch, {}
        return
    if not workers:
        yield from _by_threads(_CleanImages(source, rows, resize), min(batch_size, _READ_AHEAD))
        return
    loader = DataLoader(
        _CleanImages(source, rows, resize),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_stack,
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
    )
    with fetching(loader) as fetched:
        yield from fetched


def _by_threads(images: "_CleanImages", batch_size: int) -> Iterator[tuple[Tensor, dict[int, files.ImageError]]]:
    """Yields batches in order, each read by threads while the one before it is used: decoders release the interpreter."""
    pool, waiting = ThreadPoolExecutor(torch.get_num_threads()), deque()
    try:
        for start in range(0, len(images), batch_size):
            part = range(start, min(start + batch_size, len(images)))
            waiting.append([pool.submit(images.__getitem__, position) for position in part])
            if len(waiting) > 1:
                yield _stack([reading.result() for reading in waiting.popleft()])
        while waiting:
            yield _stack([reading.result() for reading in waiting.popleft()])
    finally:
        pool.shutdown(cancel_futures=True)


class _StepSampler:
    """Batch sampler: yields for each step the (epoch, row) pairs that it takes."""

    def __init__(self, size: int, batch_size: int, seed: int, first_step: int, total_steps: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.steps = range(first_step, total_steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            epoch = step // (self.size // self.batch_size)
            yield [(epoch, row) for row in _own_rows(step, self.size, self.batch_size, self.seed).tolist()]


class _Crops(Dataset):
    """A batch's crops: every image is decoded once and cut for all views."""

    TOGETHER = 16  # images held decoded at a time; their boxes are calculated together

    def __init__(self, source: Source, views: ViewMaker, seed: int):
        self.source, self.views, self.seed = source, views, seed

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[dict[str, Tensor], Tensor] | files.ImageError:
        """(epoch, row) pairs -> group -> (V, B · images of a sample, C, h, w) uint8, and the rows (B,)."""
        epoch, rows = items[0][0], [row for _, row in items]
        parts = []
        try:
            for start in range(0, len(rows), self.TOGETHER):
                part = rows[start : start + self.TOGETHER]
                samples = [self.source.sample(row, Key(self.seed, epoch, torch.tensor([row]))) for row in part]
                # The images of one sample have its row, and by it the same crop.
                index = torch.tensor([row for row, images in zip(part, samples, strict=True) for _ in images])
                parts.append(
                    self.views.cut([image for images in samples for image in images], Key(self.seed, epoch, index))
                )
        except files.ImageError as error:
            return error
        return {group: torch.cat([part[group] for part in parts], 1) for group in parts[0]}, torch.tensor(rows)


class _CleanImages(Dataset):
    """Images without augmentation, (C, H, W) uint8 each: the shorter side to `resize` pixels, then the central part."""

    def __init__(self, source: Source, rows: Tensor, resize: int):
        self.source, self.rows, self.resize = source, rows, resize

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Tensor | files.ImageError:
        try:
            return resize_and_crop(self.source.read(int(self.rows[position])), self.source.image_size, self.resize)
        except files.ImageError as error:
            return error


def _leave_as_is(batch):
    """Collates nothing: `__getitems__` returned a batch."""
    return batch


def _stack(images: list[Tensor | files.ImageError]) -> tuple[Tensor, dict[int, files.ImageError]]:
    """[(C, S, S)] -> (B, C, S, S) of those that could be read, and place -> error of the others."""
    unread = {place: image for place, image in enumerate(images) if isinstance(image, files.ImageError)}
    read = [image for place, image in enumerate(images) if place not in unread]
    return torch.stack(read) if read else torch.empty(0), unread
