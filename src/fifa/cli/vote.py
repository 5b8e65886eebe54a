"""`fifa vote RUN`, and what is done with the votes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fifa.cli.options import KnobCommand, chosen, run_argument


class _ServeByDefault(click.Group):
    """A group where ``vote RUN`` is ``vote serve RUN``; a run named like a command is ./NAME."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["serve", *args]
        return super().parse_args(ctx, args)


@click.group("vote", cls=_ServeByDefault)
def command() -> None:
    """People vote: two images, one prompt.

    `fifa vote RUN` serves the page on this machine; its options are those of `fifa vote serve`.
    """


@command.command("serve", cls=KnobCommand, knobs="Vote")
@run_argument
@click.option("--new-invitation", is_flag=True, help="End the links that were given out.")
def serve_command(run: str, new_invitation: bool, **options: Any) -> None:
    """Serve the page where people vote on RUN's images (what `fifa vote RUN` does)."""
    from fifa.config import Vote
    from fifa.evaluation.vote.serve import serve_votes

    vote = chosen(Vote(), options)
    serve_votes(run, vote, new_invitation=new_invitation, show_link=click.echo)


everybody_option = click.option(
    "--everybody", is_flag=True, help="Count voters who failed their checks as well."
)


@command.command("results")
@run_argument
@everybody_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def results_command(run: str, everybody: bool, as_json: bool) -> None:
    """Win rates, intervals and agreement of the votes on RUN so far."""
    import json

    from fifa.evaluation.vote.results import vote_results
    from fifa.evaluation.vote.text import results_text

    found = vote_results(run, everybody=everybody)
    click.echo(json.dumps(found.plain(), indent=2) if as_json else results_text(found))


@command.command("export")
@run_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A .parquet file.")
@everybody_option
def export_command(run: str, out: Path, everybody: bool) -> None:
    """Write the votes on RUN as a preference data set that `fifa filter` reads."""
    from fifa.console import echo
    from fifa.evaluation.vote.export import export_votes

    done = export_votes(run, out, everybody=everybody)
    echo(f"{done.pairs:,} pairs from {done.votes:,} votes; {done.left_out:,} votes left out")
    click.echo(done.path)
