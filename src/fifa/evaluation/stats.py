"""Win rates and how sure they are, for scorers and for people: everything by prompt.

The seeds of one prompt are not independent of each other, so the unit that is resampled and
flipped is the prompt, with everything that was compared on it. All intervals are 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fifa.errors import FifaError
from fifa.evaluation import paired
from fifa.evaluation.paired import SAMPLES, Floats, by_prompt, sign_flip, sign_flip_mean
from fifa.scoring.agreement import wilson

__all__ = [
    "Mean",
    "WinRate",
    "alpha",
    "bootstrap_means",
    "by_category",
    "mean_difference",
    "outcomes",
    "sign_flip",
    "sign_flip_mean",
    "wilson",
    "win_rate",
]

LEVEL = (2.5, 97.5)  # percentiles of the interval
UNCATEGORISED = "no category"


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

    share: float
    low: float
    high: float
    p: float
    n: int
    wins: int
    ties: int
    losses: int
    prompts: int
    missing: int = 0


@dataclass(frozen=True)
class Mean:
    """A mean, its 95 % bootstrap interval over prompts, and `sign_flip_mean`'s p against 0."""

    mean: float
    low: float
    high: float
    p: float
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
    outcome: npt.ArrayLike,
    prompt: Sequence[Any] | npt.NDArray[Any] | None = None,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
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
    known, groups, missing = by_prompt(outcome, prompt)
    if not np.isin(known, (0.0, 0.5, 1.0)).all():
        raise FifaError("an outcome is 1 (ours wins), 0.5 (a tie) or 0 (theirs wins)")
    wins, losses = int((known == 1).sum()), int((known == 0).sum())
    n, prompts = len(known), int(groups.max(initial=-1)) + 1
    ties = n - wins - losses
    # (wins + ties / 2) / n
    share = (wins + ties / 2) / n if n else float("nan")
    low, high = _interval(known, groups, samples, seed)
    if n and np.ptp(_means(known, groups)) == 0:
        low, high = _unanimous(share, prompts)
    p = sign_flip(known, groups)
    return WinRate(share, low, high, p, n, wins, ties, losses, prompts, missing)


def by_category(
    outcome: npt.ArrayLike,
    category: Sequence[str | None],
    prompt: Sequence[Any] | npt.NDArray[Any] | None = None,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, WinRate]:
    """`win_rate` of each category, sorted by name; those without one under `UNCATEGORISED`.

    ``category`` has a name or None for each comparison, [n]; the rest is as for `win_rate`.
    """
    values = np.asarray(outcome, np.float64)
    names = np.array([UNCATEGORISED if name is None else str(name) for name in category], object)
    ids = np.arange(len(values)) if prompt is None else np.asarray(prompt)
    return {
        name: win_rate(values[here], ids[here], samples=samples, seed=seed)
        for name in sorted(set(names))
        for here in [names == name]
    }


def mean_difference(
    difference: npt.ArrayLike,
    prompt: Sequence[Any] | npt.NDArray[Any] | None = None,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Mean:
    """The mean of paired differences (ours - theirs, [n], NaN for none), its interval and test.

    The rest is as for `win_rate`.
    """
    known, groups, missing = by_prompt(difference, prompt)
    mean = float(known.mean()) if len(known) else float("nan")
    low, high = _interval(known, groups, samples, seed)
    p = sign_flip_mean(known, groups, samples=samples, seed=seed)
    return Mean(mean, low, high, p, len(known), int(groups.max(initial=-1)) + 1, missing)


def bootstrap_means(
    values: npt.ArrayLike,
    prompt: Sequence[Any] | npt.NDArray[Any] | None = None,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
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
    known, groups, _ = by_prompt(values, prompt)
    sums, counts = np.bincount(groups, known), np.bincount(groups).astype(np.float64)
    prompts = len(sums)
    if not prompts:
        return np.full(samples, np.nan)
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    for start in range(0, samples, max(1, paired.BLOCK // prompts)):
        block = means[start : start + max(1, paired.BLOCK // prompts)]
        drawn = rng.integers(0, prompts, (len(block), prompts))
        # sum of the drawn prompts' values / their number
        block[:] = sums[drawn].sum(1) / counts[drawn].sum(1)
    return means


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


def _means(known: Floats, groups: npt.NDArray[np.int64]) -> Floats:
    return np.asarray(np.bincount(groups, known) / np.bincount(groups), np.float64)


def _interval(
    known: Floats, groups: npt.NDArray[np.int64], samples: int, seed: int
) -> tuple[float, float]:
    low, high = np.percentile(bootstrap_means(known, groups, samples=samples, seed=seed), LEVEL)
    return float(low), float(high)


def _unanimous(share: float, prompts: int) -> tuple[float, float]:
    """The interval where all prompts have the same share, which resampling cannot tell apart.

    Wilson's bound says how many prompts may yet differ, having seen none that does; those
    could be all won or all lost. For a share of 0 or 1 this is Wilson's interval over prompts.
    """
    unseen = wilson(0, prompts)[1]
    # share * (1 - unseen) + 0 * unseen to share * (1 - unseen) + 1 * unseen
    return share * (1 - unseen), share * (1 - unseen) + unseen
