"""The command line: parse, call, print."""

from __future__ import annotations

import sys

import click

from fifa.cli.commands import cli
from fifa.errors import FifaError

__all__ = ["cli", "main"]


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
