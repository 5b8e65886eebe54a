"""Ray: the same step over the same shards, on the accelerators of a cluster.

Actors on Ray Core hold a model each and write the same files as the local pool. Ray Data is not
used: on a small cluster its actor pool can take every processor and starve its own reader.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fifa.errors import FifaError, brief
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Keyed, Make, Worker

IN_FLIGHT = 2  # shards an actor: one is read and decoded while the other is scored
RETRIES = 20  # of one shard: each time that its actor is lost, or not back yet


class Actor:
    """A process of the cluster, which does one step after the other."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._step: Any = None
        self._worker: Worker | None = None

    def run(self, step: list[Any], keyed: Keyed, ledger: Ledger) -> str:
        """As `Worker.run`; the reference to what makes the step comes in a list, unopened."""
        import ray

        with self._turn:
            if self._worker is None or self._step != step[0]:
                self._worker = None
                _forget()
                self._worker, self._step = Worker(ray.get(step[0])), step[0]
            worker = self._worker
        return worker.run(keyed, ledger)


def _forget() -> None:
    """Give back the memory of the models of the step before."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


@dataclass
class RayPool:
    """Actors on a Ray cluster.

    Parameters
    ----------
    workers
        Actors, a model each.
    num_cpus, num_gpus
        What an actor takes; fractions share. Decoding threads are `Compute.workers`.
    address
        ``auto`` for the cluster this machine is part of, ``ray://HEAD:10001`` from outside, None
        for the cluster in use or a new one on this machine.
    restarts
        How often an actor whose process or machine was lost is made again; -1 is always.
    init
        Further arguments of `ray.init`, such as ``runtime_env``.
    store
        As in `fifa.shards.pool.Executor`.
    """

    workers: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    address: str | None = None
    restarts: int = -1
    init: dict[str, Any] = field(default_factory=dict)
    store: str | None = None
    is_here: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._make: Make | None = None
        self._there: Any = None  # `_make` in the cluster's object store
        self._actors: list[Any] = []

    def map(self, make: Make, shards: Iterable[Keyed], ledger: Ledger) -> Iterator[str]:
        """Run a step over shards; see `fifa.shards.pool.Executor.map`.

        The actors stay until `close`, with what they have loaded until the step is another.

        Raises `FifaError` where Ray is missing or cannot be reached, where the actors ask for
        more than the cluster has, and where a shard fails.
        """
        ray = self._connected()
        from ray.util import ActorPool

        def run(actor: Any, keyed: Keyed) -> Any:
            return actor.run.remote([self._there], keyed, ledger)

        pool: Any = None
        try:
            for keyed in shards:
                # An actor stands in the pool as often as it may have shards in flight.
                pool = pool or ActorPool(self._workers(ray, make) * IN_FLIGHT)
                if not pool.has_free():
                    yield pool.get_next_unordered()
                pool.submit(run, keyed)
            while pool is not None and pool.has_next():
                yield pool.get_next_unordered()
        except ray.exceptions.RayTaskError as error:
            self.close()
            if isinstance(error.cause, FifaError):
                raise error.cause from error
            raise
        except ray.exceptions.RayActorError as error:
            self.close()
            raise FifaError(
                f"workers on the cluster keep dying: {str(error).splitlines()[0]}",
                do="look at their logs (`ray logs`); most likely memory ran out. "
                "The next run continues from here",
            ) from error

    def close(self) -> None:
        """End the actors; the cluster stays."""
        if self._actors:
            import ray

            for actor in self._actors:
                ray.kill(actor)
        self._actors, self._there = [], None

    def _workers(self, ray: Any, make: Make) -> list[Any]:
        if not self._actors:
            self._check_resources(ray)
            kind = ray.remote(Actor).options(
                num_cpus=self.num_cpus,
                num_gpus=self.num_gpus,
                max_concurrency=IN_FLIGHT,
                max_restarts=self.restarts,
                max_task_retries=RETRIES,
            )
            self._actors = [kind.remote() for _ in range(self.workers)]
        if self._make != make or self._there is None:
            # once to every machine: what a step brings along may be large
            self._make, self._there = make, ray.put(make)
        return self._actors

    def _connected(self) -> Any:
        try:
            import ray
        except ImportError as error:
            raise FifaError("Ray is not installed", do="pip install 'fifa-align[ray]'") from error
        if not ray.is_initialized():
            try:
                ray.init(address=self.address, **self.init)
            except (ConnectionError, RuntimeError) as error:
                where = self.address or "a new cluster on this machine"
                raise FifaError(
                    f"cannot reach the Ray cluster: {brief(error)}",
                    where=where,
                    do="check the address, the port and (`ray get-auth-token`) the token",
                ) from error
        return ray

    def _check_resources(self, ray: Any) -> None:
        """An actor that fits nowhere would wait for ever."""
        for name, wanted in (("CPU", self.num_cpus), ("GPU", self.num_gpus)):
            there = ray.cluster_resources().get(name, 0)
            if wanted * self.workers > there:
                raise FifaError(
                    f"{self.workers} workers ask for {wanted * self.workers:g} {name}s, "
                    f"the cluster has {there:g}",
                    do=f"fewer workers, or fractions of a {name} each",
                )
