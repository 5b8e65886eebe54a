"""Hard gates: what no importance buys back."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fifa.config import Select
from fifa.selection.components import Mask, Terms
from fifa.selection.strategies import STRATEGIES
from fifa.selection.table import BELOW_CUTOFF, REASONS


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
    eligible = codes == BELOW_CUTOFF
    if terms.margin is not None and knobs.margin_percentiles != (0.0, 100.0) and eligible.any():
        ordered = np.sort(terms.margin[eligible]).astype(np.float64)
        low, high = np.percentile(ordered, knobs.margin_percentiles)
        outside = eligible & ((terms.margin < low) | (terms.margin > high))
        codes[outside] = REASONS.index("outside_margin_window")
    return codes


def _gates(
    table: pa.Table, terms: Terms, knobs: Select, unreadable: Collection[str]
) -> Iterator[tuple[str, Mask]]:
    """Every gate that is closed, and which pairs it stops."""
    label = table["label"].to_numpy()
    yield "tie", (label == 0.5) | np.isnan(label)  # no number names no winner either
    if knobs.drop_duplicates:
        yield "duplicate", _mask(table["repeat"])
    if len(unreadable):
        ids = pa.array(sorted(unreadable))
        yield "unreadable_image", _mask(pc.is_in(table["pair_id"], value_set=ids))
    if terms.unsafe is not None:
        yield "unsafe_prompt", terms.unsafe
    if terms.nonsense is not None and knobs.drop_nonsense:
        yield "low_quality_prompt", terms.nonsense
    if terms.quality is not None and knobs.min_quality is not None:
        yield "low_quality_prompt", terms.quality < np.float32(knobs.min_quality)
    yield "not_scored", _not_scored(terms, knobs, table.num_rows)
    share = 1.0 if STRATEGIES[knobs.strategy].unanimous else knobs.min_agreement
    if terms.agreement is not None and share is not None:
        # in float32, as agreement is: 7 scorers of 10 are not below 0.7
        yield "contradicts_label", terms.agreement < np.float32(share)
    low, high = knobs.margin_window
    if terms.margin is not None and low is not None:
        yield "outside_margin_window", terms.margin < np.float32(low)
    if terms.margin is not None and high is not None:
        yield "outside_margin_window", terms.margin > np.float32(high)


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
