"""The executor that a recipe names."""

from __future__ import annotations

from fifa.shards.pool import Executor, LocalPool


def make_executor(name: str, actors: int, num_cpus: float, num_gpus: float) -> Executor:
    """``local``, ``local:N``, ``ray`` or ``ray://HEAD:10001``; the rest is for Ray's actors."""
    kind, _, processes = name.partition(":")
    if kind == "local":
        return LocalPool(int(processes or 0))
    from fifa.shards.ray import RayPool

    return RayPool(actors, num_cpus, num_gpus, name if processes else None)
