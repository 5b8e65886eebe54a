"""Strategies: the order in which eligible pairs are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    margins
        float32 [pairs], the absolute margins of the whole table; None without a scorer.
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
    margins: Floats | None
    prompt: Rows
    count: int
    seed: int
    embeddings: Callable[[], Floats]


Strategy = Callable[[Candidates], Rows]


def by_importance(pairs: Candidates) -> Rows:
    """FiFA's top-K: most important first."""
    return ascending(-pairs.importance, pairs.ids, pairs.rows)


def by_chance(pairs: Candidates) -> Rows:
    """A seeded draw that depends on the pairs' ids, not on their rows."""
    return ascending(draws(pairs.ids, pairs.rows, pairs.seed), pairs.ids, pairs.rows)


def by_low_margin(pairs: Candidates) -> Rows:
    """Smallest absolute margin first."""
    return ascending(_margin(pairs), pairs.ids, pairs.rows)


def by_high_margin(pairs: Candidates) -> Rows:
    """Largest absolute margin first."""
    return ascending(-_margin(pairs), pairs.ids, pairs.rows)


def by_middle_margin(pairs: Candidates) -> Rows:
    """Nearest to the median absolute margin first."""
    margin = _margin(pairs)
    distance = np.abs(margin - np.float32(np.median(margin)))
    return ascending(distance, pairs.ids, pairs.rows)


def by_facility_location(pairs: Candidates) -> Rows:
    """Prompts that best represent all prompts first (`fifa.selection.greedy`)."""
    return _over_prompts(pairs, facility_location)


def by_farthest_point(pairs: Candidates) -> Rows:
    """Prompts farthest from those already taken first (`fifa.selection.greedy`)."""
    return _over_prompts(pairs, farthest_point)


STRATEGIES: dict[str, Strategy] = {
    "fifa": by_importance,
    "random": by_chance,
    "low": by_low_margin,
    "middle": by_middle_margin,
    "high": by_high_margin,
    "consensus": by_importance,  # of the pairs that its gate lets through
    "facility": by_facility_location,
    "farthest": by_farthest_point,
    "weights": by_importance,  # keeps every eligible pair
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


def _margin(pairs: Candidates) -> Floats:
    assert pairs.margins is not None  # `gather_terms` has refused the strategy otherwise
    return np.asarray(pairs.margins[pairs.rows])


def _over_prompts(pairs: Candidates, greedy: Greedy) -> Rows:
    best = ascending(-pairs.importance, pairs.ids, pairs.rows)
    prompts = pairs.prompt[np.searchsorted(pairs.rows, best)]  # rows are ascending
    return best[spread(prompts, pairs.embeddings, greedy, pairs.count)]
