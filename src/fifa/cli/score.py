"""`fifa score`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fifa.cli.options import KnobCommand, chosen


@click.command("score", cls=KnobCommand, knobs="Recipe", sections=("read", "score", "compute"))
@click.option("--out", type=click.Path(path_type=Path), help="The run folder of a new run.")
def command(out: Path | None, **options: Any) -> None:
    """Score every pair and every prompt.

    SOURCE is a data set (then --out names a new run folder), or a RUN that was read before.
    """
    from fifa.config import Recipe
    from fifa.run.folder import open_run, revised, start_run
    from fifa.run.steps import read_step, score_step

    if out is None:
        run = open_run(options.pop("source") or "")
        run = revised(run, chosen(run.recipe, options, only=("score", "compute")))
    else:
        run = start_run(out, chosen(Recipe(), options))
    score_step(run, read_step(run))
    click.echo(run.scores)
