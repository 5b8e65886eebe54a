"""SELECT: the importance of every pair, what is kept, and the reason for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

    import pyarrow as pa

    from fifa.config import Select
    from fifa.data.table import Pairs
    from fifa.scoring.table import Scores
    from fifa.selection.choose import Embeddings


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
        What `fifa.read_pairs` and `fifa.score` gave.
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
    from dataclasses import asdict

    from fifa.config import Select, build
    from fifa.selection.choose import select as choose

    knobs = knobs or Select()
    if changes:
        knobs = build(Select, {**asdict(knobs), **changes}, where="select()")
    return choose(pairs, scores, knobs, unreadable=unreadable, embeddings=embeddings)
