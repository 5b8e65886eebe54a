"""`fifa demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fifa.cli.options import KnobCommand, chosen


@click.command("demo", cls=KnobCommand, knobs="Demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-run"),
    show_default=True,
    help="The run folder.",
)
def command(out: Path, **options: Any) -> None:
    """The whole road in a small built-in world.

    Filter, train, generate, judge and report. No GPU is needed.
    """
    from fifa.config import Demo
    from fifa.demo import demo

    click.echo(demo(out, chosen(Demo(), options)))
