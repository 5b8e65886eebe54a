"""The executor that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from fifa.shards.mirror import shards_place
from fifa.shards.pool import Executor, LocalPool


class Named(Protocol):
    """What names an executor: `fifa.config.Compute`."""

    @property
    def executor(self) -> str:
        """``local``, ``local:N``, ``ray`` or ``ray://HEAD:10001``."""

    @property
    def actors(self) -> int:
        """On Ray: how many workers."""

    @property
    def num_cpus(self) -> float:
        """On Ray: of each."""

    @property
    def num_gpus(self) -> float:
        """On Ray: of each."""

    @property
    def store(self) -> str | None:
        """See `Executor.store`."""


@contextmanager
def executor_of(compute: Named) -> Iterator[Executor]:
    """The executor, whose workers go when the block ends.

    Where this process writes into an object store and none is named, actors keep shards there.
    """
    kind, _, processes = compute.executor.partition(":")
    executor: Executor
    if kind == "local":
        executor = LocalPool(int(processes or 0), compute.store)
    else:
        from fifa.shards.ray import RayPool

        address = compute.executor if processes else None
        resources = (compute.actors, compute.num_cpus, compute.num_gpus)
        executor = RayPool(*resources, address, store=compute.store or shards_place())
    try:
        yield executor
    finally:
        executor.close()
