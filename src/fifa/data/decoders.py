"""Decoders: a pool of threads that decode images, or of processes, each behind a thread.

Threads are enough for a few cores: Pillow lets others run while it decodes and resizes. On many
cores they stand in line for Python's lock between those steps, and keep whoever launches a model's
kernels waiting for it too. Processes have locks of their own; and what an image does to its
decoder (a crash, no end) costs a process, not the run.

A process is told what to do once. Then it is sent the bytes of some files and answers with what
became of each, through pipes: nothing is left behind wherever it dies. Some, because every message
costs the main process a few turns with Python's lock, which a GPU's kernels are waiting for.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import parent_process
from typing import IO, Any, Generic, TypeVar

from PIL import Image

from fifa.console import echo
from fifa.data.decode import BadImage, open_image
from fifa.shards.pool import cores

R = TypeVar("R")

FEW = 4  # cores: up to so many decode in threads
SPARED = 2  # cores that are left to whoever uses the images
MOST = 32  # processes
PATIENCE = 300.0  # seconds that an image may take, on a machine that does much else; one is enough
TOGETHER = 8  # images, at most, in a message to a process
PIPE = 1 << 20  # bytes that wait in it: what is written is there at once

ALIGNED = 16  # bytes: where a part of a message begins, so that its numbers are aligned

_SIZE = struct.Struct("<Q")
_READY = b"!"

Given = tuple[int, "bytes | BadImage"]
NO_PROCESS = BadImage("cannot be decoded: it may end a process, and none can be started for it")


class Decoders(Generic[R]):
    """Decodes images, and does something with each, ahead of whoever wants the results.

    Parameters
    ----------
    function
        From a completely decoded image (of any mode) and its row to anything. It may raise
        `BadImage`, and what an odd image makes Pillow or numpy raise becomes one.
    workers
        How many; 0 takes a thread a core, or a process for all cores but `SPARED`.
    apart
        In processes of their own; ``function`` has to travel there (`travels`). An image that
        ends two of them, or takes longer than `PATIENCE`, is a `BadImage`.
    least
        As in `fifa.data.decode.open_image`.
    threads
        Threads that are there already, instead of ``workers`` new ones.
    """

    def __init__(
        self,
        function: Callable[[Image.Image, int], R],
        workers: int = 0,
        *,
        apart: bool = False,
        least: int = 0,
        threads: ThreadPoolExecutor | None = None,
    ) -> None:
        self.apart = apart
        self._function, self._least = function, least
        most = min(MOST, max(1, cores() - SPARED)) if apart else cores()
        self.workers = workers or most
        self._threads = threads or ThreadPoolExecutor(self.workers)
        self._own = threading.local()
        self._processes: set[_Process] = set()
        self._end = weakref.finalize(self, _end_all, self._processes)
        self._work = pickle.dumps((function, least, PATIENCE)) if apart else b""

    def together(self, most: int) -> int:
        """How many images are best submitted together, where ``most`` are on the way."""
        return max(1, min(TOGETHER, most // (2 * self.workers))) if self.apart else 1

    def submit(self, images: Sequence[Given]) -> Future[list[tuple[int, R | BadImage]]]:
        """Of each its row, and what ``function`` returned or the reason why there is nothing."""
        return self._threads.submit(self._elsewhere if self.apart else self._here, images)

    def close(self) -> None:
        """Stop; what was not begun is never done."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _here(self, images: Sequence[Given]) -> list[tuple[int, R | BadImage]]:
        return [(row, decode(row, data, self._function, self._least)) for row, data in images]

    def _elsewhere(self, images: Sequence[Given]) -> list[tuple[int, R | BadImage]]:
        suspect = False
        if len(images) > 1:
            try:
                return self._ask(images)
            except _DiedError:
                suspect = True  # one of them, so each is asked for alone
        return [(row, self._alone(row, data, suspect)) for row, data in images]

    def _alone(self, row: int, data: bytes | BadImage, suspect: bool) -> R | BadImage:
        for again in (False, True):  # the first death may have had any reason
            try:
                ((_, found),) = self._ask([(row, data)], suspect or again)
                return found
            except _DiedError as error:
                if error.code == -signal.SIGALRM:
                    return BadImage(f"cannot be decoded: no end after {PATIENCE:g} s")
        return BadImage("cannot be decoded: it ends every process that tries")

    def _ask(
        self, images: Sequence[Given], suspect: bool = False
    ) -> list[tuple[int, R | BadImage]]:
        """What this thread's process makes of images; raises `_DiedError`."""
        process = self._process()
        if process is None:  # what may have ended a process is not let into this one
            return [(row, NO_PROCESS) for row, _ in images] if suspect else self._here(images)
        try:
            found: list[tuple[int, R | BadImage]] = process.ask(images)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            self._own.process = None
            self._processes.discard(process)
            raise _DiedError(process.end()) from error
        return found

    def _process(self) -> _Process | None:
        """This thread's process; None where none can be started."""
        own: _Process | None = getattr(self._own, "process", None)
        if own is None and self._end.alive:
            try:
                own = _Process(self._work)
            except (OSError, EOFError) as error:
                echo(f"decoding in threads, for no process can be started: {error}")
                self.apart = False
            else:
                self._processes.add(own)
                self._own.process = own
        return own


def choose_decoders(
    function: Callable[[Image.Image, int], R],
    workers: int = 0,
    *,
    apart: bool = True,
    least: int = 0,
) -> Decoders[R]:
    """`Decoders` of the kind that is faster here: threads on up to `FEW` cores, then processes.

    Threads as well where ``apart`` is False, in a process that is one of many itself, and for a
    function that cannot travel.
    """
    many = cores() > FEW and parent_process() is None
    return Decoders(function, workers, apart=apart and many and travels(function), least=least)


def travels(function: Any) -> bool:
    """True for a function of a module that other processes can import, or a `partial` of such.

    A method does not: it would take its object along, a model and its weights.
    """
    if isinstance(function, partial):
        inner = (*function.args, *function.keywords.values())
        return travels(function.func) and all(travels(value) for value in inner if callable(value))
    named = inspect.isfunction(function) and "<" not in function.__qualname__
    return named and function.__module__ != "__main__"


def decode(
    row: int, data: bytes | BadImage, function: Callable[[Image.Image, int], R], least: int = 0
) -> R | BadImage:
    """What ``function`` makes of an image, or the reason why there is nothing; never raises."""
    if isinstance(data, BadImage):
        return data
    try:
        with open_image(data, least) as image:
            return function(image, row)
    except BadImage as error:
        return error
    # Whatever else an odd image does to a function is that image's trouble alone.
    except (OSError, ValueError, OverflowError, ZeroDivisionError, SyntaxError) as error:
        return BadImage(f"cannot be preprocessed: {str(error)[:100]}")
    except MemoryError:
        return BadImage("cannot be preprocessed: out of memory")


class _DiedError(Exception):
    """A process has died; ``code`` as `_Process.end` has it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Process:
    """A process that decodes; one thread speaks to it."""

    def __init__(self, work: bytes) -> None:
        alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = os.pathsep.join(filter(None, sys.path))
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
            process_group=0,  # Ctrl-C is the run's: its end is the end of this one
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **alone, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._to, self._from = self._popen.stdin, self._popen.stdout
        for pipe in (self._to, self._from):
            _widen(pipe)
        try:
            self._to.write(work)
            self._to.flush()
            if self._from.read(1) != _READY:
                raise EOFError("it ended at once")
        except BaseException:
            self.end()
            raise

    def ask(self, images: Sequence[Given]) -> Any:
        """What became of images; raises `EOFError` or `OSError` where the process has died."""
        _send(self._to, images)
        return _receive(self._from)

    def end(self) -> int:
        """End it, whatever it is at; its exit code, or minus the signal that had ended it."""
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._to, self._from):
            with contextlib.suppress(OSError):
                pipe.close()
        return self._popen.returncode


def serve() -> None:
    """The life of a process: decode what comes in, until nothing does."""
    coming = sys.stdin.buffer
    going = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    function, least, patience = pickle.load(coming)
    going.write(_READY)
    going.flush()
    with contextlib.suppress(EOFError):
        while True:
            answer = []
            for row, data in _receive(coming):
                # its signal ends this process, in C as well
                signal.setitimer(signal.ITIMER_REAL, patience)
                answer.append((row, decode(row, data, function, least)))
                signal.setitimer(signal.ITIMER_REAL, 0)
            _send(going, answer)


def _send(pipe: IO[bytes], value: Any) -> None:
    """Write a message: how long it is, how many parts it has, how long each is, the parts.

    The first part is a pickle, the others are the buffers of its arrays.
    """
    beside: list[pickle.PickleBuffer] = []
    text = pickle.dumps(value, 5, buffer_callback=beside.append)
    parts: list[Any] = [text, *(buffer.raw() for buffer in beside)]
    head = struct.pack(f"<{len(parts) + 1}Q", len(parts), *map(len, parts))
    padded = [piece for part in (head, *parts) for piece in (part, bytes(-len(part) % ALIGNED))]
    pipe.write(_SIZE.pack(sum(map(len, padded))))
    for piece in padded:
        pipe.write(piece)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    """What `_send` wrote, read as a whole; its arrays lie in what was read."""
    data = memoryview(_exactly(pipe, *_SIZE.unpack(_exactly(pipe, _SIZE.size))))
    (count,) = _SIZE.unpack_from(data)
    sizes = struct.unpack_from(f"<{count}Q", data, _SIZE.size)
    parts, at = [], _SIZE.size * (count + 1)
    for size in sizes:
        at += -at % ALIGNED
        parts.append(data[at : at + size])
        at += size
    return pickle.loads(parts[0], buffers=parts[1:])


def _exactly(pipe: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    if pipe.readinto(data) != size:  # type: ignore[attr-defined]
        raise EOFError("the pipe ended")
    return data


def _widen(pipe: IO[bytes]) -> None:
    """A pipe that takes an answer whole, where the system lets us."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE)


def _end_all(processes: set[_Process]) -> None:
    while processes:
        processes.pop().end()
