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
    """Let people vote on the images of a run.

    They see two images for one prompt and choose the better one. `fifa vote RUN` is short for
    `fifa vote serve RUN`.
    """


@command.command("serve", cls=KnobCommand, knobs="Vote")
@run_argument
@click.option("--new-invitation", is_flag=True, help="Make earlier invitation links invalid.")
def serve_command(run: str, new_invitation: bool, **options: Any) -> None:
    """Serve the page where people vote.

    `fifa vote RUN` does the same.
    """
    from fifa.config import Vote
    from fifa.evaluation.vote.serve import serve_votes

    vote = chosen(Vote(), options)
    serve_votes(run, vote, new_invitation=new_invitation, show_link=click.echo)


everybody_option = click.option(
    "--everybody", is_flag=True, help="Also count voters who failed their attention checks."
)


@command.command("results")
@run_argument
@everybody_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def results_command(run: str, everybody: bool, as_json: bool) -> None:
    """Show win rates and agreement so far.

    Win rates have intervals; agreement is that among the voters.
    """
    import json

    from fifa.evaluation.vote.results import results_text, vote_results

    found = vote_results(run, everybody=everybody)
    click.echo(json.dumps(found.plain(), indent=2) if as_json else results_text(found))


@command.command("export")
@run_argument
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The .parquet file to write."
)
@everybody_option
def export_command(run: str, out: Path, everybody: bool) -> None:
    """Write the votes as a data set.

    It is a preference data set that `fifa filter` reads.
    """
    from fifa.console import echo
    from fifa.evaluation.vote.export import export_votes

    done = export_votes(run, out, everybody=everybody)
    echo(f"{done.pairs:,} pairs from {done.votes:,} votes; {done.left_out:,} votes left out")
    click.echo(done.path)
