"""Keeps freed memory of a training step for the next one, on a CPU under Linux.

PyTorch has no caching allocator for CPUs. glibc hands every block above 32 MB back to the system when it is freed, so
each step faults the same pages in anew; on the wide maps of a mobile network that takes longer than an activation
does. `tools/bench/alpha_step.py --no-keep-pages` shows the difference.
"""

__all__ = ["kept_pages"]

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameter numbers and default values of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULT_TRIM_BYTES, _DEFAULT_MMAPS = 128 * 1024, 65536
_LARGEST_INT = 2**31 - 1


@contextmanager
def kept_pages(device_type: str) -> Iterator[bool]:
    """Lets freed blocks stay with the process inside the context; afterwards gives them back.

    Args:
        device_type: Where the training runs; elsewhere than on "cpu" nothing is done.

    Yields:
        Whether the allocator could be told so: it must be glibc's.
    """
    glibc = _glibc() if device_type == "cpu" else None
    if glibc is None:
        yield False
        return
    done = bool(glibc.mallopt(_MMAP_MAX, 0)) and bool(glibc.mallopt(_TRIM_THRESHOLD, _LARGEST_INT))
    try:
        yield done
    finally:
        glibc.mallopt(_MMAP_MAX, _DEFAULT_MMAPS)
        glibc.mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM_BYTES)
        glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc and no other allocator took its place."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None
