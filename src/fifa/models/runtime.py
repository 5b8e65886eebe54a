"""Where and how a model computes: device, precision, memory format, compiler, memory."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fifa.console import echo
from fifa.errors import FifaError
from fifa.models.optional import require

if TYPE_CHECKING:
    from torch import Tensor as Tensor
else:
    Tensor = Any  # a name for annotations: torch is optional

DTYPES = ("float32", "bfloat16", "float16")
# Of the memory that a process may have, what it fills when it looks for a batch that fits. The rest
# is for what grows later: the allocator's gaps, other shapes, another process's context.
SHARE = 0.8

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """How to compute. Only ``precision`` changes a reward by more than rounding.

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
        module = module.eval().requires_grad_(False)
        if self.dtype != "float32":
            # once, what autocast would do at every pass: the same numbers, half the memory
            for part in module.modules():
                if isinstance(part, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
                    part.to(getattr(torch, self.dtype))
        module = module.to(self.device)
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

    @property
    def precision(self) -> str:
        """What names the arithmetic in a fingerprint: ``dtype``, or ``tf32`` (see `tf32`)."""
        cuda = self.device.partition(":")[0] == "cuda"
        return "tf32" if cuda and self.dtype == "float32" else self.dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model runs: in ``float32`` only `tf32` on CUDA."""
        torch = require("torch")
        if self.dtype == "float32":
            return tf32(self.device)
        context: AbstractContextManager[Any] = torch.autocast(
            torch.device(self.device).type, dtype=getattr(torch, self.dtype)
        )
        return context


def pinned(tensor: Tensor, device: Any) -> Tensor:
    """``tensor`` in memory that a CUDA device can copy from while it computes; else as it is.

    As it is also where no more memory can be pinned: the copy is then waited for.
    """
    if require("torch").device(device).type != "cuda":
        return tensor
    try:
        copy: Tensor = tensor.pin_memory()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return tensor
    return copy


def read_back(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy ``tensor`` to the CPU; what is returned waits for it and gives the copy.

    The device goes on meanwhile with what it was given since.
    """
    if tensor.device.type != "cuda":
        on_cpu: Callable[[], Tensor] = tensor.cpu
        return on_cpu
    torch = require("torch")
    copy: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait


@contextmanager
def tf32(device: Any) -> Iterator[None]:
    """Matrix products of float32 in TF32 on CUDA, while the block lasts; elsewhere nothing.

    TF32 has float32's range and 10 bits of mantissa, and is several times as fast. Convolutions
    are allowed to use it by torch's own default.
    """
    torch = require("torch")
    if torch.device(device).type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def make_runtime(
    device: str | None = None,
    dtype: str | None = None,
    compile: bool | str = False,
    channels_last: bool = False,
) -> Runtime:
    """A `Runtime`: by default (or for ``auto``) on the fastest device, in its `best_dtype`.

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
    return Runtime(device, dtype or best_dtype(device), compile, channels_last)


def best_device() -> str:
    """The fastest torch device of this machine: ``cuda``, ``mps`` or ``cpu``."""
    torch = require("torch")
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: Any) -> str:
    """The fastest precision that models bear: ``bfloat16`` where CUDA has it, else ``float32``."""
    torch = require("torch")
    if torch.device(device).type != "cuda":
        return "float32"
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


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
    """The memory that this process may still take on a device; None where that is not known.

    On CUDA what torch keeps for later counts as free, and a fraction that the process was limited
    to (``torch.cuda.set_per_process_memory_fraction``) is respected.
    """
    if device.type == "cuda":
        cuda = require("torch").cuda
        free, total = cuda.mem_get_info(device)
        reserved, allocated = cuda.memory_reserved(device), cuda.memory_allocated(device)
        number = cuda.current_device() if device.index is None else device.index
        allowed = cuda.get_per_process_memory_fraction(number) * total - reserved
        return int(max(0, min(free, allowed)) + reserved - allocated)
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


class Parts:
    """Runs functions over rows, some at a time; fewer from then on once memory has run out.

    Parameters
    ----------
    what
        What a row is, for messages: ``image``, ``prompt``.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._share = 1.0  # of a part; halves when memory runs out

    def run(self, function: Callable[[slice], T], n: int, most: int) -> Iterator[T]:
        """What ``function`` makes of rows 0 to ``n``, at most ``most`` of them at a time.

        Raises `FifaError` where memory does not suffice for a single row.
        """
        start = 0
        while start < n:
            stop = min(n, start + self.size(most))
            try:
                found = function(slice(start, stop))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if stop - start == 1:
                    raise FifaError(
                        f"out of memory with a single {self.what}",
                        do="a device with more memory, or --dtype bfloat16",
                    ) from error
                self._share = (stop - start) // 2 / most
            else:
                start = stop
                yield found
                continue
            # only now: the error kept what the attempt had allocated
            release_memory()
            echo(f"out of memory: {self.size(most):,} {self.what}s at a time from here on")

    def size(self, most: int) -> int:
        """How many rows go together now, where ``most`` did at first."""
        return max(1, int(most * self._share))


def largest_batch(
    attempt: Callable[[int], object],
    sizes: Sequence[int],
    device: Any,
    *,
    reserved: int = 0,
    share: float = SHARE,
) -> int:
    """The largest batch with which no more than a share of the memory is taken; 0 for none.

    Found by trying. The two smallest tell what a row takes, and the largest that should fit then
    is tried itself, as every try costs a second or more.

    Parameters
    ----------
    attempt
        Computes with a batch of that size, and keeps nothing of it.
    sizes
        Those that are of use, ascending.
    device
        A CUDA device.
    reserved
        Bytes that are to stay free beside it.
    share
        Of the memory that this process may have.
    """
    cuda = require("torch").cuda
    release_memory()
    held = cuda.memory_allocated(device)
    budget = share * (free_bytes(device) + held) - held - reserved

    def taken(size: int) -> float:
        """Bytes at the peak beyond what was held before; infinite where memory ran out."""
        cuda.reset_peak_memory_stats(device)
        fits = True
        try:
            attempt(size)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            fits = False
        # only now: the error kept what the attempt had allocated
        release_memory()
        return float(cuda.max_memory_allocated(device) - held) if fits else float("inf")

    known = {0: 0.0}  # bytes of the sizes that fit
    left, failed = list(sizes), False
    while left:
        size, bytes_of = max(known.items())
        wanted = left[0]
        if len(known) > 2:
            before = max(n for n in known if n < size)
            a_row = max(1.0, (bytes_of - known[before]) / (size - before))
            expected = [n for n in left if bytes_of + (n - size) * a_row <= budget]
            if not expected:
                break
            wanted = expected[len(expected) // 2 if failed else -1]
        found = taken(wanted)
        if found <= budget:
            known[wanted] = found
            left = [n for n in left if n > wanted]
        else:
            left, failed = [n for n in left if n < wanted], True
    return max(known)


def even_batches(whole: int) -> list[int]:
    """The sizes of all `even_batch` of ``whole``, ascending."""
    return sorted({even_batch(whole, n) for n in range(1, whole + 1)})


def even_batch(whole: int, largest: int) -> int:
    """The size of equal parts of ``whole``, of at most ``largest`` each: as few as possible."""
    # 32 of at most 20 are 2 parts of 16, not 20 and 12
    return -(-whole // -(-whole // largest))
