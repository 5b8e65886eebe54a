"""Everything random about a pair, and the order of pairs: functions of the seed, nothing else.

What is drawn for a pair in its d-th presentation depends on (seed, pair, d) only. So neither the
number of processes, nor the size of a micro-batch, nor where a run was interrupted changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Generator, Tensor


@dataclass(frozen=True)
class Draw:
    """What one presentation of a pair draws; time and noise are the same for both images.

    Parameters
    ----------
    no_prompt
        Whether the empty prompt takes the place of the pair's.
    flip
        Whether both images are mirrored.
    time
        A scalar, as the ``draw_time`` of the backbone's schedule gives it.
    noise
        float32 ``[c, h, w]``.
    posterior
        float32 ``[2, c, h, w]``: the noise that samples the VAE's posterior of winner and loser.
    """

    no_prompt: bool
    flip: bool
    time: Tensor
    noise: Tensor
    posterior: Tensor


def seed_of(*parts: Any) -> int:
    """A seed in [0, 2^63) that changes with every part."""
    text = "\x1f".join(str(part) for part in parts)
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


def draw_pair(
    seed: int,
    pair_id: str,
    d: int,
    draw_time: Callable[[Generator], Tensor],
    shape: tuple[int, int, int],
    dropout: float,
    flips: bool = False,
) -> Draw:
    """The ``d``-th draw of a pair, on the CPU.

    Parameters
    ----------
    seed
        The training's.
    pair_id
        The pair's content key.
    d
        The epoch, or the epoch modulo the size of the pool.
    draw_time
        The schedule's.
    shape
        (c, h, w) of the latents.
    dropout
        The probability that the prompt is left out.
    flips
        Whether half of the draws are mirrored.
    """
    generator = torch.Generator().manual_seed(seed_of("draw", seed, pair_id, d))
    # The order of these five lines is part of the format of the reference's scalars.
    no_prompt = bool(torch.rand((), generator=generator) < dropout)
    flip = bool(torch.rand((), generator=generator) < 0.5) and flips
    time = draw_time(generator)
    noise = torch.randn(shape, generator=generator)
    posterior = torch.randn((2, *shape), generator=generator)
    return Draw(no_prompt, flip, time, noise, posterior)


@dataclass(frozen=True)
class Stream:
    """The endless order of pairs: each epoch every pair once, in an order of its own.

    Parameters
    ----------
    pairs
        How many there are.
    batch
        Pairs a step, over all processes.
    seed
        The training's.
    pool
        Draws a pair has; 0: a new one every epoch.
    """

    pairs: int
    batch: int
    seed: int
    pool: int = 0

    def order(self, epoch: int) -> list[int]:
        """All pairs, in the epoch's order."""
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
        order: list[int] = torch.randperm(self.pairs, generator=generator).tolist()
        return order

    def step(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """``(pair, draw)`` of what process ``rank`` of ``world`` presents in ``step`` (from 0).

        Positions ``[step * batch, (step + 1) * batch)`` of the stream, cut into ``world`` slices.
        """
        start = step * self.batch
        first = start + rank * self.batch // world
        last = start + (rank + 1) * self.batch // world
        orders = {
            epoch: self.order(epoch)
            for epoch in range(first // self.pairs, (last - 1) // self.pairs + 1)
        }
        return [
            (orders[i // self.pairs][i % self.pairs], self.draw(i // self.pairs))
            for i in range(first, last)
        ]

    def draw(self, epoch: int) -> int:
        """The number of the draw that a pair gets in ``epoch``."""
        return epoch % self.pool if self.pool else epoch


def micro_batches(
    items: Sequence[tuple[int, int]], shape: Callable[[int], tuple[int, int]], size: int
) -> list[list[tuple[int, int]]]:
    """``items`` of `Stream.step` in parts of at most ``size`` pairs, of one latent shape each.

    A part holds whole pairs, so winner and loser are never separated; parts come in the order
    of their first pair.
    """
    open_parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    parts: list[list[tuple[int, int]]] = []
    for item in items:
        key = shape(item[0])
        part = open_parts.get(key)
        if part is None or len(part) == size:
            part = open_parts[key] = []
            parts.append(part)
        part.append(item)
    return parts
