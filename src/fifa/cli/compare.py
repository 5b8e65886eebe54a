"""`fifa compare`."""

from __future__ import annotations

from pathlib import Path

import click

from fifa.cli.options import check_runs


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, callback=check_runs)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("compare.html"),
    show_default=True,
    help="The page to write.",
)
def command(runs: tuple[str, ...], out: Path) -> None:
    """Compare several evaluated runs.

    The result is one page with a table and a figure of all RUNS.
    """
    from fifa.evaluation.compare import compare_runs
    from fifa.reporting.page import comparison_text, write_comparison

    compared = compare_runs(runs)
    for difference in compared.differences:
        click.echo(f"not the same in all runs: {difference}", err=True)
    click.echo(comparison_text(compared), err=True)
    click.echo(write_comparison(compared, out))
