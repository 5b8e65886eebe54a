"""What memory there is, and how much of it was taken."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fifa.score.wheels import require


def peak_bytes(device: Any) -> int:
    """The most memory taken so far: of a CUDA device, elsewhere of the process."""
    if device.type == "cuda":
        return int(require("torch", "train").cuda.max_memory_allocated(device))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: Any) -> int | None:
    """The memory that is free on a device; None where that cannot be told."""
    if device.type == "cuda":
        free, _ = require("torch", "train").cuda.mem_get_info(device)
        return int(free)
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


# Of glibc's malloc.h. Outside the block: what its thresholds grow to by themselves.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
KEEP = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
USUAL = ((M_MMAP_MAX, 65_536), (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20))


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Have memory that is freed inside the block used again, not given back to the kernel.

    glibc gives large blocks back as soon as they are free, so on a CPU every step's activations
    come as fresh pages, each a fault and to be zeroed: 350,000 faults and a tenth of the time of
    a step of SD1.5 on four pairs at 256 x 256. What was kept is given back at the end. Without
    glibc, nothing happens.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    for option in KEEP:
        libc.mallopt(*option)
    try:
        yield
    finally:
        for option in USUAL:
            libc.mallopt(*option)
        libc.malloc_trim(0)
