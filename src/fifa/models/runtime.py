"""Where and how a model computes: device, precision, memory format, compiler, memory."""

from __future__ import annotations

import gc
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fifa.errors import FifaError
from fifa.models.optional import require

if TYPE_CHECKING:
    from torch import Tensor as Tensor
else:
    Tensor = Any  # a name for annotations: torch is optional

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Runtime:
    """How to compute. Only ``dtype`` changes a reward by more than rounding.

    Parameters
    ----------
    device
        A torch device.
    dtype
        ``float32``, or ``bfloat16`` or ``float16`` under autocast.
    compile
        True for `torch.compile`, or the name of its backend.
    channels_last
        Convolutions with channels last in memory.
    """

    device: str = "cpu"
    dtype: str = "float32"
    compile: bool | str = False
    channels_last: bool = False

    def place(self, module: Any) -> Any:
        """``module`` on the device, for inference, laid out and compiled as asked."""
        torch = require("torch")
        module = module.eval().requires_grad_(False).to(self.device)
        if self.channels_last:
            module = module.to(memory_format=torch.channels_last)
        if self.compile:
            backend = "inductor" if self.compile is True else self.compile
            module = torch.compile(module, backend=backend)
        return module

    def pixels(self, pixels: Tensor) -> Tensor:
        """``pixels`` on the device in the memory format asked for."""
        torch = require("torch")
        there = pixels.to(self.device, non_blocking=True)
        if self.channels_last:
            there = there.contiguous(memory_format=torch.channels_last)
        return there

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model runs; none for ``float32``."""
        torch = require("torch")
        context: AbstractContextManager[Any] = torch.autocast(
            torch.device(self.device).type,
            dtype=getattr(torch, self.dtype),
            enabled=self.dtype != "float32",
        )
        return context


def make_runtime(
    device: str | None = None,
    dtype: str | None = None,
    compile: bool | str = False,
    channels_last: bool = False,
) -> Runtime:
    """A `Runtime`: by default (or for ``auto``) on the fastest device, in ``float32``.

    Raises
    ------
    FifaError
        For an unknown precision or a device that this machine does not have.
    """
    torch = require("torch")
    if dtype is not None and dtype not in DTYPES:
        raise FifaError(f"no such precision: {dtype}", do=", ".join(DTYPES))
    device = best_device() if device in (None, "auto") else str(device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FifaError(f"no such device here: {device}", do="cpu, cuda, cuda:N or mps") from error
    return Runtime(device, dtype or "float32", compile, channels_last)


def best_device() -> str:
    """The fastest torch device of this machine: ``cuda``, ``mps`` or ``cpu``."""
    torch = require("torch")
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def out_of_memory(error: BaseException) -> bool:
    """True for what torch raises when a device, or the machine, has no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("out of memory", "can't allocate memory", "alloc_failed"))


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
