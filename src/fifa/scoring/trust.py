"""Whether a margin may be trusted on this data set: measured on the people's own labels.

What is counted how:

- a pair whose label is 1/2 has no winner: it is no part of an accuracy, but of the calibration;
- of votes (a label of 0.7) the majority is the winner, and the share is what calibration is
  measured against;
- where the judge sees no difference, it is half right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fifa.formatting import interval, percent
from fifa.scoring.rewards.metrics import (
    BINS,
    Agreement,
    calibration_error,
    clustered,
    draw_rows,
    fit_temperature,
)

Floats = npt.NDArray[np.float64]

USABLE = 0.6  # a margin is usable where it is known to be right more often than this
LEAST = 20  # pairs in a part
PARTS = 10  # of the pairs, by margin
MOST = 200_000  # pairs that a judge is measured on; a larger set is sampled
REFUSED = ("near chance", "contradicts", "position")


class Part(NamedTuple):
    """One part of the pairs by margin: the smallest one in it, and how often it is right."""

    margin: float
    own: Agreement
    onwards: Agreement  # in this part and all those with larger margins


class Bin(NamedTuple):
    """The pairs of about one confidence: its mean, and the people's share on the judge's side."""

    confidence: float
    outcome: float
    n: int


@dataclass(frozen=True)
class Trust:
    """A judge against the people's labels; intervals are `fifa.scoring.rewards.metrics.clustered`.

    Parameters
    ----------
    judge
        Its name.
    pairs, unscored, ties
        All pairs, those without a margin, and of the others those without a winner.
    accuracy
        How often the judge prefers the people's winner.
    parts
        The same by margin, smallest first: up to `PARTS` of at least `LEAST` pairs each.
    won_by_0, won_by_1
        The same for the pairs where people prefer image 0, and where they prefer image 1.
    first, people_first
        How often the judge, and people, prefer image 0.
    temperature, ece, bins
        sigmoid(margin / temperature) as a probability, its calibration error and its bins. The
        temperature is fitted to the same labels.
    sampled
        How many pairs this was measured on; 0 for all.
    """

    judge: str
    pairs: int
    unscored: int
    ties: int
    accuracy: Agreement
    parts: tuple[Part, ...]
    won_by_0: Agreement
    won_by_1: Agreement
    first: Agreement
    people_first: Agreement
    temperature: float
    ece: float
    bins: tuple[Bin, ...]
    sampled: int

    @property
    def usable(self) -> int | None:
        """The part from which on the margin is usable; None if there is none.

        It is the lowest one of more than `USABLE`, where accuracy is taken to rise with the margin
        (isotonic regression), so that from it on the interval's lower end is above that too.
        """
        share, n = (np.array([getattr(p.own, of) for p in self.parts]) for of in ("share", "n"))
        for k, part in enumerate(self.parts):
            # max over a <= k of min over b >= k of the mean of parts a to b
            rising = max(
                min(
                    np.average(share[a : b + 1], weights=n[a : b + 1]) for b in range(k, len(share))
                )
                for a in range(k + 1)
            )
            if rising > USABLE and part.onwards.low > USABLE:
                return k
        return None

    @property
    def finding(self) -> str:
        """``usable``, ``weak``, ``too few``, or one of `REFUSED`."""
        sides = self.won_by_0, self.won_by_1
        if any(one.high < 0.5 for one in sides) and any(one.low > 0.5 for one in sides):
            return "position"
        if self.accuracy.high < 1 - USABLE:
            return "contradicts"
        if self.usable is not None:
            return "usable"
        if self.parts and self.parts[len(self.parts) // 2].onwards.high < USABLE:
            return "near chance"
        return "weak" if self.accuracy.low > 0.5 else "too few"

    @property
    def refused(self) -> bool:
        """True if a selection by this margin would be one by noise, as far as labels can tell."""
        return self.finding in REFUSED

    @property
    def verdict(self) -> str:
        """The finding as a sentence."""
        if self.finding == "usable":
            k = self.usable or 0
            where = f"from a margin of {self.parts[k].margin:.3g} on" if k else "at every margin"
            return f"usable {where}: right on {_words(self.parts[k].onwards)}"
        of_all, sides = _words(self.accuracy), (_words(self.won_by_0), _words(self.won_by_1))
        return {
            "position": f"it answers by position: right on {sides[0]} that image 0 won, and on "
            f"{sides[1]} that image 1 won",
            "contradicts": f"it contradicts the people: right on {of_all} only; its images or "
            "columns may be the wrong way round",
            "near chance": f"near chance here: right on {of_all}, and on no more than "
            f"{percent(USABLE)} of those with the larger margins",
            "weak": f"weak: right on {of_all}, and at no margin known to be right on more than "
            f"{percent(USABLE)}",
            "too few": f"too few pairs to tell: right on {of_all}",
        }[self.finding]


def measure_trust(
    judge: str, difference: npt.ArrayLike, label: npt.ArrayLike, prompt: npt.ArrayLike
) -> Trust:
    """How far one judge's margin may be trusted.

    Parameters
    ----------
    judge
        Its name.
    difference
        reward_0 - reward_1, [pairs]; what is not finite is not scored.
    label
        The probability that a person prefers image 0, [pairs]; 0.5 is a tie.
    prompt
        What tells prompts apart, [pairs].
    """
    rows = draw_rows(len(np.asarray(label)), MOST)
    margin, people = (np.asarray(v)[rows].astype(np.float64) for v in (difference, label))
    _, group = np.unique(np.asarray(prompt)[rows], return_inverse=True)
    scored = np.isfinite(margin)
    tie = (people == 0.5) | np.isnan(people)
    calibrated = scored & ~np.isnan(people)
    temperature = fit_temperature(margin[calibrated], people[calibrated])
    logits, outcome = margin[calibrated] / temperature, people[calibrated]
    known = np.flatnonzero(scored & ~tie)
    known = known[np.argsort(np.abs(margin[known]), kind="stable")]
    margin, group, won = margin[known], group[known], people[known] > 0.5
    first = (1 + np.sign(margin)) / 2
    right = np.where(won, first, 1 - first)
    count = min(PARTS, len(known) // LEAST)
    ends = [round(len(known) * k / count) for k in range(count + 1)] if count else []
    return Trust(
        judge=judge,
        pairs=len(np.asarray(label)),
        unscored=int((~scored).sum()),
        ties=int((scored & tie).sum()),
        accuracy=clustered(right, group),
        parts=tuple(
            Part(
                abs(float(margin[low])),
                clustered(right[low:high], group[low:high]),
                clustered(right[low:], group[low:]),
            )
            for low, high in pairwise(ends)
        ),
        won_by_0=clustered(right[won], group[won]),
        won_by_1=clustered(right[~won], group[~won]),
        first=clustered(first, group),
        people_first=clustered(won.astype(np.float64), group),
        temperature=temperature,
        ece=calibration_error(logits, outcome),
        bins=_bins(logits, outcome),
        sampled=len(rows) if len(rows) < len(np.asarray(label)) else 0,
    )


def _bins(logits: Floats, label: Floats) -> tuple[Bin, ...]:
    """Those of `fifa.scoring.rewards.metrics.calibration_error` that have pairs."""
    confidence = 1 / (1 + np.exp(-np.abs(logits)))
    outcome = np.where(logits >= 0, label, 1 - label)
    which = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return tuple(
        Bin(float(confidence[here].mean()), float(outcome[here].mean()), int(here.sum()))
        for here in (which == k for k in range(BINS))
        if here.any()
    )


def same_verdicts(
    differences: Mapping[str, npt.ArrayLike], prompt: npt.ArrayLike
) -> dict[tuple[str, str], Agreement]:
    """How often each two judges prefer the same image, of the pairs that both have an opinion on.

    ``differences`` are reward_0 - reward_1 a judge, [pairs]; ``prompt`` is the number of each
    pair's prompt, from 0.
    """
    found = {}
    for one, other in combinations(differences, 2):
        product = np.sign(np.asarray(differences[one])) * np.sign(np.asarray(differences[other]))
        both = np.flatnonzero(np.isfinite(product) & (product != 0))
        same = (product[both] > 0).astype(np.float64)
        found[one, other] = clustered(same, np.asarray(prompt)[both])
    return found


def _words(share: Agreement) -> str:
    """A share in a sentence."""
    if not share.n:
        return "none of no pairs"
    return f"{percent(share.share)} ({interval(share)}) of {share.n:,} pairs"
