"""Where the time of a training step goes."""

import time
from itertools import pairwise

import torch


class Clock:
    """Time by part. `lap` gives what has passed since the one before to a part; on a GPU it only marks the place, and
    the marks are read, which waits for the GPU, when `split` is asked for."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, torch.cuda.Event]] = []
        self.seconds: dict[str, float] = {}
        self.began = self.last = time.monotonic()

    def lap(self, part: str) -> None:
        """Gives what has passed since the last lap to this part."""
        now = time.monotonic()
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def split(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        if self.marks:
            self.marks[-1][1].synchronize()
            for (_, before), (part, event) in pairwise(self.marks):
                self.seconds[part] = self.seconds.get(part, 0.0) + before.elapsed_time(event) / 1000
            self.marks = self.marks[-1:]
        result, self.seconds = self.seconds, {}
        return result


PARTS = ("data", "views", "forward", "backward", "optimizer", "evaluation", "saving")


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Returns each part's share of the whole, under the names that are logged: time_data, …"""
    whole = sum(seconds.values())
    return {f"time_{part}": seconds[part] / whole for part in PARTS if part in seconds} if whole else {}


def format_shares(seconds: dict[str, float]) -> str:
    """Formats the shares of the whole: 'views 4 %, forward 38 %, …'"""
    whole = sum(seconds.values()) or 1.0
    return ", ".join(f"{part} {100 * seconds[part] / whole:.0f} %" for part in PARTS if part in seconds)
