"""The main job: read, score, select, export, report, and what a person is told on the way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from fifa.config import Recipe
from fifa.console import echo
from fifa.data.table import Pairs
from fifa.run.steps import (
    Run,
    export_step,
    read_step,
    report_step,
    score_step,
    select_step,
    start_run,
)


def filter_pairs(recipe: Recipe, out: str | Path) -> Run:
    """Filter a feedback data set: everything from the source to the report.

    Parameters
    ----------
    recipe
        Where the pairs are, what scores them, what is kept.
    out
        The run folder. A run that was stopped goes on where it was; a finished one is checked
        and its report written again.

    Returns
    -------
    Run
        The run: ``run.subset`` is what trainers read, ``run.folder / "report.html"`` the page.

    Raises
    ------
    FifaError
        For whatever a person can mend; what was done until then is kept.
    """
    run = start_run(out, recipe)
    pairs = read_step(run)
    tell_read(pairs)
    score_step(run, pairs)
    tell_selection(select_step(run))
    export_step(run)
    echo(f"subset: {run.subset}")
    echo(f"report: {report_step(run)}")
    return run


def plan(recipe: Recipe) -> str:
    """What `filter_pairs` would do, without doing it: the recipe, the pairs, the work ahead."""
    from fifa.data import read_pairs

    pairs = read_pairs(recipe.read.source, recipe.read.format, columns=recipe.read.columns)
    tell_read(pairs)
    prompts, score, keep = pairs.prompts.num_rows, recipe.score, recipe.select.keep
    count = keep if isinstance(keep, int) else max(1, round(keep * len(pairs)))
    work = [
        f"# margin: {', '.join(score.margin) or 'none'} on {len(pairs):,} pairs",
        f"# quality: {score.quality} on {prompts:,} prompts",
        f"# diversity: {score.diversity}, k = {score.k}, on {prompts:,} prompts",
        f"# keep: {count:,} of {len(pairs):,} pairs by {recipe.select.strategy!r}",
    ]
    return recipe.to_yaml() + "\n".join(work)


def tell_read(pairs: Pairs) -> None:
    """Say what was read, merged and rejected."""
    origin = pairs.origin
    echo(
        f"read {origin.rows:,} rows as {origin.format}: {len(pairs):,} pairs, "
        f"{pairs.prompts.num_rows:,} prompts"
    )
    if origin.merged:
        echo(f"  merged   {origin.merged:>10,}  repeated pairs, labels averaged")
    reasons = Counter(pairs.rejected["reason"].to_pylist())
    for reason, count in reasons.most_common(10):
        echo(f"  rejected {count:>10,}  {reason}")
    if len(reasons) > 10:
        echo(f"  rejected {sum(reasons.values()):>10,}  in all; see rejected.parquet")


def tell_selection(selection: pa.Table) -> None:
    """Say how many pairs were kept, and how many were dropped for each reason."""
    counted = pc.value_counts(selection["reason"].combine_chunks().cast(pa.string())).to_pylist()
    counts = {row["values"]: row["counts"] for row in counted}
    kept = counts.pop("selected", 0)
    echo(f"kept {kept:,} of {selection.num_rows:,} pairs ({kept / selection.num_rows:.1%})")
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        echo(f"  dropped  {count:>10,}  {reason}")
