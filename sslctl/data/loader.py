"""From a source to batches of views: an index into memory where the images fit, worker processes where they do not."""

import contextlib
import signal
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
from sslctl.ops.timing import Clock
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
    """The batches of steps first_step … total_steps - 1, the same for any number of workers. Close it when done.

    batch_size: of the global batch; a process gets its own rows of it.
    """
    size = len(source)
    steps_per_epoch = size // batch_size
    if source.gives == "tokens":
        for step in range(first_step, total_steps):
            rows = torch.from_numpy(_own_indices(step, size, batch_size, seed))
            index = _moved(rows, device)
            made = {"tokens": _moved(source.tokens[rows], device)[None]}
            clock.lap("data")
            yield Batch(made, _moved(source.labels[rows], device), index, Key(seed, step // steps_per_epoch, index))
        return
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
            made = _finished(source, views, crops, key)
            clock.lap("views")
            yield Batch(made, label, index, key)


def one_batch(source: Source, views: ViewMaker, rows: Tensor, seed: int, device: torch.device) -> Batch:
    """The samples at `rows` as an epoch 0 would show them, whatever batch they would be in."""
    key = Key(seed, 0, rows.to(device))
    if source.gives == "tokens":
        made = {"tokens": source.tokens[rows].to(device)[None]}
    elif source.images is not None:
        made = views(source.images[rows].to(device), key)
    else:
        crops, _ = _raised(_Cuts(source, views, seed).__getitems__([(0, row) for row in rows.tolist()]))
        made = _finished(source, views, {group: cut.to(device) for group, cut in crops.items()}, key)
    return Batch(made, source.labels[rows].to(device), key.index, key)


def drawn_views(source: Source, views: ViewMaker, rows: Tensor, epochs: int, seed: int) -> Iterator[Tensor]:
    """The global views of the images at `rows` in epochs 0, 1, …: (b, epochs · V, C, h, w) in [0, 1], a few images at a
    time, each decoded once."""
    for part in rows.split(_Cuts.TOGETHER):
        images = None if source.images is not None else [source.read(row) for row in part.tolist()]
        made = []
        for epoch in range(epochs):
            key = Key(seed, epoch, part)
            made.append(
                views(source.images[part], key) if images is None else views.finish(views.cut(images, key), key)
            )
        yield torch.cat([groups["global"] for groups in made]).transpose(0, 1)


def _finished(source: Source, views: ViewMaker, crops: dict[str, Tensor], key: Key) -> dict[str, Tensor]:
    """What follows the workers' cuts: of frames, one view (1, B, T, C, h, w), all T of a sample treated alike."""
    if source.gives != "frames":
        return views.finish(crops, key)
    made = views.finish(crops, key.of(key.index.repeat_interleave(source.frames)))
    return {"frames": made["global"].unflatten(1, (-1, source.frames))}


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
    """The images at `rows`, in that order, as (B, C, S, S) uint8 without augmentation; of texts, (B, L) int64."""
    rows = torch.as_tensor(rows)
    if source.gives == "tokens":
        yield from (source.tokens[part] for part in rows.split(batch_size))
        return
    if source.images is not None:
        for part in rows.split(batch_size):
            images = source.images[part]
            if images.shape[2:] != (source.image_size, source.image_size):
                images = torch.stack([resize_and_crop(image, source.image_size, resize) for image in images])
            yield images
        return
    if not workers:
        yield from _by_threads(_Clean(source, rows, resize), min(batch_size, _READ_AHEAD))
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


def _by_threads(images: "_Clean", batch_size: int) -> Iterator[Tensor]:
    """Batches in order, each read by threads while the one before it is used: decoders let go of the interpreter."""
    pool, waiting = ThreadPoolExecutor(torch.get_num_threads()), deque()
    try:
        for start in range(0, len(images), batch_size):
            part = range(start, min(start + batch_size, len(images)))
            waiting.append([pool.submit(images.__getitem__, position) for position in part])
            if len(waiting) > 1:
                yield _raised(_stack([reading.result() for reading in waiting.popleft()]))
        while waiting:
            yield _raised(_stack([reading.result() for reading in waiting.popleft()]))
    finally:
        pool.shutdown(cancel_futures=True)


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
        """(epoch, image) pairs -> group -> (V, B · images of a sample, C, h, w) uint8, and the samples (B,)."""
        epoch, rows = items[0][0], [row for _, row in items]
        parts = []
        try:
            for start in range(0, len(rows), self.TOGETHER):
                part = rows[start : start + self.TOGETHER]
                samples = [self.source.sample(row, Key(self.seed, epoch, torch.tensor([row]))) for row in part]
                index = torch.tensor([row for row, images in zip(part, samples, strict=True) for _ in images])
                parts.append(
                    self.views.cut([image for images in samples for image in images], Key(self.seed, epoch, index))
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
