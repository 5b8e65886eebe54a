"""In which order pairs come: which of them a step takes, and which of its draws each has.

A function of the seed, and of how easy pairs are where that orders them: nothing that a step has
to remember. So a training that goes on where it was stopped takes the same pairs, and so do
several processes.

How easy a pair is stands before training begins, in one of two ways (`Train.order_by`):

- ``margin``: ``abs(signed_margin)`` of the subset, how far apart the reward model of `fifa select`
  found the two images, whichever of them it prefers;
- ``implicit``: ``mean over four draws of e(loser) - e(winner)``, the base model's errors on draws
  that are fixed: how much it has the person's preference already. That is DPO's implicit reward of
  the base alone; against the base, as in the loss, the reward of every pair is 0 at the beginning.

Curriculum-DPO (arXiv 2405.13637; 2602.13055) orders by the difference of rewards, as ``margin``
does, and its stages are those of ``stages:N``: its script cuts the pairs, sorted by that
difference, into N parts of equal size, and stage k draws from the first k of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

import numpy as np
import numpy.typing as npt
import torch

from fifa.config import Train
from fifa.errors import FifaError
from fifa.training.batches import seed_of


@dataclass(frozen=True, eq=False)
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
    order
        ``random``, as without any; ``easy-first`` and ``hard-first``: every epoch from one end to
        the other, pairs that are equally easy at random; ``stages:N``: N stages of equally many
        steps, where stage k has epochs, in random order, of the k / N easiest pairs.
    ease
        A number a pair, the larger the easier; not needed where the order is random.
    steps
        Of the training, which the stages share.
    """

    pairs: int
    batch: int
    seed: int
    pool: int = 0
    order: str = ""
    ease: Sequence[float] = ()
    steps: int = 0

    def step(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """``(pair, draw)`` of what process ``rank`` of ``world`` presents in ``step`` (from 0).

        Positions ``[step * batch, (step + 1) * batch)`` of the stream, cut into ``world`` slices.
        """
        start = step * self.batch
        first = start + rank * self.batch // world
        last = start + (rank + 1) * self.batch // world
        begin, pairs, epochs = self._stages[bisect_right(self._begins, start) - 1]
        found = []
        for i in range(first - begin, last - begin):
            epoch, place = divmod(i, pairs)
            draw = epochs + epoch
            found.append(
                (_epoch(self, pairs, draw)[place], draw % self.pool if self.pool else draw)
            )
        return found

    @cached_property
    def _stages(self) -> list[tuple[int, int, int]]:
        """Of each stage: its first position, how many pairs it has, and how many epochs before."""
        name, _, stages = self.order.partition(":")
        n, epochs, found = int(stages) if name == "stages" else 1, 0, []
        for k in range(n):
            begin, end = (self.batch * (self.steps * stage // n) for stage in (k, k + 1))
            pairs = ceil(self.pairs * (k + 1) / n)
            if begin < end or k == n - 1:
                found.append((begin, pairs, epochs))
            # an epoch that a stage leaves unfinished counts: no pair has a draw twice
            epochs += ceil((end - begin) / pairs)
        return found

    @cached_property
    def _begins(self) -> list[int]:
        return [begin for begin, _, _ in self._stages]

    @cached_property
    def _easiest(self) -> list[int]:
        return sorted(range(self.pairs), key=lambda pair: -self.ease[pair])


def presented(train: Train, pairs: int) -> list[int]:
    """Which of so many pairs the steps of a training take, ascending.

    All, where there is an epoch or more, or where the order is by what the base makes of them all.
    """
    steps = train.steps_of(pairs)
    if train.order != "random" or steps * train.batch >= pairs:
        return list(range(pairs))
    stream = Stream(pairs, train.batch, train.seed)
    return sorted({pair for step in range(steps) for pair, _ in stream.step(step)})


@lru_cache(maxsize=2)  # a step takes from one epoch, or from two
def _epoch(stream: Stream, pairs: int, epoch: int) -> Sequence[int]:
    """The order of an epoch of so many pairs: all, or the easiest ones."""
    generator = torch.Generator().manual_seed(seed_of("order", stream.seed, epoch))
    order: list[int] = torch.randperm(pairs, generator=generator).tolist()
    if stream.order.startswith("stages"):
        return [stream._easiest[place] for place in order]
    if stream.order.endswith("-first"):
        sign = 1 if stream.order == "hard-first" else -1
        order.sort(key=lambda pair: sign * stream.ease[pair])
    return order


def check_order(train: Train, margin: npt.NDArray[np.float32]) -> None:
    """Raise `FifaError` where pairs are to be ordered by a margin that some do not have."""
    missing = int(np.isnan(margin).sum())
    if train.order != "random" and train.order_by == "margin" and missing:
        raise FifaError(
            f"{missing:,} of {len(margin):,} pairs have no margin to be ordered by",
            where=train.source,
            do="train on a subset that `fifa export` wrote, whose signed_margin is the reward "
            "model's, or take --order-by implicit or --order random",
        )
