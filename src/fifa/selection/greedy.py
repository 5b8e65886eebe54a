"""Greedy diversity over prompts: facility location and farthest point.

Both are quadratic in the number of distinct prompts, so both refuse more than `MAX_PROMPTS`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fifa.console import progress
from fifa.errors import FifaError
from fifa.selection.order import Rows, occurrence

Floats = npt.NDArray[np.float32]
Picks = npt.NDArray[np.intp]
Greedy = Callable[[Floats, int], Picks]

MAX_PROMPTS = 100_000
DECIMALS = 4  # of gains and similarities: what is equal but for rounding errors is a tie
BATCH = 16  # candidates whose gain is computed at once, to begin with
BLOCK = 512  # rows of the similarity matrix held at once


def spread(prompts: Rows, embeddings: Callable[[], Floats], greedy: Greedy, count: int) -> Picks:
    """Take pairs in turns: one of every prompt in greedy order, then a second one of each.

    Parameters
    ----------
    prompts
        int32 [pairs], the prompt of every pair; most important pair first.
    embeddings
        Gives float32 [all prompts, d], L2-normalised.
    greedy
        `facility_location` or `farthest_point`.
    count
        Prompts beyond the first ``count`` are left in the order of their best pair.

    Returns
    -------
    int [pairs], the order, as positions in ``prompts``.
    """
    distinct, first, inverse = np.unique(prompts, return_index=True, return_inverse=True)
    if len(distinct) > MAX_PROMPTS:
        raise FifaError(
            f"{len(distinct):,} eligible prompts are too many for a greedy strategy, whose cost "
            f"is quadratic (at most {MAX_PROMPTS:,})",
            do="narrow the candidates first (--min-quality, --margin-percentiles), or use the "
            "strategy 'fifa' with --per-prompt, whose diversity term is already computed",
        )
    # By their best pair: an order, and so a result, that the rows' order does not touch.
    canonical = np.argsort(first)
    picks = greedy(embeddings()[distinct[canonical]], min(count, len(distinct)))
    place = np.full(len(distinct), len(distinct), np.int64)
    place[canonical[picks]] = np.arange(len(picks))
    turn = occurrence(prompts)
    return np.lexsort((first[inverse], place[inverse], turn))


def facility_location(vectors: Floats, count: int) -> Picks:
    """The prompts that greedily maximise how well all prompts are represented.

    ``f(S) = sum_i max(0, max_{j in S} z_i . z_j)`` is monotone submodular, so greedy reaches
    1 - 1/e of the best (Nemhauser, Wolsey and Fisher 1978), and a gain computed earlier bounds
    a later one (the lazy greedy of Minoux 1978).

    Parameters
    ----------
    vectors
        float32 [n, d], L2-normalised.
    count
        How many to pick, at most n. ``O(n^2 d)`` for the first gains, then ``O(n d)`` for every
        gain computed again; memory ``O(n (d + 512))``.

    Returns
    -------
    int [count], in the order of picking; equal gains go to the lower position.
    """
    n = len(vectors)
    covered = np.zeros(n, np.float32)

    def gains(candidates: Picks) -> npt.NDArray[np.float64]:
        # gain_j = sum_i max(0, z_i . z_j - covered_i)
        similarity = vectors[candidates] @ vectors.T
        similarity -= covered
        np.maximum(similarity, 0, out=similarity)
        return np.asarray(np.round(similarity.sum(axis=1, dtype=np.float64), DECIMALS))

    with progress("facility location", n + count) as advance:
        bound = np.empty(n, np.float64)
        for start in range(0, n, BLOCK):
            block = np.arange(start, min(start + BLOCK, n))
            bound[block] = gains(block)
            advance(len(block))
        picks = np.empty(count, np.intp)
        for step in range(count):
            picks[step] = best = _best(bound, gains, fresh_at_first=step == 0)
            bound[best] = -np.inf
            np.maximum(covered, vectors @ vectors[best], out=covered)
            advance(1)
    return picks


def _best(
    bound: npt.NDArray[np.float64],
    gains: Callable[[Picks], npt.NDArray[np.float64]],
    *,
    fresh_at_first: bool,
) -> int:
    # Tightens `bound` in place, the loosest first, until the largest is a gain of this step.
    fresh = np.full(len(bound), fresh_at_first)
    size = BATCH
    while True:
        best = int(np.argmax(bound))
        if fresh[best] or bound[best] <= 0:  # nothing left to gain: the first is as good as any
            return best
        size = min(size, len(bound))
        batch = np.argpartition(bound, -size)[-size:]
        batch = np.union1d(batch[~fresh[batch]], [best])
        batch = batch[bound[batch] > -np.inf]
        bound[batch] = gains(batch)
        fresh[batch] = True
        size = min(2 * size, BLOCK)  # bounds that are this loose: many products at once are cheaper


def farthest_point(vectors: Floats, count: int) -> Picks:
    """The first prompt, then always the one farthest from all picked (Gonzalez 1985).

    Parameters
    ----------
    vectors
        float32 [n, d], L2-normalised.
    count
        How many to pick, at most n: ``O(n d)`` each.

    Returns
    -------
    int [count], in the order of picking; equal distances go to the lower position.
    """
    picks = np.zeros(count, np.intp)
    nearest = np.full(len(vectors), -np.inf, np.float32)  # similarity to the nearest pick
    with progress("farthest point", count) as advance:
        for step in range(count):
            # the farthest has the smallest similarity to its nearest pick
            picks[step] = best = int(np.argmin(nearest)) if step else 0
            np.maximum(nearest, np.round(vectors @ vectors[best], DECIMALS), out=nearest)
            nearest[picks[: step + 1]] = np.inf
            advance(1)
    return picks
