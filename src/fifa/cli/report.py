"""`fifa report`."""

from __future__ import annotations

import click

from fifa.cli.options import run_argument


@click.command("report")
@run_argument
def command(run: str) -> None:
    """Write the report of a run again.

    This is RUN/report.html, made from the files in RUN.
    """
    from fifa.evaluation.results import is_evaluated
    from fifa.reporting.page import write_report
    from fifa.run.folder import open_run

    click.echo(write_report(run if is_evaluated(run) else open_run(run).folder))
