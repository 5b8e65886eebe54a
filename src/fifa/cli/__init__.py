"""The command line: parse, call, print."""

from __future__ import annotations

import os
import sys

import click

from fifa.cli.commands import cli
from fifa.console import named
from fifa.errors import FifaError

__all__ = ["cli", "main"]


def main() -> None:
    """Run the command line; a mistake of the user is reported without a traceback."""
    # Threads that wait should sleep: where cores are busy, spinning ones take ten times the time
    # from those that compute. Has to be said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        _check_text(sys.argv[1:])
        if code := cli(prog_name="fifa", standalone_mode=False):
            sys.exit(code)
    except FifaError as error:
        click.echo(named(f"error: {error}"), err=True)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        from fifa.models.runtime import out_of_memory

        if not out_of_memory(error):
            raise
        # wherever nothing smaller could be tried: a model that does not fit, for one
        told = FifaError(
            (str(error) or "out of memory").splitlines()[0],
            do="end what else runs on the device, or take smaller images, a smaller model or "
            "another --dtype; what is finished is kept",
        )
        click.echo(f"error: {told}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; the same command continues from here", err=True)
        sys.exit(130)


def _check_text(words: list[str]) -> None:
    """Refuse words with bytes that are no UTF-8: libraries below could not open such files."""
    for word in words:
        shown = word.encode("utf-8", "backslashreplace").decode()
        if shown != word:
            raise FifaError(
                "this is no UTF-8",
                where=shown,
                do="rename the file, or set PYTHONUTF8=1 where the locale has another encoding",
            )
