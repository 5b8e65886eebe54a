"""What rewards are worth against people's labels: agreement, calibration, a committee's verdict.

Of one reward model: how often does it agree with people, and is it a probability? Of several: who
errs how often, and which labels do all of them contradict?
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]
Rewards = Mapping[str, tuple[Array, Array]]  # of both sides, by scorer

BINS = 10
RESAMPLES = 2000
Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval
LOG_T = 8.0  # temperatures are looked for between exp(-8) and exp(8)
GROUPS = 20  # of prompts, each of which is left out once
LEAST = 2 * GROUPS  # pairs that can tell how many labels are wrong

MEMBERS = pa.schema(
    [
        ("scorer", pa.string()),
        ("pairs", pa.int64()),  # scored, ties included
        ("prompts", pa.int64()),
        ("accuracy", pa.float64()),  # against the label, on untied pairs
        ("low", pa.float64()),  # a 95 % interval: bootstrap of prompts
        ("high", pa.float64()),
        ("temperature", pa.float64()),  # that makes its differences log-odds
        ("nll", pa.float64()),  # at that temperature, in nats
        ("ece", pa.float64()),  # at that temperature
        ("ece_raw", pa.float64()),  # of its differences as they stand
    ]
)
DISSENT = pa.schema(
    [
        ("against", pa.int64()),  # members on the other side than the person
        ("pairs", pa.int64()),
        ("share", pa.float64()),
        ("expected", pa.float64()),  # the share if members erred independently of each other
    ]
)
MISLABELLED = pa.schema(
    [
        ("row", pa.int64()),
        ("label", pa.float64()),
        ("committee", pa.float64()),  # probability that people prefer image 0, by the committee
        ("doubt", pa.float64()),  # log-odds that the least certain member gives against the label
    ]
)


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


def committee_report(rewards: Rewards, label: Array, prompt: Array, *, seed: int = 0) -> pa.Table:
    """Accuracy and calibration of every member against the people's labels.

    Public scorers are on scales of their own, so each is brought to log-odds by one temperature,
    fitted to the very labels it is judged by: one number for all pairs. Accuracy needs none.

    Parameters
    ----------
    rewards
        ``(reward_0, reward_1)`` a scorer, by its name, [pairs] each.
    label
        The probability that a person prefers image 0, [pairs]; 0.5 is a tie.
    prompt
        What tells prompts apart, [pairs].
    seed
        Of the bootstrap.

    Returns
    -------
    pyarrow.Table
        `MEMBERS`, a row a scorer in the order given; pairs that it could not score are left out.
    """
    rows = []
    for name, (reward_0, reward_1) in rewards.items():
        logits = _difference(reward_0, reward_1)
        temperature = fit_temperature(logits, label)
        found = asdict(measure(logits / temperature, label, prompt, seed=seed))
        raw = measure(logits, label, prompt, seed=seed)
        rows.append(found | {"scorer": name, "temperature": temperature, "ece_raw": raw.ece})
    return pa.Table.from_pylist(rows, schema=MEMBERS)


def dissent(rewards: Rewards, label: Array) -> pa.Table:
    """How often 0, 1, ... all members contradict the person, and how often chance would.

    ``expected`` takes each member's own error rate and lets them err independently (the
    Poisson-binomial distribution). Where all members contradict a person far more often than
    that, they err together or the labels do: what is beyond ``expected`` in the last row bounds
    the share of labels that a committee can call noise, it does not prove it.

    Parameters
    ----------
    rewards, label
        As for `committee_report`. Ties, and pairs that a member could not score or sees no
        difference in, are left out.

    Returns
    -------
    pyarrow.Table
        `DISSENT`, a row for every number of members, from 0.
    """
    against, usable = _against(rewards, label)
    judged = against[:, usable]
    members, n = judged.shape
    expected = np.ones(1)
    for rate in judged.mean(1) if n else np.zeros(members):
        # P(k against) = P(k - 1 before) rate + P(k before) (1 - rate)
        expected = np.convolve(expected, [1 - rate, rate])
    counts = np.bincount(judged.sum(0), minlength=members + 1)
    share = counts / n if n else np.full(members + 1, np.nan)
    columns = [np.arange(members + 1), counts, share, expected if n else share]
    return pa.table([pa.array(c) for c in columns], names=DISSENT.names).cast(DISSENT)


def likely_mislabelled(rewards: Rewards, label: Array) -> pa.Table:
    """The pairs where every member contradicts the person, the most doubtful first.

    Parameters
    ----------
    rewards, label
        As for `committee_report`. One member alone is no committee, but is taken at its word.

    Returns
    -------
    pyarrow.Table
        `MISLABELLED`: ``row`` is the pair's in ``label``. Every member's difference is brought to
        log-odds by its temperature; ``doubt`` is the smallest of them in favour of the image
        that the person did not prefer, ``committee`` their mean as a probability. Equal doubts
        stand in the order of their rows.
    """
    against, usable = _against(rewards, label)
    rows = np.flatnonzero(usable & against.all(0)) if len(against) else np.empty(0, np.int64)
    person = np.sign(np.asarray(label, np.float64) - 0.5)
    logits = np.empty((len(against), len(rows)))
    for member, (reward_0, reward_1) in enumerate(rewards.values()):
        difference = _difference(reward_0, reward_1)
        logits[member] = difference[rows] / fit_temperature(difference, label)
    doubt = (-logits * person[rows]).min(0) if len(rows) else np.empty(0)
    with np.errstate(over="ignore"):
        committee = 1 / (1 + np.exp(-logits.mean(0))) if len(rows) else np.empty(0)
    order = np.argsort(-doubt, kind="stable")
    columns = [rows, np.asarray(label, np.float64)[rows], committee, doubt]
    return pa.table([pa.array(c[order]) for c in columns], names=MISLABELLED.names).cast(
        MISLABELLED
    )


class Noise(NamedTuple):
    """The share of the labels that are wrong, its 95 % interval, and how many pairs tell it."""

    share: float
    low: float
    high: float
    pairs: int


def wrong_labels(rewards: Rewards, label: Array, prompt: Array) -> Noise | None:
    """The share of the labels that are wrong, as far as a committee can tell.

    Three who err independently of each other need no truth (Hui and Walter 1980; Dawid and Skene
    1979): with c_ij = 2 P(i and j prefer the same image) - 1 and e_i how often i is wrong,
    c_ij = (1 - 2 e_i)(1 - 2 e_j). So of the person's error e, from all members i < j::

        (1 - 2 e)^2 = sum of c_i c_j / sum of c_ij,    c_i: the person's with member i

    Labels that are turned round with probability f make it e + f (1 - 2 e), as they should. Members
    that learned from the same data err together, which makes it too large.

    Parameters
    ----------
    rewards, label
        As for `dissent`.
    prompt
        The number of each pair's prompt, from 0, [pairs]. The interval is a jackknife's over
        `GROUPS` groups of prompts.

    Returns
    -------
    Noise
        None for fewer than two members or `LEAST` pairs, and where members agree with each other,
        or with the people, no more than chance would.
    """
    against, usable = _against(rewards, label)
    same = 1.0 - 2.0 * against[:, usable]  # 1 where a member agrees with the person, else -1
    members, n = same.shape
    if members < 2 or n < LEAST:
        return None
    group = np.asarray(prompt)[usable] % GROUPS
    one, other = np.triu_indices(members, 1)
    counts = np.bincount(group, minlength=GROUPS)
    person = np.stack([np.bincount(group, row, GROUPS) for row in same])
    both = np.stack(
        [np.bincount(group, same[i] * same[j], GROUPS) for i, j in zip(one, other, strict=True)]
    ).sum(0)

    def error(kept: Array) -> float:
        c = np.maximum(person[:, kept].sum(1) / counts[kept].sum(), 0)
        among = both[kept].sum() / counts[kept].sum()
        square = (c[one] * c[other]).sum() / among if among > 0 else 0.0
        return float((1 - np.sqrt(min(square, 1.0))) / 2)

    places = np.flatnonzero(counts)
    share = error(places)
    if share == 0.5 or len(places) < 2:
        return None
    # (G - 1) / G * sum of (e without group g - their mean)^2
    without = np.array([error(places[places != place]) for place in places])
    spread = np.sqrt((len(places) - 1) * without.var())
    low, high = max(0.0, share - Z95 * spread), min(0.5, share + Z95 * spread)
    return Noise(share, float(low), float(high), n)


class Agreement(NamedTuple):
    """The share of pairs where the margin agrees with the person, and its 95 % interval."""

    share: float
    low: float
    high: float
    n: int


def wilson(agreed: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson (1927); (NaN, NaN) for no pairs.

    Inside [0, 1] and honest for few pairs and for shares near 1, unlike the normal interval.

    Parameters
    ----------
    agreed
        How many agreed; ties counted half.
    n
        Of how many.
    """
    if n == 0:
        return float("nan"), float("nan")
    share = agreed / n
    # (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    middle = share + Z95**2 / (2 * n)
    half = Z95 * float(np.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n)))
    scale = 1 + Z95**2 / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def clustered(right: Array, prompt: Array) -> Agreement:
    """A share and its 95 % interval, where the pairs of one prompt are not independent.

    Wilson's interval for as many independent pairs as would vary as much (Korn and Graubard 1998)::

        V = G / (G - 1) * sum over prompts of (sum of (right - share) in it)^2 / n^2
        n' = share (1 - share) / V, at most n; the number of prompts G where V is 0

    Parameters
    ----------
    right
        1, 0, or 1/2 for what is half right, [pairs].
    prompt
        The number of each pair's prompt, from 0, [pairs].
    """
    n = len(right)
    if not n:
        return Agreement(float("nan"), float("nan"), float("nan"), 0)
    share = float(np.mean(right))
    off, groups = np.bincount(prompt, right - share), int(np.count_nonzero(np.bincount(prompt)))
    variance = groups / max(groups - 1, 1) * float(off @ off) / n**2
    alike = variance < 1e-12 or groups == 1
    independent = min(max(groups if alike else share * (1 - share) / variance, 1.0), float(n))
    return Agreement(share, *wilson(share * independent, independent), n)


def draw_rows(count: int, most: int) -> npt.NDArray[np.int64]:
    """At most ``most`` of ``count`` rows, ascending, always the same ones."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def agreement(signed_margin: Array) -> Agreement:
    """How often the margin agrees with the person.

    Parameters
    ----------
    signed_margin
        Positive where it agrees, float32 [pairs]. NaN (a tie of the person's, a pair not
        scored) is left out; 0 (the scorer sees no difference) counts half.
    """
    known = signed_margin[~np.isnan(signed_margin)]
    agreed = float((known > 0).sum() + 0.5 * (known == 0).sum())
    n = len(known)
    return Agreement(agreed / n if n else float("nan"), *wilson(agreed, n), n)


def by_margin(signed_margin: Array) -> Array:
    """The signed margins that are known, the largest absolute ones first, [known pairs]."""
    known = signed_margin[~np.isnan(signed_margin)]
    ordered: Array = known[np.argsort(-np.abs(known), kind="stable")]
    return ordered


def agreement_by_margin(
    signed_margin: Array,
    fractions: Iterable[float] = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0),
) -> pa.Table:
    """Agreement with the people among the pairs of largest margin.

    Parameters
    ----------
    signed_margin
        As `fifa.scoring.margin.committee` gives it, float32 [pairs]; pairs without one are left
        out.
    fractions
        Which parts of the rest to look at, each in (0, 1]; rounded to whole pairs, at least 1.

    Returns
    -------
    pyarrow.Table
        A row a fraction: ``fraction``, ``n`` (pairs in it), ``threshold`` (their smallest
        margin), ``share``, ``low``, ``high`` (a 95 % Wilson interval), all float64 but ``n``.
    """
    ordered = by_margin(signed_margin)
    # a pair that agrees counts 1, one without a difference 1/2
    agreed = np.cumsum(np.sign(ordered) + 1, dtype=np.float64) / 2
    rows = []
    for fraction in fractions if len(ordered) else ():
        n = min(len(ordered), max(1, round(fraction * len(ordered))))
        share, threshold = float(agreed[n - 1]) / n, abs(float(ordered[n - 1]))
        rows.append((fraction, n, threshold, share, *wilson(float(agreed[n - 1]), n)))
    names = ("fraction", "n", "threshold", "share", "low", "high")
    schema = pa.schema([(name, pa.int64() if name == "n" else pa.float64()) for name in names])
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema)


def _right(logits: Array, label: Array) -> tuple[Array, Array]:
    """1, 1/2 or 0 a pair, and which pairs have a majority."""
    person = np.sign(np.asarray(label, np.float64) - 0.5)
    right: Array = (1 + np.sign(logits) * person) / 2
    return right, person != 0


def _against(rewards: Rewards, label: Array) -> tuple[npt.NDArray[np.bool_], Array]:
    """Who contradicts the person where, [members, pairs], and the pairs where all can be judged."""
    person = np.sign(np.asarray(label, np.float64) - 0.5)
    usable = person != 0
    against = np.zeros((len(rewards), len(person)), bool)
    for member, (reward_0, reward_1) in enumerate(rewards.values()):
        difference = _difference(reward_0, reward_1)
        usable &= np.isfinite(difference) & (difference != 0)
        against[member] = np.sign(difference) == -person
    return against, usable


def _difference(reward_0: Array, reward_1: Array) -> npt.NDArray[np.float64]:
    """reward_0 - reward_1; NaN where a side is not finite."""
    with np.errstate(invalid="ignore"):
        difference = np.asarray(reward_0, np.float64) - np.asarray(reward_1, np.float64)
    difference[~np.isfinite(difference)] = np.nan
    return difference
