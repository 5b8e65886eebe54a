"""Each voter's own order of comparisons and sides, with repeats and checks among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

COMPARE, REPEAT, CHECK = "compare", "repeat", "check"
GAP = 5  # trials between a comparison and its repeat, where there are enough


@dataclass(frozen=True)
class Trial:
    """One pair that a voter sees.

    Parameters
    ----------
    type
        `COMPARE`; `REPEAT`, a comparison shown before, its sides swapped; `CHECK`, an image
        beside a destroyed version of itself.
    comparison
        The comparison's key.
    left
        Which image is on the left: 0 is ours, 1 theirs. Of a check: 0 is the intact one.
    image
        Of a check: which of the comparison's images.
    """

    type: str
    comparison: str
    left: int
    image: int = 0


def draw_trials(
    keys: Sequence[str], rng: np.random.Generator, *, repeats: float = 0, checks: float = 0
) -> list[Trial]:
    """Every comparison once, in random order and on random sides.

    Parameters
    ----------
    keys
        The comparisons' keys.
    rng
        Of the voter.
    repeats, checks
        So many repeats and checks for every comparison, from 0 to 1. They are spread over the
        whole order, so that a voter who stops early has seen some.
    """
    n = len(keys)
    order, sides = rng.permutation(n).tolist(), rng.integers(0, 2, n).tolist()
    gap = min(GAP, max(1, n // 2))
    again, check = _due(repeats, rng), _due(checks, rng)
    trials: list[Trial] = []
    open_to_repeat: list[tuple[int, Trial]] = []  # where a comparison stands, not repeated yet
    owed = 0
    for of, left in zip(order, sides, strict=True):
        open_to_repeat.append((len(trials), Trial(COMPARE, keys[of], left)))
        trials.append(open_to_repeat[-1][1])
        if next(check):
            other = keys[int(rng.integers(n))]
            trials.append(Trial(CHECK, other, int(rng.integers(2)), int(rng.integers(2))))
        owed += next(again)
        ready = [i for i, (at, _) in enumerate(open_to_repeat) if at + gap <= len(trials)]
        if owed and ready:
            _, first = open_to_repeat.pop(ready[int(rng.integers(len(ready)))])
            trials.append(Trial(REPEAT, first.comparison, 1 - first.left))
            owed -= 1
    return trials


def _due(share: float, rng: np.random.Generator) -> Iterator[bool]:
    """True for ``share`` of the calls, evenly spread from a random start."""
    owed = float(rng.random())
    while True:
        owed += share
        yield owed >= 1
        owed -= owed >= 1
