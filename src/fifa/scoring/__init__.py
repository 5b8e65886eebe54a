"""SCORE: what every pair and every prompt is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

    from fifa.config import Compute
    from fifa.data.table import Pairs
    from fifa.scoring.table import Scores


def score(
    pairs: Pairs,
    margin: str | Sequence[str] = (),
    quality: str = "local",
    diversity: str = "minilm",
    *,
    k: int = 10,
    folder: str | Path | None = None,
    compute: Compute | None = None,
    allow_download: bool = False,
) -> Scores:
    """Score every pair and every unique prompt.

    Parameters
    ----------
    pairs
        What `fifa.read_pairs` gave.
    margin
        A reward model's spec, or several for a committee: ``column:NAME_0,NAME_1``,
        ``pickscore``, ``hpsv2.1:FOLDER``, ``proxy``, ...
    quality
        The rater's spec: ``local``, ``local:MODEL``, ``openai:MODEL@URL``, ``column:NAME``,
        ``none``.
    diversity
        The encoder's spec: ``minilm``, ``text:MODEL``, ``clip:MODEL``, ``column:NAME``, ``none``.
    k
        The neighbour whose distance enters the entropy.
    folder
        Where finished tables and unfinished shards are kept, so that nothing is scored twice;
        None keeps nothing.
    compute, allow_download
        Where and how reward models run; whether images only known by URL may be fetched.

    Returns
    -------
    Scores
        Tables aligned with ``pairs.table`` and ``pairs.prompts``.

    Raises
    ------
    FifaError
        For a spec that names nothing, a missing column, an endpoint that is down.
    """
    from fifa.config import Score
    from fifa.scoring.margin import margin_scores
    from fifa.scoring.specs import REWARDS
    from fifa.scoring.table import Scores

    folder = Path(folder) if folder is not None else None
    specs = [margin] if isinstance(margin, str) else list(margin)

    def margin_of(spec: str) -> pa.Table:
        return margin_scores(pairs, spec, folder, compute=compute, allow_download=allow_download)

    # Columns first: a mistyped name is refused before a model is loaded.
    quick_first = sorted(specs, key=lambda spec: not REWARDS.parse(spec).is_column)
    done = {spec: margin_of(spec) for spec in quick_first}
    margins = {spec: done[spec] for spec in specs}
    diverse = rated = None
    if diversity != "none":
        from fifa.scoring.diversity import diversity_scores

        diverse = diversity_scores(pairs, diversity, k=k, folder=folder)
    if quality != "none":
        from fifa.scoring.quality import quality_scores

        in_flight = compute.in_flight if compute else 16
        rated = quality_scores(pairs, quality, folder=folder, in_flight=in_flight)
    knobs = Score(tuple(specs), quality, diversity, k)
    return Scores(margins=margins, quality=rated, diversity=diverse, knobs=knobs)
