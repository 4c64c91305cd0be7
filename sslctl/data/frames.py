"""Videos: folders of frames, or files where PyAV is installed. A sample is a few frames of one video, in order."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sslctl.data import files
from sslctl.data.held_out import held_out_names
from sslctl.data.listing import EXTENSIONS, existing_folder
from sslctl.data.modality import VIDEOS, Modality
from sslctl.data.pixels import Reading
from sslctl.data.sources import Source
from sslctl.errors import InputError, reason_of
from sslctl.ops.special_files import refuse_special
from sslctl.random import Key
from sslctl.runs.file_list import FileList

_FILES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class Videos(Source):
    """paths: a folder or a file each. counts: frames of each. frames: of a sample. window: frames it is drawn from; 0: all."""

    counts: tuple[int, ...] = ()
    frames: int = 0
    window: int = 0
    modality: ClassVar[Modality] = VIDEOS
    per_sample: ClassVar[tuple[str, ...]] = (*Source.per_sample, "counts")

    def summary(self) -> str:
        size = self.image_size
        inside = f" of {self.window} in a row" if self.window else ""
        return f"{len(self):,} videos, {self.frames} frames{inside} of {self.channels}×{size}×{size} a sample"

    @property
    def all_of_one_size(self) -> bool:
        """Tells whether the first video's frames have the backbone's size; others are cropped to it."""
        return self.read(0).shape[1:] == (self.image_size, self.image_size)

    def read(self, index: int) -> Tensor:
        """Reads the frame in the middle (C, H, W) uint8: what frozen features are evaluated on."""
        return read_frames(self.paths[index], [self.counts[index] // 2], self.channels)[0]

    def sample(self, index: int, key: Key) -> list[Tensor]:
        """Reads frames in the order of time: one from each of as many equal parts of the window. key: of this one sample."""
        return read_frames(self.paths[index], self.places(index, key).tolist(), self.channels)

    def places(self, index: int, key: Key) -> Tensor:
        """Returns the numbers (T,) of the frames of a sample, ascending."""
        count = self.counts[index]
        window = min(self.window or count, count)
        first = (key.uniform("frames/window")[0] * (count - window + 1)).long()
        edges = torch.arange(self.frames + 1) * window // self.frames  # each part has a frame at least
        within = (key.uniform("frames/place", self.frames)[0] * edges.diff()).long()
        return first + edges[:-1] + within


def frames(
    split: str, root: str | None, image_size: int | None, channels: int, frames: int, window_frames: int | None = None
) -> Videos:
    """Reads root/<video>/<frame>.png or root/<video>.mp4, without labels; root/<class>/<video>… with, in train/ and test/ or not.

    A file is decoded from its beginning for every sample, also where the window lies at its end: long films are faster as
    folders of frames.
    """
    if not root:
        raise InputError(
            "dataset.root is not set: dataset.root=/path/to/videos, with a folder of frames for each video"
        )
    if channels not in (1, 3):
        raise InputError(f"dataset.channels={channels}: expected 1 or 3")
    if window_frames is not None and window_frames < frames:
        raise InputError(f"dataset.window_frames={window_frames}: a sample takes dataset.frames={frames} of them")
    # Which videos: those of the split's folder, or of the split by the hash of their names.
    base = existing_folder(root)
    has_splits = (base / "train").is_dir()
    folder = base / split if has_splits else base
    names = sorted(_video_names(folder))
    if not names:
        raise InputError(f"no videos in {base}: expected folders of frames, or files ending in {' '.join(_FILES)}")
    depths = {name.count("/") for name in names}
    if depths - {0, 1} or len(depths) > 1:
        deep = next(name for name in names if name.count("/") == max(depths))
        raise InputError(f"{base}: expected <video>/ or <class>/<video>/ throughout, found {deep}")
    labelled = depths == {1}
    if not labelled and split == "test":
        raise InputError(f"{base} has no labels to evaluate on: put the videos into a folder for each class")
    if labelled and not has_splits:
        is_test = held_out_names(names, [[name.partition("/")[0]] for name in names])
        names = [name for name, test in zip(names, is_test, strict=True) if test == (split == "test")]
        if not names:
            raise InputError(f"{base}: too few videos for a {split} split of a fifth; make train/ and test/ folders")
    paths = [os.path.join(folder, name) for name in names]
    counts = [count_frames(path) for path in paths]
    short = next((i for i, count in enumerate(counts) if count < frames), None)
    if short is not None:
        raise InputError(
            f"{paths[short]} has {counts[short]} frame{'s' * (counts[short] != 1)}, a sample takes {frames}"
        )
    # Labels are numbers of the training split's class folders.
    top = base / "train" if has_splits else base
    classes = tuple(sorted(d.name for d in top.iterdir() if d.is_dir())) if labelled else ()
    number = {name: i for i, name in enumerate(classes)}
    unknown = next((name for name in names if labelled and name.split("/")[0] not in number), None)
    if unknown:
        raise InputError(f"{folder}: class folder {unknown.split('/')[0]} does not exist in {top}")
    labels = torch.tensor([number[name.split("/")[0]] if labelled else -1 for name in names])
    if image_size is None:
        height, width = _first_frame(paths[0], channels).shape[1:]
        image_size = height if height == width <= 96 else 224
    sizes = tuple(map(_size, paths))
    listing = "\n".join(f"{name}\t{size}" for name, size in zip(names, sizes, strict=True))
    digest = hashlib.blake2b(listing.encode(), digest_size=16).hexdigest()
    own = {"counts": tuple(counts), "frames": frames, "window": window_frames or 0}
    own |= {"file_list": FileList(tuple(names), sizes, are_rows=False)}
    return Videos(base.name, split, None, tuple(paths), labels, classes, channels, image_size, digest, **own)


def _video_names(base: Path) -> list[str]:
    """Returns video files, and folders that hold images, as relative POSIX paths."""
    names = []
    for directory, below, entries in os.walk(base):
        below.sort()
        place = Path(directory).relative_to(base).as_posix()
        if place != "." and any(entry.lower().endswith(EXTENSIONS) for entry in entries):
            names.append(place)
        names += [(Path(place) / entry).as_posix() for entry in entries if entry.lower().endswith(_FILES)]
    return names


def _frame_files(path: str) -> list[str]:
    names = (os.path.join(path, name) for name in os.listdir(path) if name.lower().endswith(EXTENSIONS))
    return sorted(names, key=lambda name: (len(name), name))  # 2.png before 10.png


def _size(path: str) -> int:
    """Returns the bytes of a video's files."""
    return sum(map(os.path.getsize, _frame_files(path))) if os.path.isdir(path) else os.path.getsize(path)


def count_frames(path: str) -> int:
    """Counts the frames of a folder or a video file. Raises InputError with the path."""
    if os.path.isdir(path):
        return len(_frame_files(path))
    av = _av(path)
    try:
        refuse_special(path)
        with av.open(path) as container:
            stream = container.streams.video[0]
            return stream.frames or sum(1 for _ in container.decode(stream))
    except (av.FFmpegError, IndexError, OSError) as error:
        raise InputError(f"cannot read {path}: {reason_of(error)}") from error


def read_frames(path: str, positions: list[int], channels: int) -> list[Tensor]:
    """Reads the frames at ascending positions, (C, H, W) uint8 each. Raises files.ImageError with the path."""
    if os.path.isdir(path):
        names = _frame_files(path)
        return [files.read(names[position], Reading(channels)) for position in positions]
    av, frames = _av(path), []
    try:
        refuse_special(path)
        with av.open(path) as container:
            for position, frame in enumerate(container.decode(video=0)):
                if position == positions[len(frames)]:
                    pixels = frame.to_ndarray(format="gray" if channels == 1 else "rgb24")
                    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
                    frames.append(tensor[None] if channels == 1 else tensor.permute(2, 0, 1))
                    if len(frames) == len(positions):
                        return frames
    except (av.FFmpegError, IndexError, OSError) as error:
        raise files.ImageError(f"cannot read {path}: {reason_of(error)}") from error
    raise files.ImageError(f"cannot read {path}: it ends before frame {positions[len(frames)]}")


def _first_frame(path: str, channels: int) -> Tensor:
    try:
        return read_frames(path, [0], channels)[0]
    except files.ImageError as error:
        raise InputError(str(error)) from error


def _av(path: str):
    """Imports PyAV; raises InputError where it is not installed."""
    try:
        import av
    except ImportError:
        raise InputError(f"{path}: video files need PyAV: pip install 'sslctl[video]', or folders of frames") from None
    return av
