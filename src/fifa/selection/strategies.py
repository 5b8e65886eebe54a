"""Strategies: the order in which eligible pairs are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from fifa.selection.greedy import Greedy, facility_location, farthest_point, spread
from fifa.selection.order import Rows, ascending, draws

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Candidates:
    """The eligible pairs, as a strategy sees them.

    Parameters
    ----------
    rows
        int32 [eligible], their rows in the table, ascending.
    ids
        `fifa.selection.order.id_bytes` of the whole table.
    importance
        float32 [eligible].
    margin
        float32 [eligible], absolute; None without a scorer.
    prompt
        int32 [eligible], the prompt's row in `Pairs.prompts`.
    count
        How many pairs are to be kept.
    seed
        For the strategies that draw.
    embeddings
        Gives float32 [prompts, d], L2-normalised, for the strategies over prompts.
    """

    rows: Rows
    ids: npt.NDArray[np.bytes_]
    importance: Floats
    margin: Floats | None
    prompt: Rows
    count: int
    seed: int
    embeddings: Callable[[], Floats]


@dataclass(frozen=True)
class Strategy:
    """How pairs are taken.

    Parameters
    ----------
    order
        From the candidates to their rows, first taken first.
    needs
        Without which it has nothing to go by: ``margin``; ``importance`` (any score with a
        weight); ``embeddings``; or nothing.
    unanimous
        Only pairs are eligible on which every scorer agrees with the person.
    soft
        There is no cut: every eligible pair is kept, with `soft_weights`.
    """

    order: Callable[[Candidates], Rows]
    needs: Literal["margin", "importance", "embeddings", ""] = "importance"
    unanimous: bool = False
    soft: bool = False


def by_importance(pairs: Candidates) -> Rows:
    """FiFA's top-K: most important first."""
    return ascending(-pairs.importance, pairs.ids, pairs.rows)


def by_chance(pairs: Candidates) -> Rows:
    """A seeded draw that depends on the pairs' ids, not on their rows."""
    return ascending(draws(pairs.ids, pairs.rows, pairs.seed), pairs.ids, pairs.rows)


def by_margin(pairs: Candidates, key: Callable[[Floats], Floats]) -> Rows:
    """By a key of the absolute margin, smallest first."""
    assert pairs.margin is not None  # `gather_terms` has refused the strategy otherwise
    return ascending(key(pairs.margin), pairs.ids, pairs.rows)


def over_prompts(pairs: Candidates, greedy: Greedy) -> Rows:
    """A pair of every prompt in turn, prompts as `fifa.selection.greedy` takes them."""
    best = by_importance(pairs)
    prompts = pairs.prompt[np.searchsorted(pairs.rows, best)]  # rows are ascending
    return best[spread(prompts, pairs.embeddings, greedy, pairs.count)]


def from_median(margin: Floats) -> Floats:
    """The distance to the median, float32."""
    return np.asarray(np.abs(margin - np.float32(np.median(margin))))


# A row for every name in `fifa.config.STRATEGIES`, which says in words what it does.
STRATEGIES = {
    "fifa": Strategy(by_importance),
    "random": Strategy(by_chance, needs=""),
    "low": Strategy(partial(by_margin, key=np.positive), needs="margin"),
    "middle": Strategy(partial(by_margin, key=from_median), needs="margin"),
    "high": Strategy(partial(by_margin, key=np.negative), needs="margin"),
    "consensus": Strategy(by_importance, needs="margin", unanimous=True),
    "facility": Strategy(partial(over_prompts, greedy=facility_location), needs="embeddings"),
    "farthest": Strategy(partial(over_prompts, greedy=farthest_point), needs="embeddings"),
    "weights": Strategy(by_importance, soft=True),
}


def soft_weights(importance: Floats) -> Floats:
    """Weights for the loss in place of a cut: float32 [kept pairs], mean 1.

    The logistic function squeezes importance, as SmPO's soft labels squeeze reward margins:
    an outlier weighs at most twice as much as an average pair before the normalisation.
    """
    # w_i = s(I_i) / mean_j s(I_j),  s(x) = 1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2
    soft = 0.5 * (1.0 + np.tanh(0.5 * importance.astype(np.float64)))
    total = np.sort(soft).mean()  # sorted: a sum that does not depend on the rows' order
    return (soft / total).astype(np.float32) if total > 0 else np.ones_like(importance)
