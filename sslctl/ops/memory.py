"""How much memory a device has."""

import os
from pathlib import Path

import torch

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, v2 and v1


def total_memory(device: torch.device) -> int:
    """Returns the bytes of a GPU's memory, or of the machine's that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [Path(name).read_text().strip() for name in _LIMITS if Path(name).is_file()]
    return min([machine, *(int(limit) for limit in limits if limit.isdigit())])


def in_gib(count: int) -> str:
    """Writes a number of bytes in GiB, of less than a tenth in MiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"
