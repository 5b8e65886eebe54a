"""SCORE: what every pair and every prompt is worth."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fifa.config import Compute, Score
from fifa.errors import FifaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pyarrow as pa

    from fifa.data.table import Pairs
    from fifa.scoring.table import Scores

_blocks: list[int] = []  # of `engine_kept`, open now


def score(
    pairs: Pairs,
    margin: str | Sequence[str] = (),
    quality: str = Score.quality,
    diversity: str = Score.diversity,
    *,
    k: int = Score.k,
    budget: int | float = Score.budget,
    folder: str | Path | None = None,
    compute: Compute | None = None,
    allow_download: bool = False,
    step: Callable[[str], AbstractContextManager[Any]] = nullcontext,
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
    budget
        The part of the pairs that a vision-language judge among ``margin`` is asked about, those
        that the others are least sure of: a share (0.2), or as many as so many tokens allow
        (a whole number).
    folder
        Where finished tables and unfinished shards are kept, so that nothing is scored twice;
        None keeps nothing.
    compute, allow_download
        Where and how reward models run; whether images only known by URL may be fetched.

    step
        Makes a context for each of ``margin``, ``diversity`` and ``quality``, such as one that
        logs it.

    Returns
    -------
    Scores
        Tables aligned with ``pairs.table`` and ``pairs.prompts``.

    Raises
    ------
    FifaError
        For a spec that names nothing, a missing column, an endpoint that is down.
    """
    from fifa.scoring.diversity import diversity_scores
    from fifa.scoring.quality import quality_scores
    from fifa.scoring.table import Scores
    from fifa.shards.executors import executor_of

    compute, folder = compute or Compute(), Path(folder) if folder is not None else None
    specs = (margin,) if isinstance(margin, str) else tuple(margin)
    knobs = Score(specs, quality, diversity, k, budget)
    check_score(knobs)
    diverse, rated = None, None
    with engine_kept(), executor_of(compute) as executor:
        shared: dict[str, Any] = {"folder": folder, "executor": executor}
        with step("margin"):
            options = {**shared, "compute": compute, "allow_download": allow_download}
            made = _margins(pairs, specs, budget, options)
        with step("diversity"):
            if diversity != "none":
                options = {**shared, "k": k, "device": compute.device}
                diverse = diversity_scores(pairs, diversity, **options)
        with step("quality"):
            if quality != "none":
                limits = {"in_flight": compute.in_flight, "max_tokens": compute.max_tokens}
                options = {**shared, **limits, "device": compute.device}
                rated = quality_scores(pairs, quality, **options)
    margins = {spec: made[spec] for spec in specs}
    return Scores(margins=margins, quality=rated, diversity=diverse, knobs=knobs)


@contextmanager
def engine_kept() -> Iterator[None]:
    """vLLM's engine, if one is asked, goes with the outermost of these blocks.

    What comes next in this process wants its memory; what is asked within loads it once.
    """
    _blocks.append(1)
    try:
        yield
    finally:
        _blocks.pop()
        if not _blocks and (offline := sys.modules.get("fifa.scoring.offline")):
            offline.forget_engine()


def _margins(
    pairs: Pairs, specs: Sequence[str], budget: int | float, options: dict[str, Any]
) -> dict[str, pa.Table]:
    """The margins by their specs."""
    from fifa.scoring.margin import margin_scores
    from fifa.scoring.specs import REWARDS

    # Columns first: a mistyped name is refused before a model is loaded. Judges last: what the
    # others are unsure of is what they are asked.
    parsed = {spec: REWARDS.parse(spec) for spec in specs}
    cheaper = [spec for spec in specs if not parsed[spec].is_judge]
    made: dict[str, pa.Table] = {}
    for spec in sorted(specs, key=lambda spec: (parsed[spec].is_judge, not parsed[spec].is_column)):
        if parsed[spec].is_judge:
            options = {**options, "budget": budget, "cheaper": [made[one] for one in cheaper]}
        made[spec] = margin_scores(pairs, spec, **options)
    return made


def check_specs(knobs: Score) -> None:
    """Raise `FifaError` for a scorer of a name that nobody knows; no model is looked for."""
    from fifa.scoring.specs import ENCODERS, RATERS, REWARDS

    for registry, specs in (
        (REWARDS, knobs.margin),
        (RATERS, (knobs.quality,)),
        (ENCODERS, (knobs.diversity,)),
    ):
        for spec in specs:
            if spec != "none":
                registry.parse(spec)


def check_score(knobs: Score) -> None:
    """Raise `FifaError` for a scorer that is unknown, or not there: before hours of others.

    Reward models are looked for by name only, as looking at one loads it.
    """
    from fifa.scoring.encoders import make_encoder
    from fifa.scoring.quality import make_rater
    from fifa.scoring.specs import ENCODERS, RATERS, REWARDS

    parsed = [REWARDS.parse(spec) for spec in knobs.margin]
    judges = [spec.make() for spec in parsed if spec.is_judge]
    if knobs.budget != Score.budget and not 0 < len(judges) < len(parsed):
        raise FifaError(
            "a budget takes a vision-language judge and a cheaper one, which scores all pairs",
            do="--margin pickscore --margin vlm:MODEL@URL, or leave out --budget",
        )
    if knobs.diversity != "none" and not ENCODERS.parse(knobs.diversity).is_column:
        make_encoder(knobs.diversity)
    if knobs.quality != "none" and not RATERS.parse(knobs.quality).is_column:
        make_rater(knobs.quality)
