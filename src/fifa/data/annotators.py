"""How far each annotator can be relied on, learned from where they judge the same pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer[Any]]

ROUNDS = 500
TOLERANCE = 1e-6  # of a probability, between two rounds
SMOOTHING = 1.0  # votes that every annotator is thought to have given rightly, and wrongly


@dataclass(frozen=True)
class Reliability:
    """What `dawid_skene` learned.

    Parameters
    ----------
    label
        The probability that the people would choose image 0, float64 [pairs].
    right_0, right_1
        How often an annotator says image 0 where it is the better one, and image 1 where that is,
        float64 [annotators].
    right
        How often an annotator is right, as far as the others can tell, float64 [annotators].
    votes
        Of each annotator, int64 [annotators].
    """

    label: Floats
    right_0: Floats
    right_1: Floats
    right: Floats
    votes: Integers


def dawid_skene(pair: Integers, annotator: Integers, vote: Floats) -> Reliability:
    """Dawid and Skene's model (1979) for two classes, by EM from the share of the votes.

    With q_i the probability that image 0 of pair i is the better one, and v a vote (1 for image 0,
    1/2 for a tie, which is half a vote for either)::

        M: a_k = P(k says 0 | 0) = (sum of q v + s) / (sum of q + 2 s)
           b_k = P(k says 1 | 1) = (sum of (1 - q) (1 - v) + s) / (sum of (1 - q) + 2 s)
           p = mean of q
        E: log q / (1 - q) = log p / (1 - p)
           + sum over votes of v log a / (1 - b) + (1 - v) log (1 - a) / b

    s = `SMOOTHING` keeps an annotator of few votes from being certain.

    Parameters
    ----------
    pair, annotator
        Of each vote, numbers from 0, [votes].
    vote
        In [0, 1], [votes].
    """
    pairs, annotators = int(pair.max(initial=-1)) + 1, int(annotator.max(initial=-1)) + 1

    def of_annotators(values: Floats) -> Floats:
        sums: Floats = np.bincount(annotator, values, annotators).astype(np.float64)
        return sums

    label = np.bincount(pair, vote, pairs) / np.bincount(pair, minlength=pairs)
    for _ in range(ROUNDS):
        q = label[pair]
        right_0 = (of_annotators(q * vote) + SMOOTHING) / (of_annotators(q) + 2 * SMOOTHING)
        says_1 = of_annotators((1 - q) * (1 - vote)) + SMOOTHING
        right_1 = says_1 / (of_annotators(1 - q) + 2 * SMOOTHING)
        for_0, for_1 = np.log(right_0 / (1 - right_1)), np.log((1 - right_0) / right_1)
        prior = np.clip(label.mean(), 1e-9, 1 - 1e-9)
        evidence = np.bincount(pair, vote * for_0[annotator] + (1 - vote) * for_1[annotator], pairs)
        new = 1 / (1 + np.exp(-np.clip(np.log(prior / (1 - prior)) + evidence, -500, 500)))
        moved, label = float(np.abs(new - label).max(initial=0)), new
        if moved < TOLERANCE:
            break
    q, votes = label[pair], np.bincount(annotator, minlength=annotators)
    right = of_annotators(q * vote + (1 - q) * (1 - vote)) / np.maximum(votes, 1)
    return Reliability(label, right_0, right_1, right, votes)
