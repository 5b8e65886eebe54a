"""`fifa select`."""

from __future__ import annotations

from typing import Any

import click

from fifa.cli.options import KnobCommand, chosen, run_argument


@click.command("select", cls=KnobCommand, knobs="Recipe", sections=("select",))
@run_argument
def command(run: str, **options: Any) -> None:
    """Select again from the scores of a run.

    Another number of pairs or other weights take seconds, because nothing is scored again.
    """
    from fifa.run.folder import open_run, revised
    from fifa.run.steps import select_step

    opened = open_run(run)
    select_step(revised(opened, chosen(opened.recipe, options, only=("select",))))
    click.echo(opened.folder / "selection.parquet")
