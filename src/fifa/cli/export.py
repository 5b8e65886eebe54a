"""`fifa export`."""

from __future__ import annotations

from pathlib import Path

import click

from fifa.cli.options import run_argument


@click.command("export")
@run_argument
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The folder of the subset.  [default: RUN/subset]",
)
def command(run: str, out: Path | None) -> None:
    """Write the selected pairs for a trainer.

    The selected pairs of RUN become a data set that Diffusion-DPO trainers read.
    """
    from fifa.run.folder import open_run
    from fifa.run.steps import export_step

    click.echo(export_step(open_run(run), out))
