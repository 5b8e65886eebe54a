"""``--margin arena``: how far apart two images are, from their generators' names alone.

Each generator has a strength, fitted to the data set's own votes; no image is opened. A pair's own
prompt never takes part in the strengths that it is scored by.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.config import Reward
from fifa.console import echo, note
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.rewards.head import prompt_folds
from fifa.scoring.specs import Spec
from fifa.scoring.table import BLIND, MARGIN, score_path, scored_once
from fifa.shards.files import column_digest
from fifa.shards.ledger import Ledger

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MOST = 500  # generators
GROUPS = 10_000  # of prompts: their sums are in memory
ROUNDS = 100  # of fitting the spread of the strengths
LARGEST = 30.0  # log-odds


@dataclass(frozen=True)
class Strengths:
    """How strong generators are.

    Parameters
    ----------
    value
        In log-odds: sigmoid(value_a - value_b) is how often a's image is preferred to b's,
        float64 [generators]; NaN for those that are not ``connected``.
    covariance
        Of their estimates, float64 [generators, generators].
    spread
        The standard deviation of strengths, which they are shrunk by.
    connected
        Which ones votes lead to, over any number of others, from most of the votes.
    """

    value: Floats
    covariance: Floats
    spread: float
    connected: npt.NDArray[np.bool_]

    def gaps(self, zero: Integers, one: Integers) -> Floats:
        """The expected log-odds that ``zero`` wins against ``one``, [pairs]; NaN if not connected.

        The gap of the strengths, shrunk by how uncertain it is (MacKay 1992)::

            m = value_0 - value_1,  v = variance of m,  gap = m / sqrt(1 + pi v / 8)

        so that sigmoid(gap) is about the mean of sigmoid over what m may be.
        """
        own = np.diag(self.covariance)
        variance = own[zero] + own[one] - 2 * self.covariance[zero, one]
        gap = (self.value[zero] - self.value[one]) / np.sqrt(
            1 + np.pi * np.maximum(variance, 0) / 8
        )
        found: Floats = np.where(self.connected[zero] & self.connected[one], gap, np.nan)
        return found


def fit_strengths(
    zero: Integers, one: Integers, label: Floats, prompt: Integers, generators: int
) -> Strengths:
    """Bradley and Terry's model (1952), a tie as half a win of either, of votes as their share::

        log P = sum of y log sigmoid(t_0 - t_1) + (1 - y) log sigmoid(t_1 - t_0)
                - sum of t^2 / (2 spread^2)

    The spread is the one under which the strengths are likeliest (empirical Bayes, by EM). The
    covariance is H^-1 (M + I / spread^2) H^-1 with the Hessian H and the sum M over prompts of
    s s', s being a prompt's gradient: the pairs of one prompt are not independent. With fewer
    prompts than generators M is the Fisher information.

    Parameters
    ----------
    zero, one
        The generator of either image, [pairs].
    label
        The probability that a person prefers image 0, [pairs].
    prompt
        What tells prompts apart, [pairs].
    generators
        How many there are.
    """
    other = zero != one
    zero, one, label, prompt = (values[other] for values in (zero, one, label, prompt))
    n = generators
    won = np.bincount(zero * n + one, label, n * n) + np.bincount(one * n + zero, 1 - label, n * n)
    wins: Floats = won.reshape(n, n).astype(np.float64)  # bincount of nothing counts in integers
    met = wins + wins.T
    connected = _connected(met)
    strength, squared, spread = np.zeros(n), 1.0, 0.0
    for _ in range(ROUNDS):
        for _ in range(50):
            chance = 1 / (1 + np.exp(strength[None] - strength[:, None]))
            gradient = (wins - met * chance).sum(1) - strength / squared
            informs = met * chance * (1 - chance)
            fisher = np.diag(informs.sum(1)) - informs
            inverse = np.linalg.inv(fisher + np.eye(n) / squared)
            step = inverse @ gradient
            strength = strength + np.clip(step, -1, 1)
            if np.abs(step).max() < 1e-9:
                break
        # E[t^2] = t^2 + its variance, the mean over the generators
        before, squared = squared, float((strength**2 + np.diag(inverse))[connected].mean())
        if abs(squared - before) < 1e-6 * before:
            break
    spread = float(np.sqrt(squared))
    # s: a pair adds y - P to its image 0's generator, and takes it from the other one's
    off = label - 1 / (1 + np.exp(strength[one] - strength[zero]))
    group = prompt % GROUPS
    sums = np.bincount(group * n + zero, off, GROUPS * n)
    sums = (sums - np.bincount(group * n + one, off, GROUPS * n)).reshape(GROUPS, n)
    several = len(np.unique(group))
    if several > n:
        fisher = several / (several - 1) * sums.T @ sums
    covariance = inverse @ (fisher + np.eye(n) / squared) @ inverse
    # strengths are known up to a constant: their mean is 0
    centre = np.eye(n) - connected[None] / max(connected.sum(), 1)
    return Strengths(
        value=np.where(connected, centre @ strength, np.nan),
        covariance=centre @ covariance @ centre.T,
        spread=spread,
        connected=connected,
    )


def _connected(met: Floats) -> npt.NDArray[np.bool_]:
    """The part with most votes of those that no vote leads out of."""
    left, best = set(range(len(met))), np.zeros(len(met), bool)
    while left:
        part = np.zeros(len(met), bool)
        part[left.pop()] = True
        while (more := part | (met[part] > 0).any(0)).sum() > part.sum():
            part = more
        left -= set(np.flatnonzero(part).tolist())
        if met[part].sum() > met[best].sum():
            best = part
    return best


def gap_after_choice(gap: Floats, label: Floats) -> Floats:
    """The expected difference of two images, from the expected log-odds and who won, [pairs].

    In Bradley and Terry's model a person compares the images' values, whose difference L is
    logistic around ``gap``, and prefers image 0 where L > 0::

        E[L | L > 0] = log(1 + e^gap) / sigmoid(gap)
        E[L | L < 0] = -log(1 + e^-gap) / sigmoid(-gap)

    mixed by the label y and 1 - y. It is large where the stronger generator won, and between 0
    and -+1.39 where the weaker one did.
    """
    gap = np.clip(gap, -LARGEST, LARGEST)
    # 1 / sigmoid(g) = 1 + e^-g
    after_0 = np.logaddexp(0, gap) * (1 + np.exp(-gap))
    after_1 = -np.logaddexp(0, -gap) * (1 + np.exp(gap))
    mixed: Floats = label * after_0 + (1 - label) * after_1
    return mixed


def arena_rewards(pairs: Pairs, spec: Spec, folder: Path | None = None) -> pa.Table:
    """What the generators' names, and for ``arena`` the person's choice, say of every pair.

    Parameters
    ----------
    pairs
        The pairs, with ``model_0`` and ``model_1``.
    spec
        ``arena``: reward_0 - reward_1 is `gap_after_choice`, and a further column `BLIND` has the
        gap without it. ``arena:names``: it is `Strengths.gaps`.
    folder
        Where the table is kept; None keeps nothing.

    Returns
    -------
    pyarrow.Table
        `fifa.scoring.table.MARGIN`, row by row with ``pairs.table``; NaN where a generator is not
        named, or not connected with the others by votes on other prompts.

    Raises
    ------
    FifaError
        For pairs without generators, too many of them, and fewer than two prompts.
    """
    if "model_0" not in pairs.table.column_names:
        raise FifaError(
            "the source does not say which generator made an image",
            where=pairs.origin.source,
            do="name the columns with --columns model_0=...,model_1=..., or take another --margin",
        )
    named = [pairs.table[name].cast(pa.string()) for name in ("model_0", "model_1")]
    content = [pairs.pairs_digest, *map(column_digest, named)]
    content.append(column_digest(pairs.table["label"].cast(pa.string())))
    path = folder and score_path(folder, "margin", spec.text, *content)

    def make(ledger: Ledger) -> pa.Table:
        both = pa.chunked_array([*named[0].chunks, *named[1].chunks]).dictionary_encode()
        both = both.unify_dictionaries().combine_chunks()
        names = both.dictionary.to_pylist()
        if len(names) > MOST:
            raise FifaError(
                f"{len(names):,} names of generators; arena takes {MOST}",
                where=pairs.origin.source,
                do="name columns that hold generators, not images, or take another --margin",
            )
        zero, one = np.split(both.indices.fill_null(-1).to_numpy().astype(np.int64), 2)
        gap, facts = _crossfitted(pairs, zero, one, names)
        ids = pairs.table["pair_id"].combine_chunks()
        label = pairs.table["label"].to_numpy().astype(np.float64)
        difference = gap if spec.name != "arena" else gap_after_choice(gap, label)
        halves = [pa.array((sign * difference / 2).astype(np.float32)) for sign in (1, -1)]
        table = pa.table([ids, *halves], schema=MARGIN)
        if spec.name == "arena":
            table = table.append_column(BLIND, pa.array(gap.astype(np.float32)))
        note(margin_pairs=len(pairs), margin_not_finite=int(np.isnan(gap).sum()))
        return table.replace_schema_metadata({"fifa.score": json.dumps(facts)})

    return scored_once(path, make, {"scorer": spec.text})


def _crossfitted(
    pairs: Pairs, zero: Integers, one: Integers, names: list[str]
) -> tuple[Floats, dict[str, Any]]:
    """The gap of every pair by strengths from other prompts, and the facts of all strengths."""
    label = pairs.table["label"].to_numpy().astype(np.float64)
    prompt = pairs.table["prompt_index"].to_numpy().astype(np.int64)
    keys = [chunk for side in (0, 1) for chunk in pairs.table[f"image_{side}"].chunks]
    image = pa.chunked_array(keys, pa.string()).dictionary_encode().unify_dictionaries()
    images = image.combine_chunks().indices.to_numpy().astype(np.int64).reshape(2, -1).T
    folds = min(Reward.folds, len(np.unique(prompt)))
    if folds < 2:
        raise FifaError(
            "strengths come from votes on other prompts, and there is one prompt",
            where=pairs.origin.source,
            do="take another --margin",
        )
    fold = prompt_folds(pairs.prompts["prompt_id"], prompt, images, folds=folds)[prompt]
    known = (zero >= 0) & (one >= 0) & ~np.isnan(label)
    gap = np.full(len(pairs), np.nan)

    def fitted(rows: npt.NDArray[np.bool_]) -> Strengths:
        return fit_strengths(zero[rows], one[rows], label[rows], prompt[rows], len(names))

    for k in range(folds):
        here = known & (fold == k)
        gap[here] = fitted(known & (fold != k)).gaps(zero[here], one[here])
    found = fitted(known)
    deviation = np.sqrt(np.diag(found.covariance))
    order = np.argsort(-found.value)  # NaN last
    strengths = {
        names[g]: [round(float(found.value[g]), 4), round(float(deviation[g]), 4)]
        for g in order
        if found.connected[g]
    }
    apart = sorted(name for name, there in zip(names, found.connected, strict=True) if not there)
    first, last = next(iter(strengths), "-"), next(reversed(strengths), "-")
    lost = int(np.isnan(gap).sum())
    echo(
        f"margin arena: {len(strengths)} generators, the strongest is {first}, the weakest {last}; "
        f"the spread of strengths is {found.spread:.2f} in log-odds"
        + (f"; {lost:,} pairs without a margin" if lost else "")
    )
    if apart:
        listed = ", ".join(apart[:10]) + (", ..." if len(apart) > 10 else "")
        echo(f"  not connected with the others by votes: {listed}")
    return gap, {"folds": folds, "spread": found.spread, "strengths": strengths, "apart": apart}
