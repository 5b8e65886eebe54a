"""Who runs the shards of a step."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fifa.config.knobs import Count, Knobs, knobs


@knobs
class Cluster(Knobs):
    """Who runs the shards of a step (`fifa.shards.executors`).

    Parameters
    ----------
    executor
        Where shards run: ``local``, ``local:N`` (N processes), ``ray`` or ``ray://HEAD:10001``.
    actors
        On Ray: the number of actors.
    num_cpus
        On Ray: CPUs per actor.
    num_gpus
        On Ray: GPUs per actor; with a fraction, several actors share a GPU.
    store
        Where unfinished shards are kept: a folder or URL that all workers can read and write; if
        not given, beside what they become.
    """

    executor: Annotated[str, Field(pattern=r"^(local(:\d+)?|ray(://.+)?)$")] = "local"
    actors: Count = 1
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    store: str | None = None
