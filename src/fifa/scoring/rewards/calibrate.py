"""Is a reward a probability? Accuracy, temperature and calibration against people's labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BINS = 10
RESAMPLES = 2000
LOG_T = 8.0  # temperatures are looked for between exp(-8) and exp(8)


@dataclass(frozen=True)
class Metrics:
    """How well differences of rewards say what people prefer.

    Parameters
    ----------
    pairs, prompts
        How many were judged.
    accuracy
        The share of the pairs with a majority (label not 0.5) where the sign is right; a
        difference of 0 counts half.
    low, high
        Its 95 % interval: a bootstrap of prompts, since the pairs of a prompt are not
        independent.
    nll
        Mean cross-entropy against the labels, in nats. A coin's is 0.693.
    ece
        Expected calibration error in [0, 1].
    """

    pairs: int
    prompts: int
    accuracy: float
    low: float
    high: float
    nll: float
    ece: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, for JSON."""
        return asdict(self)


def measure(logits: Array, label: Array, prompt: Array, *, seed: int = 0) -> Metrics:
    """`Metrics` of some pairs.

    Parameters
    ----------
    logits
        reward_0 - reward_1, [pairs]; pairs that are not finite are left out.
    label
        The probability that a person prefers image 0, [pairs].
    prompt
        What tells prompts apart, [pairs].
    seed
        Of the bootstrap.
    """
    known = np.isfinite(logits)
    logits, label, prompt = (np.asarray(values)[known] for values in (logits, label, prompt))
    logits = logits.astype(np.float64)
    low, high = prompt_bootstrap(logits, label, prompt, seed=seed)
    return Metrics(
        pairs=len(logits),
        prompts=len(np.unique(prompt)),
        accuracy=accuracy(logits, label),
        low=low,
        high=high,
        nll=nll(logits, label),
        ece=calibration_error(logits, label),
    )


def accuracy(logits: Array, label: Array) -> float:
    """The share of pairs with a majority where the sign is right; NaN without such pairs."""
    right, untied = _right(logits, label)
    return float(right[untied].mean()) if untied.any() else float("nan")


def prompt_bootstrap(
    logits: Array, label: Array, prompt: Array, *, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the accuracy when prompts, not pairs, are drawn again.

    `RESAMPLES` resamples of the prompts with replacement (Efron's percentile interval).
    """
    right, untied = _right(logits, label)
    _, codes = np.unique(np.asarray(prompt)[untied], return_inverse=True)
    if not len(codes):
        return float("nan"), float("nan")
    hits = np.bincount(codes, weights=right[untied])
    counts = np.bincount(codes)
    rng = np.random.default_rng(seed)
    shares = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(0, len(counts), len(counts))
        shares[i] = hits[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


def nll(logits: Array, label: Array) -> float:
    """Mean cross-entropy of Bradley-Terry probabilities against soft labels, in nats."""
    if not len(logits):
        return float("nan")
    # -y log s(z) - (1 - y) log s(-z) = log(1 + e^z) - y z
    return float(np.mean(np.logaddexp(0, logits) - label * logits))


def calibration_error(logits: Array, label: Array, bins: int = BINS) -> float:
    """Expected calibration error (Naeini et al. 2015) on soft labels.

    A pair's confidence is the probability of the side that the reward prefers, its outcome the
    share of people on that side (1/2 for a tie), so that it does not matter which image is
    called image 0. ``bins`` of equal width over [0.5, 1].
    """
    if not len(logits):
        return float("nan")
    confidence = 1 / (1 + np.exp(-np.abs(logits)))
    outcome = np.where(logits >= 0, label, 1 - np.asarray(label))
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    # sum over bins of n_b / n * |mean outcome - mean confidence|
    gap = np.bincount(which, weights=outcome - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(logits))


def fit_temperature(logits: Array, label: Array) -> float:
    """The T > 0 with the smallest `nll` of ``logits / T`` (Guo et al. 2017).

    Against `smoothed` labels: a few pairs that are all right would have T be 0 otherwise. The
    loss is convex in 1/T: its derivative's root, by bisection of log T, so the result does not
    depend on a start. Where no T is better than another (no pairs, all logits 0) it is 1.
    """
    known = np.isfinite(logits)
    z, y = np.asarray(logits, np.float64)[known], smoothed(np.asarray(label)[known])
    if not len(z) or not np.abs(z).any():
        return 1.0
    low, high = -LOG_T, LOG_T
    for _ in range(60):
        middle = (low + high) / 2
        # d/da of mean(log(1 + e^(az)) - y a z) at a = 1/T: mean(z (s(az) - y)), rising in a
        scaled = np.clip(z * np.exp(-middle), -500, 500)
        slope = float(np.mean(z * (1 / (1 + np.exp(-scaled)) - y)))
        if slope > 0:  # too sharp: a hotter T
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def smoothed(label: Array) -> Array:
    """Labels as if two more people had been asked of all n pairs, one on each side.

    Platt (1999) does it to hard labels: 1 becomes (n + 1) / (n + 2).
    """
    n = len(label)
    # y' = (n y + 1) / (n + 2)
    mixed: Array = (n * np.asarray(label, np.float64) + 1) / (n + 2)
    return mixed


def _right(logits: Array, label: Array) -> tuple[Array, Array]:
    """1, 1/2 or 0 a pair, and which pairs have a majority."""
    person = np.sign(np.asarray(label, np.float64) - 0.5)
    right: Array = (1 + np.sign(logits) * person) / 2
    return right, person != 0
