"""What several reward models, taken together, say of a data set's labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.scoring.rewards.calibrate import fit_temperature, measure

Array = npt.NDArray[Any]
Rewards = Mapping[str, tuple[Array, Array]]

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
        found = measure(logits / temperature, label, prompt, seed=seed).as_dict()
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
