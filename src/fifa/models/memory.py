"""What memory there is, and how much of it was taken."""

from __future__ import annotations

import gc
import sys
from typing import Any

from fifa.models.optional import require


def peak_bytes(device: Any) -> int:
    """The most memory taken so far: of a CUDA device, elsewhere of the process."""
    if device.type == "cuda":
        return int(require("torch").cuda.max_memory_allocated(device))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: Any) -> int | None:
    """The memory that is free on a device; None where that is not known."""
    if device.type == "cuda":
        free, _ = require("torch").cuda.mem_get_info(device)
        return int(free)
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def release_memory() -> None:
    """Give back what is no longer used: Python's objects first, then what CUDA keeps of them."""
    gc.collect()
    torch = require("torch")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
