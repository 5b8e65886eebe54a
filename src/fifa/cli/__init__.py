"""The command line: a module a command. Parse, call, print."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from fifa import __version__
from fifa.errors import FifaError

STEPS = ("filter", "read", "score", "select", "export", "rebuild", "report")
COMMANDS = (*STEPS, "train", "reward", "batch", "demo", "evaluate", "compare", "vote")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fifa")
def cli() -> None:
    """Filter human feedback on generated images: keep the few pairs that are worth training on.

    A SOURCE is a file, a folder, a glob, an hf://datasets/... id or any fsspec URL. A RUN is the
    folder that `filter` or `evaluate` writes.
    """


for name in COMMANDS:
    cli.add_command(import_module(f"fifa.cli.{name}").command)


def main() -> None:
    """Run the command line; a mistake of the user is reported without a traceback."""
    try:
        cli(standalone_mode=False)
    except FifaError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; the same command continues from here", err=True)
        sys.exit(130)
