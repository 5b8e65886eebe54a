"""Which pairs are kept, and why each of the others is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.config import Select
from fifa.console import echo
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.table import Scores
from fifa.selection.components import gather_terms
from fifa.selection.gates import reason_codes
from fifa.selection.importance import importance
from fifa.selection.order import id_bytes, occurrence
from fifa.selection.strategies import STRATEGIES, Candidates, soft_weights
from fifa.selection.table import (
    BELOW_CUTOFF,
    PROMPT_CAP,
    SELECTED,
    code_counts,
    selection_table,
)

Floats = npt.NDArray[np.float32]
Embeddings: TypeAlias = Floats | Callable[[], Floats]


def select(
    pairs: Pairs,
    scores: Scores,
    knobs: Select | None = None,
    *,
    unreadable: Collection[str] = (),
    embeddings: Embeddings | None = None,
    **changes: Any,
) -> pa.Table:
    """Keep the most important pairs, and give every pair a reason.

    Parameters
    ----------
    pairs, scores
        What `fifa.read_pairs` and `fifa.score` gave. ``pairs.table`` may hold ``pair_id``,
        ``prompt_index``, ``label`` and ``repeat`` only, and ``pairs.prompts`` the ``prompt_id``
        only; score tables in another order are aligned by id.
    knobs
        Strategy, weights and gates; None is the default recipe's.
    unreadable
        Ids of pairs with an image that cannot be decoded: never selected.
    embeddings
        float32 [prompts, d], L2-normalised, row by row with ``pairs.prompts``, or a function
        that gives them: for the strategies ``facility`` and ``farthest``.
    **changes
        Knobs of `fifa.config.Select` to change: ``keep=0.1``, ``alpha=0``, ``per_prompt=3``.

    Returns
    -------
    pyarrow.Table
        A `fifa.selection.table.SELECTION`, row by row with ``pairs.table``: every pair, kept or
        dropped, with its reason.

    Raises
    ------
    FifaError
        If nothing is eligible, a knob is wrong, or the strategy or a gate lacks its score.
    """
    knobs = replace(knobs or Select(), **changes)
    n = len(pairs)
    if n == 0:
        raise FifaError("there are no pairs to select from", where=pairs.origin.source or None)
    terms = gather_terms(pairs, scores, knobs)
    codes = reason_codes(pairs.table, terms, knobs, unreadable)
    rows = np.flatnonzero(codes == BELOW_CUTOFF).astype(np.int32)
    if len(rows) == 0:
        raise _nothing_eligible(codes)
    strategy = STRATEGIES[knobs.strategy]
    margin, quality, diversity = (
        None if term is None else term[rows]
        for term in (terms.margin, terms.quality, terms.diversity)
    )
    value = importance(margin, quality, diversity, knobs, len(rows))
    count = max(1, round(knobs.keep * n)) if isinstance(knobs.keep, float) else knobs.keep
    prompts = pairs.table["prompt_index"].to_numpy()
    order = strategy.order(
        Candidates(
            rows=rows,
            ids=id_bytes(pairs.table["pair_id"]),
            importance=value,
            margin=margin,
            prompt=prompts[rows],
            count=count,
            seed=knobs.seed,
            embeddings=_embeddings(embeddings, pairs, knobs),
        )
    )
    rank = np.zeros(n, np.int32)
    rank[order] = np.arange(1, len(order) + 1, dtype=np.int32)
    if knobs.per_prompt is not None:
        below = occurrence(prompts[order]) < knobs.per_prompt
        codes[order[~below]] = PROMPT_CAP
        order = order[below]
    kept = order if strategy.soft else order[:count]
    if len(kept) < count and not strategy.soft:
        echo(f"keep asks for {count:,} of {n:,} pairs; only {len(kept):,} are eligible, all kept")
    codes[kept] = SELECTED
    every = np.full(n, np.nan, np.float32)
    every[rows] = value
    weight = np.zeros(n, np.float32)
    weight[kept] = soft_weights(every[kept]) if strategy.soft else 1.0
    columns = {
        **vars(terms),
        "importance": every,
        "rank": rank,
        "weight": weight,
    }
    table = selection_table(pairs.table["pair_id"], codes, columns)
    return table.replace_schema_metadata({"fifa.select": json.dumps({"select": asdict(knobs)})})


def _embeddings(embeddings: Embeddings | None, pairs: Pairs, knobs: Select) -> Callable[[], Floats]:
    if STRATEGIES[knobs.strategy].needs == "embeddings" and embeddings is None:
        raise FifaError(
            f"the strategy {knobs.strategy!r} works on prompt embeddings, and there are none",
            do="name an encoder with --diversity, or give select() the embeddings",
        )

    def vectors() -> Floats:
        found = embeddings() if callable(embeddings) else embeddings
        assert found is not None
        if found.ndim != 2 or len(found) != pairs.prompts.num_rows:
            raise FifaError(
                f"embeddings of shape {found.shape} for {pairs.prompts.num_rows:,} prompts",
                do="give one vector per prompt, in the order of pairs.prompts",
            )
        return np.ascontiguousarray(found, np.float32)

    return vectors


def _nothing_eligible(codes: npt.NDArray[np.uint8]) -> FifaError:
    counts = "; ".join(f"{reason}: {n:,}" for reason, n in code_counts(codes).items())
    return FifaError(
        "no pair is eligible",
        where=counts,
        do="relax a gate (docs/select.md), or check the scores and labels",
    )
