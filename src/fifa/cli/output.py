"""What every command has in common: what it prints, and how much it says meanwhile.

The result goes to standard output, as a line of text or with ``--json`` as one JSON document;
everything else goes to standard error.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fifa.console import QUIET, VERBOSE, collect_steps, echo, output
from fifa.errors import FifaError

if TYPE_CHECKING:
    from click.decorators import FC

JSON, SAYS, OPEN = "fifa.json", "fifa.says", "fifa.open"  # in a click context's meta


@dataclass(frozen=True)
class Answer:
    """The result of a command.

    Parameters
    ----------
    text
        What is printed.
    facts
        The same for ``--json``: values of any kind that pydantic knows.
    steps
        Whether the steps that ran, with their facts, belong to it.
    code
        The exit status.
    after
        Is called once it is printed; may raise `FifaError`.
    """

    text: str
    facts: dict[str, Any]
    steps: bool = True
    code: int = 0
    after: Callable[[], None] | None = None


def answer(text: object, /, **facts: Any) -> Answer:
    """An `Answer` of a line, which is a path more often than not."""
    return Answer(str(text), facts)


def _keep(name: str, value: str) -> Any:
    def callback(ctx: click.Context, param: click.Parameter, given: bool) -> None:
        if given:
            ctx.meta[name] = value

    return callback


def _flag(name: str, key: str, value: str, text: str) -> click.Option:
    return click.Option(
        [name], is_flag=True, expose_value=False, callback=_keep(key, value), help=text
    )


def open_option(command: FC) -> FC:
    """Give a command whose answer has a ``report`` the option ``--open``."""
    made = click.option(
        "--open",
        is_flag=True,
        expose_value=False,
        callback=_keep(OPEN, OPEN),
        help="Open the report in a browser at the end.",
    )
    return made(command)


def open_page(page: Path) -> None:
    """Show a page in the browser, or say where it is if there is none."""
    import webbrowser

    if not webbrowser.open(page.absolute().as_uri()):
        echo(f"no browser was found here; open {page.absolute()}")


class Command(click.Command):
    """A command whose callback returns an `Answer`; None where it has printed by itself."""

    prints_result = True

    @property
    def made(self) -> Sequence[click.Parameter]:
        """Parameters beside its own."""
        return ()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters and those of every command."""
        *own, help_option = super().get_params(ctx)
        common = [
            _flag("--quiet", SAYS, QUIET, "Print the result and errors, nothing else."),
            _flag("--verbose", SAYS, VERBOSE, "Print what each step found, with the time."),
        ]
        if self.prints_result:
            common.insert(0, _flag("--json", JSON, JSON, "Print the result as JSON."))
        return [*own, *self.made, *common, help_option]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and print its answer."""
        with ExitStack() as stack:
            stack.enter_context(output(ctx.meta.get(SAYS)))
            steps = stack.enter_context(collect_steps())
            try:
                given = super().invoke(ctx)
            except FifaError as error:
                if ctx.meta.get(SAYS) == VERBOSE:
                    traceback.print_exc()
                if JSON in ctx.meta:
                    told = {"what": error.what, "where": error.where, "do": error.do}
                    click.echo(_json({"error": told}))
                raise
        if given is None:
            return
        if JSON in ctx.meta:
            click.echo(_json(given.facts | ({"steps": steps} if given.steps and steps else {})))
        elif given.text:
            click.echo(given.text)
        if OPEN in ctx.meta and "report" in given.facts:  # a dry run has none
            open_page(given.facts["report"])
        if given.after:
            given.after()
        ctx.exit(given.code)


class Group(click.Group):
    """A group of `Command`."""

    command_class = Command
    group_class = type


def _json(value: Any) -> str:
    """Indented JSON: paths as text, NaN as null."""
    from pydantic_core import to_json

    return to_json(value, indent=2, inf_nan_mode="null").decode()
