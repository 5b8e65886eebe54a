"""`fifa filter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fifa.cli.options import KnobCommand, chosen, out_option


@click.command("filter", cls=KnobCommand, knobs="Recipe")
@out_option
@click.option("--dry-run", is_flag=True, help="Print the recipe and what would be done, then stop.")
def command(out: Path, dry_run: bool, **options: Any) -> None:
    """Keep the pairs that are worth training on.

    This is the main command: it reads SOURCE, scores every pair, keeps the best ones, and writes
    the subset and a report.
    """
    from fifa.config import Recipe
    from fifa.run.steps import filter_pairs, plan

    recipe = chosen(Recipe(), options)
    if dry_run:
        click.echo(plan(recipe))
        return
    click.echo(filter_pairs(recipe, out).folder / "report.html")
