"""`fifa batch write` and `fifa batch read`."""

from __future__ import annotations

from pathlib import Path

import click

from fifa.cli.options import run_argument


@click.group("batch")
def command() -> None:
    """Rate prompts through batch files.

    These are the files of OpenAI's Batch API and of `vllm run-batch`.
    """


@command.command("write")
@run_argument
@click.argument("file", type=click.Path(path_type=Path))
def write_command(run: str, file: Path) -> None:
    """Write the requests of RUN to FILE.

    There is one request for every prompt that the rater of RUN has not answered yet.
    """
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
    """Read the answers in FILE into RUN.

    `fifa score RUN` then does not send these requests.
    """
    from fifa.run.folder import open_run
    from fifa.run.steps import read_step
    from fifa.scoring.raters.batch import read_batch

    opened = open_run(run)
    rater = opened.recipe.score.quality
    click.echo(read_batch(read_step(opened), rater, file, folder=opened.scores), err=True)
