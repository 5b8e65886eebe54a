"""Paired tests by prompt: is one model better, or could the signs as well be chance?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fifa.errors import FifaError

Floats = npt.NDArray[np.float64]
SAMPLES = 10_000  # of the bootstrap, and of the flips that are drawn
BLOCK = 4_000_000  # prompts of resamples in memory at a time
NEGLIGIBLE = 1e-30  # a probability this small is left out of a sum


def by_prompt(
    values: npt.ArrayLike, prompt: Sequence[Any] | npt.NDArray[Any] | None
) -> tuple[Floats, npt.NDArray[np.int64], int]:
    """What is no NaN, the number of its prompt (0 to prompts - 1), and how many are NaN."""
    all_values = np.asarray(values, np.float64)
    known = ~np.isnan(all_values)
    ids = np.arange(len(all_values)) if prompt is None else np.asarray(prompt)
    if all_values.ndim != 1 or len(ids) != len(all_values):
        raise FifaError(f"{len(ids):,} prompts for {all_values.size:,} comparisons")
    groups = np.unique(ids[known], return_inverse=True)[1].astype(np.int64)
    return all_values[known], groups, int((~known).sum())


def sign_flip(
    outcome: npt.ArrayLike, prompt: Sequence[Any] | npt.NDArray[Any] | None = None
) -> float:
    """Two-sided p of the exact paired permutation test over prompts; NaN for no comparison.

    If neither model is better, swapping the two on one prompt changes nothing: of a prompt's
    wins - losses only the sign is chance. p is the share of all 2^prompts choices of signs whose
    sum is at least as far from 0 as the one seen, counted exactly, not drawn. Why this test:

    - the prompt is the unit, so the seeds of a prompt are not taken for independent evidence, as
      a sign test or Wilcoxon's over comparisons would take them;
    - it tests the win rate itself, in which a tie counts half: ties neither help nor are dropped
      where the rest of their prompt still counts;
    - with one comparison a prompt it is the exact sign test.

    Parameters
    ----------
    outcome, prompt
        As for `win_rate`.

    References
    ----------
    R. A. Fisher, *The Design of Experiments*, 1935, section 21.
    """
    known, groups, _ = by_prompt(outcome, prompt)
    if not len(known):
        return float("nan")
    balance = np.rint(np.bincount(groups, 2 * known - 1)).astype(np.int64)  # wins - losses
    seen = abs(int(balance.sum()))
    sizes, times = np.unique(np.abs(balance[balance != 0]), return_counts=True)
    # P(sum = low + 2 i), prompts with the same |wins - losses| together: a binomial each
    chance, low = np.ones(1), 0
    for size, n in zip(sizes.tolist(), times.tolist(), strict=True):
        binomial, first = _fair_binomial(n)
        joined = np.zeros(len(chance) + size * (len(binomial) - 1))
        for i, weight in enumerate(binomial.tolist()):
            joined[size * i : size * i + len(chance)] += weight * chance
        chance, low = joined, low + size * (2 * first - n)
    sums = low + 2 * np.arange(len(chance))
    return min(1.0, float(chance[np.abs(sums) >= seen].sum()))


def sign_flip_mean(
    difference: npt.ArrayLike,
    prompt: Sequence[Any] | npt.NDArray[Any] | None = None,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> float:
    """`sign_flip` for differences that are any numbers: the signs are drawn, not counted out.

    p = (1 + draws at least as far from 0) / (1 + draws), which is never 0. NaN for none.
    """
    known, groups, _ = by_prompt(difference, prompt)
    if not len(known):
        return float("nan")
    sums = np.bincount(groups, known)
    rng = np.random.default_rng(seed)
    far, least = 0, abs(sums.sum()) * (1 - 1e-12)  # the same sum, added up in another order
    step = max(1, BLOCK // len(sums))
    for start in range(0, samples, step):
        heads = rng.random((min(step, samples - start), len(sums))) < 0.5
        far += int((np.abs(np.where(heads, sums, -sums).sum(1)) >= least).sum())
    return (1 + far) / (1 + samples)


def _fair_binomial(n: int) -> tuple[Floats, int]:
    """P(k of n coins show heads) for all k that are not `NEGLIGIBLE`, and the first such k."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])  # log k!
    chance = np.exp(logs[-1] - logs - logs[::-1] - n * np.log(2.0))
    kept = np.flatnonzero(chance > NEGLIGIBLE)
    return chance[kept[0] : kept[-1] + 1], int(kept[0])
