"""`fifa batch write` and `fifa batch read`."""

from __future__ import annotations

from pathlib import Path

import click

from fifa.cli.options import run_argument


@click.group("batch")
def command() -> None:
    """Prompt ratings through batch files: OpenAI's Batch API, `vllm run-batch`."""


@command.command("write")
@run_argument
@click.argument("file", type=click.Path(path_type=Path))
def write_command(run: str, file: Path) -> None:
    """Write a request for every prompt of RUN that its rater has not answered yet to FILE."""
    from fifa.run.folder import open_run
    from fifa.run.steps import read_step
    from fifa.scoring.raters.batch import write_batch

    opened = open_run(run)
    rater = opened.recipe.score.quality
    count = write_batch(read_step(opened), rater, file, folder=opened.scores)
    click.echo(f"{count:,} requests in {file}", err=True)
    click.echo(file)


@command.command("read")
@run_argument
@click.argument("file", type=click.Path(path_type=Path))
def read_command(run: str, file: Path) -> None:
    """Take the answers in FILE, so that `fifa score RUN` need not ask for them."""
    from fifa.run.folder import open_run
    from fifa.run.steps import read_step
    from fifa.scoring.raters.batch import read_batch

    opened = open_run(run)
    rater = opened.recipe.score.quality
    click.echo(read_batch(read_step(opened), rater, file, folder=opened.scores), err=True)
