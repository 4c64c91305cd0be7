"""The C library's allocator, told to keep what tensors free."""

import ctypes
import functools
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_KEPT = 32 << 20  # bytes; glibc takes no more


@functools.cache
def keep_freed_memory() -> None:
    """Blocks of up to 32 MiB are used again instead of being returned to the system at every free.

    A step frees and asks for the same blocks over and over; each time they come back from the system, every page of
    them faults. Making views takes half the time without that. Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
    libc.mallopt(_TRIM_THRESHOLD, 1 << 30)
