"""`fifa select`."""

from __future__ import annotations

from typing import Any

import click

from fifa.cli.options import KnobCommand, chosen


@click.command("select", cls=KnobCommand, knobs="Recipe", sections=("select",))
@click.argument("run")
def select_command(run: str, **options: Any) -> None:
    """Select again from the scores of RUN: another K, other weights, no scoring."""
    from fifa.run.filtering import tell_selection
    from fifa.run.steps import open_run, revised, select_step

    opened = open_run(run)
    opened = revised(opened, chosen(opened.recipe, options, only=("select",)))
    tell_selection(select_step(opened))
    click.echo(opened.folder / "selection.parquet")
