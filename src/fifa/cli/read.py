"""`fifa read`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fifa.cli.options import KnobCommand, chosen, out_option


@click.command("read", cls=KnobCommand, knobs="Recipe", sections=("read",))
@out_option
def command(out: Path, **options: Any) -> None:
    """Read SOURCE into a table of pairs.

    No image is opened.
    """
    from fifa.config import Recipe
    from fifa.run.folder import start_run
    from fifa.run.steps import echo_read, read_step

    echo_read(read_step(start_run(out, chosen(Recipe(), options))))
    click.echo(out / "pairs.parquet")
