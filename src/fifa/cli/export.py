"""`fifa export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("run")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Another folder.  [default: RUN/subset]"
)
def export_command(run: str, out: Path | None) -> None:
    """Write the selected pairs of RUN as a data set that Diffusion-DPO trainers read."""
    from fifa.run.steps import export_step, open_run

    click.echo(export_step(open_run(run), out))
