"""Batch files of a run: what its rater or its vision-language judge is still to be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.run.folder import Run, open_run
from fifa.run.steps import read_step
from fifa.scoring.batch import Imported
from fifa.scoring.judges import pairs as judges
from fifa.scoring.raters import endpoint as raters
from fifa.scoring.specs import REWARDS, Spec
from fifa.shards.lock import only_writer


def write_run_batch(
    folder: str | Path, file: Path, *, judge: bool = False, reasoning: bool = False
) -> int:
    """Write the requests that a run's rater, or its ``judge``, has not answered yet; how many."""
    run = open_run(folder)
    with only_writer(run.folder):
        pairs = read_step(run)
    how: dict[str, Any] = {"folder": run.scores, "reasoning": reasoning}
    if judge:
        return judges.write_batch(pairs, _judge_of(run), file, **how, **_how(run))
    limit = run.recipe.compute.max_tokens
    return raters.write_batch(pairs, run.recipe.score.quality, file, **how, max_tokens=limit)


def read_run_batch(folder: str | Path, file: Path, *, judge: bool = False) -> Imported:
    """Put the answers in a batch's result file into a run's scores."""
    run = open_run(folder)
    with only_writer(run.folder):
        pairs = read_step(run)
        if judge:
            return judges.read_batch(pairs, _judge_of(run), file, folder=run.scores, **_how(run))
        return raters.read_batch(pairs, run.recipe.score.quality, file, folder=run.scores)


def _how(run: Run) -> dict[str, Any]:
    recipe = run.recipe
    return {"compute": recipe.compute, "allow_download": recipe.read.allow_download}


def _judge_of(run: Run) -> Spec:
    """The first vision-language judge among a run's margins."""
    specs = [REWARDS.parse(spec) for spec in run.recipe.score.margin]
    judges = [spec for spec in specs if spec.is_judge]
    if not judges:
        raise FifaError(
            "the run has no vision-language judge",
            where=str(run.folder),
            do="score it with --margin vlm:MODEL@URL, or leave out --judge for its rater",
        )
    return judges[0]
