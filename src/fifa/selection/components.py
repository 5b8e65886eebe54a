"""What the scores say of every pair: committee, rating, flags and entropy, pair by pair."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fifa.config import Select
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.margin import committee
from fifa.scoring.table import Scores
from fifa.selection.strategies import STRATEGIES

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Terms:
    """Scores by pair; None where there is no such score at all.

    Parameters
    ----------
    margin, signed_margin, agreement
        float32 [pairs], of the committee; NaN where a reward is missing or infinite.
    quality, diversity
        float32 [pairs], the prompt's rating and entropy term; NaN where missing.
    unsafe, nonsense
        bool [pairs]: the rater flagged the prompt with one of ``unsafe_flags``, or as nonsense.
    unrated
        bool [pairs]: the rater gave the prompt no flags, not even none.
    """

    margin: Floats | None = None
    signed_margin: Floats | None = None
    agreement: Floats | None = None
    quality: Floats | None = None
    diversity: Floats | None = None
    unsafe: Mask | None = None
    nonsense: Mask | None = None
    unrated: Mask | None = None


def gather_terms(pairs: Pairs, scores: Scores, knobs: Select) -> Terms:
    """Bring pair and prompt scores together, a value a pair.

    Tables whose ids are in another order, or cover more or fewer pairs, are aligned by id;
    what they lack is NaN. Raises `FifaError` for a strategy or gate without the score it needs.
    """
    _check(scores, knobs)
    found: dict[str, npt.NDArray[np.generic]] = {}
    if scores.margins:
        label = _floats(pairs.table["label"])
        result = committee(_rewards(pairs, scores), label)
        found["margin"] = _finite(result.margin)
        found["signed_margin"] = _finite(result.signed_margin)
        found["agreement"] = result.agreement
    prompt = pairs.table["prompt_index"].to_numpy()
    prompt_id = pairs.prompts["prompt_id"]
    if scores.quality is not None:
        columns = [name for name in ("rating", "flags") if name in scores.quality.column_names]
        quality = _aligned(scores.quality, "prompt_id", prompt_id, columns)
        found["quality"] = _finite(_floats(quality["rating"]))[prompt]
        if "flags" in columns:
            flags = quality["flags"]
            found["unsafe"] = _flagged(flags, knobs.unsafe_flags)[prompt]
            found["nonsense"] = _flagged(flags, ("nonsense",))[prompt]
            found["unrated"] = flags.is_null().to_numpy()[prompt]
    if scores.diversity is not None:
        diversity = _aligned(scores.diversity, "prompt_id", prompt_id, ["entropy"])
        found["diversity"] = _finite(_floats(diversity["entropy"]))[prompt]
    return Terms(**found)  # type: ignore[arg-type]


def _check(scores: Scores, knobs: Select) -> None:
    if scores.margins:
        return
    weighed = (scores.quality is not None and knobs.alpha > 0) or (
        scores.diversity is not None and knobs.gamma > 0
    )
    needs, of_strategy = None, STRATEGIES[knobs.strategy].needs
    if of_strategy == "margin":
        needs = f"the strategy {knobs.strategy!r}"
    elif of_strategy == "importance" and not weighed:
        needs = f"the strategy {knobs.strategy!r} without a weighed quality or diversity score"
    elif knobs.min_agreement is not None:
        needs = "min_agreement"
    elif knobs.margin_window != (None, None) or knobs.margin_percentiles != (0.0, 100.0):
        needs = "a margin window"
    if needs:
        raise FifaError(
            f"no margin scorer, and {needs} needs one",
            do="name one with --margin, for example --margin column:NAME_0,NAME_1",
        )


def _rewards(pairs: Pairs, scores: Scores) -> list[tuple[Floats, Floats]]:
    ids, names = pairs.table["pair_id"], ["reward_0", "reward_1"]
    tables = (_aligned(table, "pair_id", ids, names) for table in scores.margins.values())
    return [(_floats(table["reward_0"]), _floats(table["reward_1"])) for table in tables]


def _aligned(table: pa.Table, key: str, ids: pa.ChunkedArray, columns: list[str]) -> pa.Table:
    wanted = table.select(columns)
    if key not in table.column_names or table[key].equals(ids):
        return wanted
    return wanted.take(pc.index_in(ids, value_set=table[key].combine_chunks()))


def _flagged(flags: pa.ChunkedArray, names: Collection[str]) -> Mask:
    # few distinct sets of flags over many prompts: decide once for each
    encoded = flags.combine_chunks().dictionary_encode()
    hit = [bool(set(names) & set(text.split(","))) for text in encoded.dictionary.to_pylist()]
    decided: Mask = np.array([*hit, False])[encoded.indices.fill_null(len(hit)).to_numpy()]
    return decided


def _floats(column: pa.ChunkedArray) -> Floats:
    values: Floats = column.to_numpy().astype(np.float32, copy=False)  # nulls are NaN
    return values


def _finite(values: Floats) -> Floats:
    wrong = ~np.isfinite(values)
    return np.where(wrong, np.float32(np.nan), values) if wrong.any() else values
