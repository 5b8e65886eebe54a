"""Hard gates: what no importance buys back."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fifa.config import Select
from fifa.selection.components import Mask, Terms
from fifa.selection.table import BELOW_CUTOFF, GATES, REASONS


def reason_codes(
    table: pa.Table, terms: Terms, knobs: Select, unreadable: Collection[str]
) -> npt.NDArray[np.uint8]:
    """Ask every gate, in the order of `fifa.selection.table.GATES`.

    Parameters
    ----------
    table
        ``pair_id``, ``label`` and ``repeat`` of `Pairs.table`.
    terms
        The scores by pair.
    knobs
        Which gates are closed.
    unreadable
        Ids of the pairs with an image that cannot be decoded.

    Returns
    -------
    uint8 [pairs], index into `REASONS`: the first gate that stops the pair, or ``below_cutoff``
    for one that is eligible and so far not selected.
    """
    codes = np.full(table.num_rows, BELOW_CUTOFF, np.uint8)
    for reason, stopped in _gates(table, terms, knobs, unreadable):
        codes[stopped & (codes == BELOW_CUTOFF)] = REASONS.index(reason)
    if terms.margin is not None and knobs.margin_percentiles != (0.0, 100.0):
        eligible = codes == BELOW_CUTOFF
        if eligible.any():
            ordered = np.sort(terms.margin[eligible]).astype(np.float64)
            low, high = np.percentile(ordered, knobs.margin_percentiles)
            outside = eligible & ((terms.margin < low) | (terms.margin > high))
            codes[outside] = REASONS.index("outside_margin_window")
    return codes


def _gates(
    table: pa.Table, terms: Terms, knobs: Select, unreadable: Collection[str]
) -> Iterator[tuple[str, Mask]]:
    for reason in GATES:
        stopped = _stopped(reason, table, terms, knobs, unreadable)
        if stopped is not None:
            yield reason, stopped


def _stopped(
    reason: str, table: pa.Table, terms: Terms, knobs: Select, unreadable: Collection[str]
) -> Mask | None:
    match reason:
        case "tie":
            # a label that is no number names no winner either
            label = table["label"].to_numpy()
            return np.asarray((label == 0.5) | np.isnan(label))
        case "duplicate" if knobs.drop_duplicates:
            return _mask(table["repeat"])
        case "unreadable_image" if len(unreadable):
            return _mask(pc.is_in(table["pair_id"], value_set=pa.array(sorted(unreadable))))
        case "unsafe_prompt":
            return terms.unsafe
        case "low_quality_prompt":
            return _low_quality(terms, knobs)
        case "not_scored":
            return _not_scored(terms, knobs, table.num_rows)
        case "contradicts_label" if terms.agreement is not None:
            share = 1.0 if knobs.strategy == "consensus" else knobs.min_agreement
            # in float32, as agreement is: 7 scorers of 10 are not below 0.7
            return terms.agreement < np.float32(share) if share is not None else None
        case "outside_margin_window" if terms.margin is not None:
            low, high = knobs.margin_window
            outside = np.zeros(table.num_rows, bool)
            if low is not None:
                outside |= terms.margin < np.float32(low)
            if high is not None:
                outside |= terms.margin > np.float32(high)
            return outside
    return None


def _low_quality(terms: Terms, knobs: Select) -> Mask | None:
    low = terms.nonsense if knobs.drop_nonsense else None
    if terms.quality is not None and knobs.min_quality is not None:
        below = terms.quality < np.float32(knobs.min_quality)
        low = below if low is None else low | below
    return low


def _not_scored(terms: Terms, knobs: Select, n: int) -> Mask:
    missing = np.zeros(n, bool)
    if terms.margin is not None:
        missing |= np.isnan(terms.margin)
    if terms.quality is not None and (knobs.alpha > 0 or knobs.min_quality is not None):
        missing |= np.isnan(terms.quality)
    if terms.unrated is not None and (knobs.unsafe_flags or knobs.drop_nonsense):
        missing |= terms.unrated  # a prompt that nobody rated is not known to be safe
    if terms.diversity is not None and knobs.gamma > 0:
        missing |= np.isnan(terms.diversity)
    return missing


def _mask(column: pa.ChunkedArray) -> Mask:
    return np.asarray(column.to_numpy(), bool)
