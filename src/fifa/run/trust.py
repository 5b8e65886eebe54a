"""`fifa trust`: judges against the labels of a data set, a benchmark or a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fifa.config import Score, Select, Trust
from fifa.data.read import read_source
from fifa.data.table import load_pairs
from fifa.errors import FifaError
from fifa.reporting.trust import Trusted, judge_pairs
from fifa.run.folder import STAMP, open_run
from fifa.run.steps import echo_read
from fifa.scoring import score
from fifa.scoring.rewards.metrics import draw_rows


def trust(knobs: Trust, *, scores: Path | None = None) -> Trusted:
    """Measure margins on the labels of a source, or of a run's pairs.

    Parameters
    ----------
    knobs
        The source, the margins and where they are made.
    scores
        Where scores are kept, so that nothing is scored twice; None: in a run's own folder, and
        nowhere for another source.

    Raises
    ------
    FifaError
        For a source that cannot be read, and where there is no margin to judge.
    """
    margin, download = knobs.margin, knobs.read.allow_download
    unit, budget = Select.margin_unit, Score.budget
    if (Path(knobs.read.source) / STAMP).is_file():
        run = open_run(knobs.read.source)
        pairs = load_pairs(run.folder)
        if not margin:
            margin, budget = run.recipe.score.margin, run.recipe.score.budget
        scores, download = scores or run.scores, download or run.recipe.read.allow_download
        unit = run.recipe.select.margin_unit
    else:
        pairs = read_source(knobs.read)
        echo_read(pairs)
    if not margin:
        raise FifaError(
            "no margin to judge", do="name one with --margin, for example --margin pickscore"
        )
    if knobs.limit and knobs.limit < len(pairs):
        rows = draw_rows(len(pairs), knobs.limit)
        pairs = replace(pairs, table=pairs.table.take(rows))
    made = score(
        pairs,
        margin,
        "none",
        "none",
        budget=budget,
        folder=scores,
        compute=knobs.compute,
        allow_download=download,
    )
    return judge_pairs(pairs, made, unit)
