"""The command line: a module a command. Parse, call, print."""

from __future__ import annotations

import sys

import click

from fifa import __version__
from fifa.cli.batch import batch_group
from fifa.cli.compare import compare_command
from fifa.cli.demo import demo_command
from fifa.cli.evaluate import evaluate_command
from fifa.cli.export import export_command
from fifa.cli.filter import filter_command
from fifa.cli.read import read_command
from fifa.cli.rebuild import rebuild_command
from fifa.cli.report import report_command
from fifa.cli.reward import reward_group
from fifa.cli.score import score_command
from fifa.cli.select import select_command
from fifa.cli.train import train_command
from fifa.cli.vote import vote_group
from fifa.errors import FifaError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fifa")
def cli() -> None:
    """Filter human feedback for text-to-image alignment: few pairs, the ones worth training on.

    A SOURCE is a file, a folder, a glob, an hf://datasets/... id or any fsspec URL. A RUN is the
    folder that `filter` writes.
    """


for command in (
    filter_command,
    read_command,
    score_command,
    select_command,
    export_command,
    rebuild_command,
    report_command,
    train_command,
    reward_group,
    batch_group,
    demo_command,
    evaluate_command,
    compare_command,
    vote_group,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line; a mistake that a person can mend is told without a traceback."""
    try:
        cli(standalone_mode=False)
    except FifaError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; the same command goes on from here", err=True)
        sys.exit(130)
