"""The command line: one command a step. Parse, call, print."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fifa import __version__
from fifa.errors import FifaError

if TYPE_CHECKING:
    from fifa.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])


class _Keep(click.ParamType[Any]):
    """``5000`` is a count; ``0.1`` and ``10%`` are a fraction of all pairs."""

    name = "count|fraction"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | float:
        text = str(value).strip()
        try:
            keep: int | float
            if text.endswith("%"):
                keep = float(text[:-1]) / 100
            else:
                keep = int(text) if text.lstrip("+-").isdigit() else float(text)
        except ValueError:
            self.fail(f"{value!r} is neither a count nor a fraction", param, ctx)
        if not keep > 0 or (isinstance(keep, float) and not keep <= 1):
            self.fail(f"{value!r} is neither a count from 1 nor a fraction up to 1", param, ctx)
        return keep


class _Window(click.ParamType[Any]):
    """``LOW:HIGH``; either may be left out."""

    name = "low:high"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float | None, float | None]:
        if isinstance(value, tuple):
            return value
        low, colon, high = str(value).partition(":")
        try:
            if not colon:
                raise ValueError(value)
            return (float(low) if low else None, float(high) if high else None)
        except ValueError:
            self.fail(f"{value!r} is not LOW:HIGH", param, ctx)


def _columns(ctx: Any, param: Any, value: str | None) -> dict[str, str] | None:
    if not value:
        return None
    named = dict(part.partition("=")[::2] for part in value.split(","))
    if not all(named.values()):
        raise click.BadParameter("write prompt=NAME,image_0=NAME,image_1=NAME,label=NAME")
    return {key.strip(): name.strip() for key, name in named.items()}


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_read_options = _options(
    click.option("--format", help="The source's format; recognised by its columns if not given."),
    click.option(
        "--columns",
        callback=_columns,
        help="Your own table: prompt=NAME,image_0=NAME,image_1=NAME,label=NAME.",
    ),
    click.option(
        "--allow-download/--no-download",
        default=None,
        help="Fetch images the source only names by URL (public addresses only).",
    ),
)
_score_options = _options(
    click.option(
        "--margin",
        multiple=True,
        help="Reward model: column:NAME_0,NAME_1. Give it several times for a committee.",
    ),
    click.option(
        "--quality",
        help="Rater: local, local:MODEL, openai:MODEL@URL, column:NAME, none.  [default: local]",
    ),
    click.option(
        "--diversity",
        help="Encoder: minilm, text:MODEL, clip:MODEL, column:NAME, none.  [default: minilm]",
    ),
    click.option("--k", type=int, help="The neighbour whose distance enters the entropy."),
)
_select_options = _options(
    click.option("--keep", type=_Keep(), help="How many pairs: a count, a fraction or a per cent."),
    click.option("--strategy", help="fifa, random, low, middle, high, consensus, facility, ..."),
    click.option("--alpha", type=float, help="Weight of text quality beside the margin's 1."),
    click.option("--gamma", type=float, help="Weight of text diversity beside the margin's 1."),
    click.option("--normalize", help="none, z, rank or robust."),
    click.option(
        "--unsafe-flags",
        callback=lambda ctx, param, value: (
            None if value is None else tuple(filter(None, value.split(",")))
        ),
        help="Drop prompts with one of these flags; '' drops none.",
    ),
    click.option(
        "--drop-nonsense/--keep-nonsense", default=None, help="Prompts flagged as nonsense."
    ),
    click.option("--min-quality", type=float, help="Drop prompts rated below this."),
    click.option(
        "--min-agreement", type=float, help="Drop pairs the committee contradicts: a share, 0 to 1."
    ),
    click.option("--margin-window", type=_Window(), help="Keep margins within LOW:HIGH only."),
    click.option("--margin-percentiles", type=_Window(), help="The same, as percentiles 0 to 100."),
    click.option("--per-prompt", type=int, help="At most this many pairs of one prompt."),
    click.option(
        "--drop-duplicates/--keep-duplicates", default=None, help="The same two images again."
    ),
    click.option("--seed", type=int, help="For the strategies that draw."),
)
_recipe_option = click.option(
    "--recipe", type=click.Path(path_type=Path), help="A YAML recipe; options override it."
)
_out_option = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The run folder."
)


def _split(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options by the recipe's sections; what was not given is None."""
    from dataclasses import fields

    from fifa.recipe import Read, Score, Select

    options = {**options, "margin": tuple(options.get("margin") or ()) or None}
    low, high = options.get("margin_percentiles") or (None, None)
    if (low, high) != (None, None):
        options["margin_percentiles"] = (low or 0.0, 100.0 if high is None else high)
    sections = {"read": Read, "score": Score, "select": Select}
    return {
        section: {field.name: options.get(field.name) for field in fields(kind)}
        for section, kind in sections.items()
    }


def _recipe(base: Path | None, source: str, options: dict[str, Any]) -> Recipe:
    from fifa.recipe import Recipe, changed, from_yaml

    recipe = from_yaml(base) if base else Recipe()
    return changed(recipe, **_split({**options, "source": source}))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fifa")
def cli() -> None:
    """Filter human feedback for text-to-image alignment: few pairs, the ones worth training on.

    A SOURCE is a file, a folder, a glob, an hf://datasets/... id or any fsspec URL. A RUN is the
    folder that `filter` writes.
    """


@cli.command("filter")
@click.argument("source")
@_out_option
@_recipe_option
@_read_options
@_score_options
@_select_options
@click.option("--dry-run", is_flag=True, help="Print the recipe and what would be done; stop.")
def filter_command(
    source: str, out: Path, recipe: Path | None, dry_run: bool, **options: Any
) -> None:
    """The main job: read SOURCE, score, keep the best pairs, write the subset and the report."""
    from fifa.pipeline import filter_pairs, plan

    chosen = _recipe(recipe, source, options)
    if dry_run:
        click.echo(plan(chosen))
        return
    run = filter_pairs(chosen, out)
    click.echo(run.folder / "report.html")


@cli.command("read")
@click.argument("source")
@_out_option
@_recipe_option
@_read_options
def read_command(source: str, out: Path, recipe: Path | None, **options: Any) -> None:
    """Index SOURCE as a table of pairs, without reading pixels."""
    from fifa.pipeline import tell_read
    from fifa.run import read_step, start_run

    run = start_run(out, _recipe(recipe, source, options))
    tell_read(read_step(run))
    click.echo(out / "pairs.parquet")


@cli.command("score")
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder, for a new run.")
@_recipe_option
@_read_options
@_score_options
def score_command(source: str, out: Path | None, recipe: Path | None, **options: Any) -> None:
    """Score every pair and prompt of SOURCE (or of a RUN that was read)."""
    from fifa.run import read_step, revised, score_step, start_run

    if out is None:
        run = revised(source, score=_split(options)["score"])
    else:
        run = start_run(out, _recipe(recipe, source, options))
    score_step(run, read_step(run))
    click.echo(run.scores)


@cli.command("select")
@click.argument("run")
@_select_options
def select_command(run: str, **options: Any) -> None:
    """Select again from the scores of RUN: another K, other weights, no scoring."""
    from fifa.pipeline import tell_selection
    from fifa.run import revised, select_step

    chosen = revised(run, select=_split(options)["select"])
    tell_selection(select_step(chosen))
    click.echo(chosen.folder / "selection.parquet")


@cli.command("export")
@click.argument("run")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Another folder.  [default: RUN/subset]"
)
def export_command(run: str, out: Path | None) -> None:
    """Write the selected pairs of RUN as a data set that Diffusion-DPO trainers read."""
    from fifa.run import export_step, open_run

    click.echo(export_step(open_run(run), out))


@cli.command("rebuild")
@click.argument("subset_json", type=click.Path(path_type=Path))
@click.option("--source", help="Where the source is now, if it has moved.")
@_out_option
def rebuild_command(subset_json: Path, source: str | None, out: Path) -> None:
    """Rebuild a subset from its subset.json and the source."""
    from fifa.select.export import rebuild

    rebuild(subset_json, out, source=source)
    click.echo(out)


@cli.command("report")
@click.argument("run")
def report_command(run: str) -> None:
    """Write RUN's report.html again."""
    from fifa.run import open_run, report_step

    click.echo(report_step(open_run(run)))


@cli.command("demo")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-run"), show_default=True)
def demo_command(out: Path) -> None:
    """The main job on the few hundred pairs that the package ships."""
    from fifa.demo import demo

    click.echo(demo(out))


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
