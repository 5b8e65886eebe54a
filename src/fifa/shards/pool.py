"""Executors: whoever runs a step over its shards, on this machine or (`fifa.shards.ray`) on many.

A step is made once in every worker, called with shard after shard, and writes each table where
the ledger finds it. A worker that dies takes nothing with it but the shard under its hands.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from fifa.errors import FifaError
from fifa.shards.store import Store

Shard = TypeVar("Shard")
Keyed = tuple[str, Any]  # a key that names the shard's content, and the shard


class Step(Protocol):
    """What is done to a shard, in two halves: what may run ahead, and the rest."""

    def begin(self, shard: Any) -> Any:
        """Start reading the shard, in threads; returns at once."""

    def finish(self, begun: Any) -> pa.Table:
        """The table of the shard that `begin` was given. Never called twice at a time."""


Make = Callable[[], Step]


class Executor(Protocol):
    """Anything that can run a step over shards: the seam between the local pool and Ray."""

    def map(self, make: Make, shards: Iterable[Keyed], store: Store) -> Iterator[str]:
        """Run a step over shards and keep every table in ``store``.

        Parameters
        ----------
        make
            Makes the step, once in every worker. It travels to other processes.
        shards
            What is left to do; taken a few at a time, so that an iterator keeps memory flat.
        store
            Every worker must be able to reach it.

        Yields
        ------
        str
            The key of a shard as soon as its table is kept; in any order.
        """

    def close(self) -> None:
        """Let the workers go."""


class Worker:
    """A step, in the process or actor that was made for it."""

    def __init__(self, make: Make) -> None:
        self.step = make()
        self._turn = threading.Lock()

    def run(self, keyed: Keyed, store: Store) -> str:
        """Do a shard and return its key; two threads may call: one reads, one computes."""
        key, shard = keyed
        begun = self.step.begin(shard)
        with self._turn:
            store.write(key, self.step.finish(begun))
        return key


class LocalPool:
    """This machine.

    Parameters
    ----------
    processes
        0 runs everything in this process, the next shard's images decoded while this one's are
        scored: right for one device, as decoding runs in threads. N starts N processes, each with
        a step and a share of the cores; they stay until the step is another or `close`.
    """

    def __init__(self, processes: int = 0) -> None:
        self.processes = processes
        self._make: Make | None = None
        self._pool: ProcessPoolExecutor | None = None

    def map(self, make: Make, shards: Iterable[Keyed], store: Store) -> Iterator[str]:
        """Run a step over shards; see `Executor.map`."""
        if self.processes:
            return self._in_processes(make, shards, store)
        return self._here(make, shards, store)

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def _here(self, make: Make, shards: Iterable[Keyed], store: Store) -> Iterator[str]:
        step: Step | None = None
        ready: tuple[str, Any] | None = None
        for following in shards:
            step = step or make()
            begun = following[0], step.begin(following[1])
            if ready is not None:
                yield _finish(step, ready, store)
            ready = begun
        if step is not None and ready is not None:
            yield _finish(step, ready, store)

    def _in_processes(self, make: Make, shards: Iterable[Keyed], store: Store) -> Iterator[str]:
        waiting = iter(shards)
        lost: list[Keyed] = []
        progressed = True
        while progressed:
            progressed = False
            running: dict[Future[str], Keyed] = {}
            try:
                while True:
                    for keyed in _next(lost, waiting, 2 * self.processes - len(running)):
                        running[self._processes(make).submit(_run, keyed, store)] = keyed
                    if not running:
                        return
                    for job in wait(running, return_when=FIRST_COMPLETED).done:
                        key = job.result()
                        del running[job]
                        progressed = True
                        yield key
            except BrokenProcessPool:
                lost += running.values()
                self.close()
        raise FifaError(
            "worker processes keep dying before they finish a shard",
            do="most likely memory ran out: use fewer processes or a smaller batch; "
            "the next run goes on from here",
        )

    def _processes(self, make: Make) -> ProcessPoolExecutor:
        if self._pool is None or self._make is not make:
            self.close()
            self._make = make
            self._pool = ProcessPoolExecutor(
                self.processes,
                multiprocessing.get_context("spawn"),  # forks of a process with threads may hang
                initializer=_start,
                initargs=(max(1, cores() // self.processes), make),
            )
        return self._pool


def run_shards(
    executor: Executor,
    make: Make,
    keys: Sequence[str],
    shard: Callable[[int], Any],
    store: Store,
    done: Callable[[str], None] = lambda key: None,
) -> Iterator[pa.Table]:
    """Run a step over every shard that is not finished yet; then read all tables, in order.

    Parameters
    ----------
    executor, make, store
        As `Executor.map` takes them.
    keys
        A key a shard, which names its content and everything its table depends on.
    shard
        Makes shard i, when it is needed.
    done
        Called with the key of every finished shard (for a progress bar).
    """
    store.sweep()
    there = store.keys()
    for key in there.intersection(keys):
        done(key)
    left = [i for i, key in enumerate(keys) if key not in there]
    for key in executor.map(make, ((keys[i], shard(i)) for i in left), store):
        done(key)
    return (store.read(key) for key in keys)


def cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _next(lost: list[Keyed], waiting: Iterator[Keyed], most: int) -> list[Keyed]:
    """Up to ``most`` shards: first (and taken out) those that a dead worker had."""
    again, lost[:] = lost[:most], lost[most:]
    return again + list(islice(waiting, max(0, most - len(again))))


def _finish(step: Step, begun: tuple[str, Any], store: Store) -> str:
    store.write(begun[0], step.finish(begun[1]))
    return begun[0]


_worker: Worker | None = None


def _start(threads: int, make: Make) -> None:
    """Prepare a worker process: its share of the cores, then its step."""
    global _worker
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:  # it came along with ``make`` and has read the variable already
        sys.modules["torch"].set_num_threads(threads)
    _worker = Worker(make)


def _run(keyed: Keyed, store: Store) -> str:
    assert _worker is not None, "_start comes first"
    return _worker.run(keyed, store)
