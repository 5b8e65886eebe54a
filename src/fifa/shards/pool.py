"""Executors: whoever runs a step over its shards, on this machine or (`fifa.shards.ray`) on many.

A step is made once in every worker, called with shard after shard, and writes each table where
the ledger finds it. A worker that dies takes nothing with it but the shard under its hands.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol, TypeGuard

import pyarrow as pa

from fifa.console import collect_facts, echo, note, progress
from fifa.errors import FifaError
from fifa.shards.ledger import Ledger
from fifa.shards.sealed import DamagedError

NOTES = b"fifa.notes"  # in the metadata of a shard's table
DEATHS = 3  # deaths of worker processes in a row, without a finished shard between them

Keyed = tuple[str, Any]  # the key of a shard, and what the step is given


class Shard(NamedTuple):
    """A part of a step's work.

    Parameters
    ----------
    key
        Names its content and everything its table depends on, so that a finished file is never
        taken for another's.
    size
        In the unit of the progress bar.
    value
        What the step is given.
    """

    key: str
    size: int
    value: Any


class Step(Protocol):
    """What is done to a shard, in two halves: what may run ahead, and the rest."""

    def begin(self, shard: Any) -> Any:
        """Start reading the shard, in threads; returns at once."""

    def finish(self, begun: Any) -> pa.Table | Callable[[], pa.Table]:
        """The table of the shard that `begin` was given. Never called twice at a time.

        Or what waits for a device that is still at work and then gives the table: called from
        another thread, while the next shard is finished.
        """


Make = Callable[[], Step]


class Executor(Protocol):
    """Anything that can run a step over shards: the seam between the local pool and Ray."""

    @property
    def store(self) -> str | None:
        """A folder or URL where every worker can write shards; None: beside what they become."""

    @property
    def is_here(self) -> bool:
        """Whether this process does the work, so that nothing has to travel."""

    def map(self, make: Make, shards: Iterable[Keyed], ledger: Ledger) -> Iterator[str]:
        """Run a step over shards and keep every table in ``ledger``.

        Parameters
        ----------
        make
            Makes the step, once in every worker. It travels to other processes. Workers that
            have made it, or one that is equal to it, keep what they have loaded.
        shards
            What is left to do; taken a few at a time, so that an iterator keeps memory flat.
        ledger
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

    def run(self, keyed: Keyed, ledger: Ledger) -> str:
        """Do a shard and return its key; two threads may call: one reads, one computes."""
        key, shard = keyed
        begun = self.step.begin(shard)
        with self._turn:
            finished = self.step.finish(begun)
        return _keep(key, finished, ledger)


class LocalPool:
    """This machine.

    Parameters
    ----------
    processes
        0 runs everything in this process, the next shard's images decoded while this one's are
        scored and the one before is written: right for one device. N starts N processes, each with
        a step and a share of the cores; they stay until the step is another or `close`.
    store
        As in `Executor`.
    """

    def __init__(self, processes: int = 0, store: str | None = None) -> None:
        self.processes, self.store = processes, store
        self._make: Make | None = None
        self._pool: ProcessPoolExecutor | None = None

    @property
    def is_here(self) -> bool:
        """Whether there are no processes of its own."""
        return not self.processes

    def map(self, make: Make, shards: Iterable[Keyed], ledger: Ledger) -> Iterator[str]:
        """Run a step over shards; see `Executor.map`."""
        if self.is_here:
            return self._here(make, shards, ledger)
        return self._in_processes(make, shards, ledger)

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def _here(self, make: Make, shards: Iterable[Keyed], ledger: Ledger) -> Iterator[str]:
        step: Step | None = None
        ready: list[tuple[str, Any]] = []
        with ThreadPoolExecutor(1) as keeper:
            kept: Future[str] | None = None  # the shard before, while this one is computed
            for keyed in chain(shards, [None]):
                if keyed is not None:
                    step = step or make()
                    ready.append((keyed[0], step.begin(keyed[1])))
                if step is not None and (keyed is None or len(ready) > 1):
                    key, begun = ready.pop(0)
                    finished = step.finish(begun)
                    if kept is not None:
                        yield kept.result()
                    kept = keeper.submit(_keep, key, finished, ledger)
            if kept is not None:
                yield kept.result()

    def _in_processes(self, make: Make, shards: Iterable[Keyed], ledger: Ledger) -> Iterator[str]:
        waiting = iter(shards)
        deaths = 0  # since a shard was last finished: the first may come before any is
        while deaths < DEATHS:
            taken: dict[str, Keyed] = {}  # and not finished
            running: set[Future[str]] = set()
            try:
                while True:
                    for keyed in islice(waiting, 2 * self.processes - len(running)):
                        taken[keyed[0]] = keyed
                        running.add(self._processes(make).submit(_run, keyed, ledger))
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for job in done:
                        key = job.result()
                        del taken[key]
                        deaths = 0
                        yield key
            except BrokenProcessPool:
                deaths += 1
                waiting = chain(list(taken.values()), waiting)
                self.close()
        raise FifaError(
            "worker processes keep dying before they finish a shard",
            do="most likely memory ran out: use fewer processes or a smaller batch; "
            "the next run continues from here",
        )

    def _processes(self, make: Make) -> ProcessPoolExecutor:
        if self._pool is None or self._make != make:
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
    what: str,
    make: Make,
    shards: Sequence[Shard],
    ledger: Ledger,
    executor: Executor | None = None,
    prepare: Callable[[Any], Any] = lambda value: value,
) -> Iterator[pa.Table]:
    """Run a step over every shard that is not finished yet; then read all tables, in order.

    Parameters
    ----------
    what
        For the progress bar.
    make
        As `Executor.map` takes it.
    shards
        All of them; their keys differ.
    ledger
        Where finished ones are kept: `Ledger.forget` them once what they are for is written.
    executor
        Who runs the step; by default this process.
    prepare
        Makes of a shard's value what the step is given, when it is needed.
    """
    ledger.sweep()
    finished = ledger.keys()
    size = {shard.key: shard.size for shard in shards}
    left = ((s.key, prepare(s.value)) for s in shards if s.key not in finished)
    done = sum(size[key] for key in finished & size.keys())
    with progress(what, sum(size.values()), done) as advance:
        for key in (executor or LocalPool()).map(make, left, ledger):
            advance(size[key])

    def read(shard: Shard) -> pa.Table:
        try:
            return ledger.read(shard.key)
        except DamagedError as error:
            echo(f"{error.where} is damaged: made again")
        for _ in (executor or LocalPool()).map(make, [(shard.key, prepare(shard.value))], ledger):
            pass
        return ledger.read(shard.key)

    return map(read, shards)


def each_shard(
    what: str,
    function: Callable[[Any], pa.Table],
    shards: Sequence[Shard],
    ledger: Ledger,
    executor: Executor | None = None,
    prepare: Callable[[Any], Any] = lambda value: value,
) -> Iterator[pa.Table]:
    """The tables that ``function`` makes of every shard's ``value``, in order.

    As `run_shards`, for a step of one function that needs nothing read ahead. ``function`` travels
    to the executor's workers, once to each; those that have the same, or one that is equal to it,
    keep it. Where ``ledger`` is in memory, they could not reach it: then this process does the
    work.
    """
    if ledger.place is None:
        executor = None
    make = _Function(function)
    return map(_noted, run_shards(what, make, shards, ledger, executor, prepare))


def map_shards(what: str, function: Callable[[Any], pa.Table], *options: Any) -> pa.Table:
    """The tables of `each_shard`, joined."""
    return pa.concat_tables(each_shard(what, function, *options))


def store_of(executor: Executor | None) -> str | None:
    """Where its workers can write shards; None: beside what they become."""
    return None if executor is None else executor.store


def is_elsewhere(executor: Executor | None, ledger: Ledger) -> TypeGuard[Executor]:
    """Whether others than this process work, and can reach the ledger."""
    return executor is not None and not executor.is_here and ledger.place is not None


def cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep(key: str, finished: pa.Table | Callable[[], pa.Table], ledger: Ledger) -> str:
    ledger.write(key, finished() if callable(finished) else finished)
    return key


@dataclass(frozen=True)
class _Function:
    """A step that is a function of the whole shard, and what makes it."""

    function: Callable[[Any], pa.Table]

    def __call__(self) -> _Function:
        return self

    def begin(self, shard: Any) -> Any:
        return shard

    def finish(self, shard: Any) -> pa.Table:
        """What the function notes goes with the table: it may run on another machine."""
        with collect_facts() as facts:
            table = self.function(shard)
        told = {**(table.schema.metadata or {}), NOTES: json.dumps(facts)}
        return table.replace_schema_metadata(told)


def _noted(table: pa.Table) -> pa.Table:
    told = dict(table.schema.metadata or {})
    note(**json.loads(told.pop(NOTES, b"{}")))  # shards of an earlier version have none
    return table.replace_schema_metadata(told)


_worker: Worker | None = None


def _start(threads: int, make: Make) -> None:
    """Prepare a worker process: its share of the cores, then its step."""
    global _worker
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:  # it came along with ``make`` and has read the variable already
        sys.modules["torch"].set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(make)


def _end_with_parent() -> None:
    """End this process once the one that started it is gone, however that went.

    A shard may take minutes, whose result nobody waits for, while the next run does it again.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only pools start workers"
    parent.join()
    os._exit(1)


def _run(keyed: Keyed, ledger: Ledger) -> str:
    assert _worker is not None, "_start comes first"
    return _worker.run(keyed, ledger)
