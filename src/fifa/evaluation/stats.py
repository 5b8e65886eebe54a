"""Win rates, their intervals and their tests, for scorers and for people: everything by prompt.

The seeds of one prompt are not independent of each other, so the unit that is resampled and
flipped is the prompt, with everything that was compared on it. All intervals are 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator

from fifa.errors import FifaError
from fifa.scoring.rewards.metrics import wilson

Floats = npt.NDArray[np.float64]
Prompts = Sequence[Any] | npt.NDArray[Any] | None  # of each comparison; None: a prompt each
# A number that results.json holds as null where there is none: NaN
Number = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]

LEVEL = (2.5, 97.5)  # percentiles of the interval
UNCATEGORISED = "no category"
SAMPLES = 10_000  # of the bootstrap, and of the sign flips that are drawn
BLOCK = 4_000_000  # prompts of resamples in memory at a time
NEGLIGIBLE = 1e-30  # a probability this small is left out of a sum


@dataclass(frozen=True)
class WinRate:
    """How often ours wins, a tie being half a win.

    Parameters
    ----------
    share
        (wins + ties / 2) / n; NaN where nothing was compared.
    low, high
        The 95 % bootstrap interval over prompts.
    p
        Of `sign_flip`: how likely a share this far from 0.5 is if neither is better.
    n
        Comparisons: ``wins + ties + losses``.
    wins, ties, losses
        Their parts.
    prompts
        On how many prompts.
    missing
        Comparisons without an outcome, which are in none of the other numbers.
    """

    share: Number
    low: Number
    high: Number
    p: Number
    n: int
    wins: int
    ties: int
    losses: int
    prompts: int
    missing: int = 0


@dataclass(frozen=True)
class Mean:
    """A mean, its 95 % bootstrap interval over prompts, and `sign_flip_mean`'s p against 0."""

    mean: Number
    low: Number
    high: Number
    p: Number
    n: int
    prompts: int
    missing: int = 0


def outcomes(ours: npt.ArrayLike, theirs: npt.ArrayLike, tie: float = 0.0) -> Floats:
    """1 where ours scores higher, 0 where theirs does, 0.5 for a tie, NaN where one is missing.

    Parameters
    ----------
    ours, theirs
        Scores of the same prompts and seeds, [n].
    tie
        The largest difference that still counts as a tie. Default: equal scores only.
    """
    # before subtracting: inf - inf is no number
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = np.subtract(a, b, out=np.zeros(a.shape), where=a != b)
    outcome = 0.5 + 0.5 * np.sign(difference) * (np.abs(difference) > tie)
    return np.where(np.isnan(a) | np.isnan(b), np.nan, outcome)


def win_rate(
    outcome: npt.ArrayLike, prompt: Prompts = None, *, samples: int = SAMPLES, seed: int = 0
) -> WinRate:
    """The win rate of paired comparisons, its interval and its test.

    Parameters
    ----------
    outcome
        1, 0.5 or 0 (`outcomes`, or votes), NaN for none, [n].
    prompt
        The prompt of each comparison, any ids, [n]; None: a prompt each.
    samples, seed
        Of the bootstrap.

    Raises
    ------
    FifaError
        Where an outcome is something else.
    """
    known, groups, missing = _by_prompt(outcome, prompt)
    if not np.isin(known, (0.0, 0.5, 1.0)).all():
        raise FifaError("an outcome is 1 (ours wins), 0.5 (a tie) or 0 (theirs wins)")
    wins, losses = int((known == 1).sum()), int((known == 0).sum())
    n, prompts = len(known), int(groups.max(initial=-1)) + 1
    ties = n - wins - losses
    # (wins + ties / 2) / n
    share = (wins + ties / 2) / n if n else float("nan")
    low, high = _interval(known, groups, samples, seed)
    if n and np.ptp(np.bincount(groups, known) / np.bincount(groups)) == 0:
        low, high = unanimous(share, prompts)
    p = sign_flip(known, groups)
    return WinRate(share, low, high, p, n, wins, ties, losses, prompts, missing)


def by_category(
    outcome: npt.ArrayLike,
    category: Sequence[str | None],
    prompt: Prompts = None,
    *,
    samples: int = SAMPLES,
) -> dict[str, WinRate]:
    """`win_rate` of each category, sorted by name; those without one under `UNCATEGORISED`.

    ``category`` has a name or None for each comparison, [n]; the rest is as for `win_rate`.
    """
    values = np.asarray(outcome, np.float64)
    names = np.array([UNCATEGORISED if name is None else str(name) for name in category], object)
    ids = np.arange(len(values)) if prompt is None else np.asarray(prompt)
    return {
        name: win_rate(values[here], ids[here], samples=samples)
        for name in sorted(set(names))
        for here in [names == name]
    }


def mean_difference(
    difference: npt.ArrayLike, prompt: Prompts = None, *, samples: int = SAMPLES, seed: int = 0
) -> Mean:
    """The mean of paired differences (ours - theirs, [n], NaN for none), its interval and test.

    The rest is as for `win_rate`.
    """
    known, groups, missing = _by_prompt(difference, prompt)
    mean = float(known.mean()) if len(known) else float("nan")
    low, high = _interval(known, groups, samples, seed)
    p = sign_flip_mean(known, groups, samples=samples, seed=seed)
    return Mean(mean, low, high, p, len(known), int(groups.max(initial=-1)) + 1, missing)


def bootstrap_means(
    values: npt.ArrayLike, prompt: Prompts = None, *, samples: int = SAMPLES, seed: int = 0
) -> Floats:
    """Means of ``samples`` resamples of the prompts, each with everything it has, [samples].

    Parameters
    ----------
    values
        [n]; NaN is left out.
    prompt
        The prompt of each value, [n]; None: a prompt each.
    samples, seed
        How many, and of the generator: the same seed gives the same means.
    """
    known, groups, _ = _by_prompt(values, prompt)
    sums, counts = np.bincount(groups, known), np.bincount(groups).astype(np.float64)
    prompts = len(sums)
    if not prompts:
        return np.full(samples, np.nan)
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    for start in range(0, samples, max(1, BLOCK // prompts)):
        block = means[start : start + max(1, BLOCK // prompts)]
        drawn = rng.integers(0, prompts, (len(block), prompts))
        # sum of the drawn prompts' values / their number
        block[:] = sums[drawn].sum(1) / counts[drawn].sum(1)
    return means


def sign_flip(outcome: npt.ArrayLike, prompt: Prompts = None) -> float:
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
    known, groups, _ = _by_prompt(outcome, prompt)
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
    difference: npt.ArrayLike, prompt: Prompts = None, *, samples: int = SAMPLES, seed: int = 0
) -> float:
    """`sign_flip` for differences that are any numbers: the signs are drawn, not counted out.

    p = (1 + draws at least as far from 0) / (1 + draws), which is never 0. NaN for none.
    """
    known, groups, _ = _by_prompt(difference, prompt)
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


def alpha(votes: npt.ArrayLike) -> float:
    """Krippendorff's alpha for nominal values: 1 is full agreement, 0 what chance would give.

        alpha = 1 - D_o / D_e
        D_o = sum_u sum_v c_uv (m_u - c_uv) / (m_u - 1)        seen within what was judged
        D_e = sum_v n_v (n - n_v) / (n - 1)                    if votes were dealt out at random

    with c_uv the votes for value v on unit u, m_u all votes on u, n_v = sum_u c_uv, n = sum_v n_v,
    over the units with two votes or more.

    Parameters
    ----------
    votes
        Values, [voters, units]; NaN where a voter did not judge a unit.

    Returns
    -------
    NaN where no unit has two votes, or all votes are the same value: chance would agree as well.

    References
    ----------
    K. Krippendorff, *Computing Krippendorff's Alpha-Reliability*, 2011.
    """
    table = np.atleast_2d(np.asarray(votes, np.float64))
    values = np.unique(table[~np.isnan(table)])
    counts = np.stack([(table == value).sum(0) for value in values] or [np.zeros(0)], 1)
    counts = counts[counts.sum(1) >= 2].astype(np.float64)  # c_uv, [units, values]
    of_unit, of_value, n = counts.sum(1), counts.sum(0), counts.sum()
    # D_e (n - 1) = sum_v n_v (n - n_v)
    expected = float((of_value * (n - of_value)).sum())
    if expected == 0:
        return float("nan")
    # D_o = sum_u sum_v c_uv (m_u - c_uv) / (m_u - 1)
    observed = float(((counts * (of_unit[:, None] - counts)).sum(1) / (of_unit - 1)).sum())
    return 1 - observed * (float(n) - 1) / expected


def _by_prompt(values: npt.ArrayLike, prompt: Prompts) -> tuple[Floats, npt.NDArray[np.int64], int]:
    """What is no NaN, the number of its prompt (0 to prompts - 1), and how many are NaN."""
    all_values = np.asarray(values, np.float64)
    known = ~np.isnan(all_values)
    ids = np.arange(len(all_values)) if prompt is None else np.asarray(prompt)
    if all_values.ndim != 1 or len(ids) != len(all_values):
        raise FifaError(f"{len(ids):,} prompts for {all_values.size:,} comparisons")
    groups = np.unique(ids[known], return_inverse=True)[1].astype(np.int64)
    return all_values[known], groups, int((~known).sum())


def _interval(
    known: Floats, groups: npt.NDArray[np.int64], samples: int, seed: int
) -> tuple[float, float]:
    low, high = np.percentile(bootstrap_means(known, groups, samples=samples, seed=seed), LEVEL)
    return float(low), float(high)


def unanimous(share: float, prompts: int) -> tuple[float, float]:
    """The interval where all prompts have the same share, which resampling cannot tell apart.

    Wilson's bound says how many prompts may yet differ, having seen none that does; those
    could be all won or all lost. For a share of 0 or 1 this is Wilson's interval over prompts.
    """
    unseen = wilson(0, prompts)[1]
    # share * (1 - unseen) + 0 * unseen to share * (1 - unseen) + 1 * unseen
    return share * (1 - unseen), share * (1 - unseen) + unseen


def _fair_binomial(n: int) -> tuple[Floats, int]:
    """P(k of n coins show heads) for all k that are not `NEGLIGIBLE`, and the first such k."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])  # log k!
    chance = np.exp(logs[-1] - logs - logs[::-1] - n * np.log(2.0))
    kept = np.flatnonzero(chance > NEGLIGIBLE)
    return chance[kept[0] : kept[-1] + 1], int(kept[0])
