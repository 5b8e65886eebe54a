"""Means over seeds and prompts at once, with an interval for other seeds and other prompts.

Trainings with several seeds are judged on the same prompts: the two are crossed. An interval over
prompts alone is one for these very trainings; one over seeds alone, for these very prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

from fifa.evaluation.stats import unanimous

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Crossed:
    """A mean and its 95 % interval over seeds and prompts; NaN where there is none.

    One seed or one prompt gives no interval.
    """

    mean: float
    low: float
    high: float
    seeds: int
    prompts: int

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite(self.low))


GRID, LEVEL = 5_001, 0.95
NOTHING = Crossed(float("nan"), float("nan"), float("nan"), 0, 0)


def crossed(values: npt.ArrayLike, low: float = -np.inf, high: float = np.inf) -> Crossed:
    """The mean of values of seeds and prompts.

    With y of seed s and prompt p, S seeds, P prompts, and r what is left of y without the means of
    its row and its column, two random factors:

        V_seed   = sum over s of (mean_p y - mean y)^2 / (S - 1) / S
        V_prompt = sum over p of (mean_s y - mean y)^2 / (P - 1) / P
        V_both   = sum of r^2 / ((S - 1) (P - 1)) / (S P)
        V  = max(V_seed, V_prompt, V_both, V_seed + V_prompt - V_both)
        df = V^2 / (V_seed^2 / (S - 1) + V_prompt^2 / (P - 1) + V_both^2 / ((S - 1) (P - 1)))

    and the interval is mean -+ t(0.975, df) sqrt(V): both factors' variances hold that of what is
    left once, so it is taken off once (Cameron, Gelbach and Miller 2011; the degrees of freedom
    are Satterthwaite's).

    Parameters
    ----------
    values
        [seeds, prompts]; prompts with a NaN are left out.
    low, high
        What the values cannot be below or above: 0 and 1 of shares. Where all shares are alike, the
        interval is `fifa.evaluation.stats.unanimous`.
    """
    y = np.atleast_2d(np.asarray(values, np.float64))
    y = y[:, ~np.isnan(y).any(0)]
    seeds, prompts = y.shape
    if not y.size:
        return NOTHING
    mean = float(y.mean())
    if seeds < 2 or prompts < 2:
        return Crossed(mean, float("nan"), float("nan"), seeds, prompts)
    of_seed, of_prompt = y.mean(1), y.mean(0)
    by_seed = of_seed.var(ddof=1) / seeds
    by_prompt = of_prompt.var(ddof=1) / prompts
    left = y - of_seed[:, None] - of_prompt + mean
    free = (seeds - 1) * (prompts - 1)
    both = (left**2).sum() / free / y.size
    variance = max(by_seed, by_prompt, both, by_seed + by_prompt - both)
    half = 0.0
    if variance > 0:
        parts = by_seed**2 / (seeds - 1) + by_prompt**2 / (prompts - 1) + both**2 / free
        freedom = variance**2 / parts
        half = student(freedom) * sqrt(variance)
    elif (low, high) == (0, 1):
        return Crossed(mean, *unanimous(mean, prompts), seeds, prompts)
    return Crossed(mean, max(low, mean - half), min(high, mean + half), seeds, prompts)


def student(freedom: float) -> float:
    """The 97.5th percentile of Student's t.

    With t = sqrt(df) tan(x), P(|T| < t) = integral of cos^(df - 1) from 0 to x, over that to pi/2.
    """
    x = np.linspace(0, np.pi / 2, GRID)
    return float(np.sqrt(freedom) * np.tan(_quantiles(x, np.cos(x) ** (freedom - 1), [LEVEL])[0]))


def spread_ends(freedom: int) -> tuple[float, float]:
    """What a standard deviation of normal values is multiplied with for its 95 % interval.

    sqrt(df / chi-square), whose root has the density u^(df - 1) exp(-u^2 / 2).
    """
    u = np.linspace(0, np.sqrt(freedom) + 8, GRID)
    tails = [(1 + LEVEL) / 2, (1 - LEVEL) / 2]
    high, low = _quantiles(u, u ** (freedom - 1) * np.exp(-(u**2) / 2), tails)
    return float(np.sqrt(freedom) / high), float(np.sqrt(freedom) / low)


def _quantiles(x: Floats, density: Floats, shares: list[float]) -> Floats:
    """Where the integral of a density from ``x[0]`` on has these shares of the whole."""
    grown = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.interp(shares, grown / grown[-1], x)


def draws(
    seeds: int, prompts: int, samples: int = 2000, seed: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Seeds [samples, seeds] and prompts [samples, prompts] drawn anew, each on its own."""
    rng = np.random.default_rng(seed)
    one = rng.integers(0, seeds, (samples, seeds))
    return one, rng.integers(0, prompts, (samples, prompts))
