"""What every command has in common: what it prints, and how much it says meanwhile.

The result goes to standard output, as a line of text or with ``--json`` as one JSON document;
everything else goes to standard error.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fifa.console import QUIET, VERBOSE, collect_steps, echo, named, output
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


class Place(click.Path):
    """A path; the URL of an object store is left as it is, and `Command` makes it one.

    Parameters
    ----------
    writes
        Whether the command writes there.
    kind
        `pathlib.Path` or str: what the command gets.
    """

    def __init__(self, *, writes: bool = False, kind: type = Path, **settings: Any) -> None:
        super().__init__(path_type=kind, **settings)
        self.writes = writes

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The path, or the URL as text."""
        return value if "://" in str(value) else super().convert(value, param, ctx)


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

    def stores(self, ctx: click.Context) -> Iterator[tuple[str, Place]]:
        """The parameters whose URLs stand for folders or files: those that are written first."""
        kinds = [(param.name, param.type) for param in self.get_params(ctx)]
        found = [(name, kind) for name, kind in kinds if name and isinstance(kind, Place)]
        yield from sorted(found, key=lambda one: not one[1].writes)

    def _here(self, ctx: click.Context, stack: ExitStack) -> None:
        """Put local copies in the place of folders and files in object stores."""
        for name, kind in self.stores(ctx):
            given = ctx.params.get(name)
            every = given if isinstance(given, tuple) else (given,)
            if not any("://" in str(one) for one in every):
                continue
            from fifa.run.folder import check_run
            from fifa.shards.mirror import is_url, mirrored

            found = []
            for one in every:
                if is_url(one):
                    copy = stack.enter_context(mirrored(str(one), writes=kind.writes))
                    check_run(copy)
                    found.append(kind.convert(str(copy), None, ctx))
                else:
                    found.append(one)
            ctx.params[name] = tuple(found) if isinstance(given, tuple) else found[0]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and print its answer."""
        with ExitStack() as stack:
            stack.enter_context(output(ctx.meta.get(SAYS)))
            steps = stack.enter_context(collect_steps())
            try:
                with ExitStack() as copies:  # all is in the store before the answer is printed
                    self._here(ctx, copies)
                    given = super().invoke(ctx)
            except FifaError as error:
                if ctx.meta.get(SAYS) == VERBOSE:
                    traceback.print_exc()
                if JSON in ctx.meta:
                    told = {"what": error.what, "where": error.where, "do": error.do}
                    click.echo(named(_json({"error": told})))
                raise
        if given is None:
            return
        if JSON in ctx.meta:
            facts = given.facts | ({"steps": steps} if given.steps and steps else {})
            click.echo(named(_json(facts)))
        elif given.text:
            click.echo(named(given.text))
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
