"""The command line: one command a step. Parse, call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fifa import __version__
from fifa.cli.evaluate import compare_command, evaluate_command
from fifa.cli.options import (
    by_section,
    compute_options,
    out_option,
    read_options,
    recipe_of,
    recipe_option,
    score_options,
    select_options,
)
from fifa.cli.vote import vote_group
from fifa.errors import FifaError
from fifa.training.cli_options import train_options, training_of


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fifa")
def cli() -> None:
    """Filter human feedback for text-to-image alignment: few pairs, the ones worth training on.

    A SOURCE is a file, a folder, a glob, an hf://datasets/... id or any fsspec URL. A RUN is the
    folder that `filter` writes.
    """


@cli.command("filter")
@click.argument("source")
@out_option
@recipe_option
@read_options
@score_options
@select_options
@compute_options
@click.option("--dry-run", is_flag=True, help="Print the recipe and what would be done; stop.")
def filter_command(
    source: str, out: Path, recipe: Path | None, dry_run: bool, **options: Any
) -> None:
    """The main job: read SOURCE, score, keep the best pairs, write the subset and the report."""
    from fifa.run.filtering import filter_pairs, plan

    chosen = recipe_of(recipe, source, options)
    if dry_run:
        click.echo(plan(chosen))
        return
    run = filter_pairs(chosen, out)
    click.echo(run.folder / "report.html")


@cli.command("read")
@click.argument("source")
@out_option
@recipe_option
@read_options
def read_command(source: str, out: Path, recipe: Path | None, **options: Any) -> None:
    """Index SOURCE as a table of pairs, without reading pixels."""
    from fifa.run.filtering import tell_read
    from fifa.run.steps import read_step, start_run

    run = start_run(out, recipe_of(recipe, source, options))
    tell_read(read_step(run))
    click.echo(out / "pairs.parquet")


@cli.command("score")
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder, for a new run.")
@recipe_option
@read_options
@score_options
@compute_options
def score_command(source: str, out: Path | None, recipe: Path | None, **options: Any) -> None:
    """Score every pair and prompt of SOURCE (or of a RUN that was read)."""
    from fifa.run.steps import read_step, revised, score_step, start_run

    if out is None:
        sections = by_section(options)
        run = revised(source, score=sections["score"], compute=sections["compute"])
    else:
        run = start_run(out, recipe_of(recipe, source, options))
    score_step(run, read_step(run))
    click.echo(run.scores)


@cli.command("select")
@click.argument("run")
@select_options
def select_command(run: str, **options: Any) -> None:
    """Select again from the scores of RUN: another K, other weights, no scoring."""
    from fifa.run.filtering import tell_selection
    from fifa.run.steps import revised, select_step

    chosen = revised(run, select=by_section(options)["select"])
    tell_selection(select_step(chosen))
    click.echo(chosen.folder / "selection.parquet")


@cli.command("export")
@click.argument("run")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Another folder.  [default: RUN/subset]"
)
def export_command(run: str, out: Path | None) -> None:
    """Write the selected pairs of RUN as a data set that Diffusion-DPO trainers read."""
    from fifa.run.steps import export_step, open_run

    click.echo(export_step(open_run(run), out))


@cli.command("rebuild")
@click.argument("subset_json", type=click.Path(path_type=Path))
@click.option("--source", help="Where the source is now, if it has moved.")
@click.option("--allow-download", is_flag=True, help="Fetch images the source only names by URL.")
@out_option
def rebuild_command(subset_json: Path, source: str | None, allow_download: bool, out: Path) -> None:
    """Rebuild a subset from its subset.json and the source."""
    from fifa.selection.export import rebuild

    rebuild(subset_json, out, source=source, allow_download=allow_download)
    click.echo(out)


@cli.command("report")
@click.argument("run")
def report_command(run: str) -> None:
    """Write RUN's report.html again."""
    from fifa.evaluation.results import is_evaluated
    from fifa.reporting.page import write_report
    from fifa.run.steps import open_run

    click.echo(write_report(run if is_evaluated(run) else open_run(run).folder))


@cli.command("train")
@click.argument("source", required=False)
@click.option("--model", help="A model folder in diffusers layout, or a hub id.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The checkpoint.")
@train_options
@click.option("--dry-run", is_flag=True, help="Print the training and what it takes; stop.")
def train_command(
    source: str | None,
    model: str | None,
    out: Path,
    preset: str | None,
    recipe: Path | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Align a diffusion model with SOURCE's pairs (a RUN, a subset, or the diffusers schema).

    Several devices: `accelerate launch -m fifa train ...`.
    """
    from fifa.training.job import plan_training, run_training

    chosen = training_of(source, model, preset, recipe, options)
    if dry_run:
        click.echo(chosen.to_yaml() + "\n" + str(plan_training(chosen, out)))
        return
    click.echo(run_training(chosen, out))


@cli.group("reward")
def reward_group() -> None:
    """Reward models trained on the feedback itself."""


@reward_group.command("train")
@click.argument("source")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The model's folder.")
@read_options
@click.option(
    "--base", default="features", show_default=True, help="A CLIP to fine-tune, or 'features'."
)
@click.option("--image", default="efficientnet-lite0", show_default=True, help="Frozen encoder.")
@click.option("--text", default="minilm", show_default=True, help="Frozen encoder, or none.")
@click.option("--parts", default="full", show_default=True, help="Of a CLIP: full, or heads.")
@click.option("--lr", default=3e-6, show_default=True, help="Of a CLIP.")
@click.option("--steps", default=4000, show_default=True, help="Of a CLIP.")
@click.option("--warmup", default=500, show_default=True, help="Of a CLIP.")
@click.option("--batch", default=128, show_default=True, help="Pairs a step, of a CLIP.")
@click.option("--bf16", is_flag=True, help="bfloat16 autocast.")
@click.option("--device", help="A torch device; the fastest if not given.")
@click.option("--seed", default=0, show_default=True)
def reward_train_command(
    source: str,
    out: Path,
    format: str | None,
    columns: dict[str, str] | None,
    allow_download: bool | None,
    **options: Any,
) -> None:
    """Train a proxy on SOURCE's labels; score with it as --margin proxy:FOLDER."""
    from fifa.data.read import read_pairs
    from fifa.scoring.rewards.fit import TrainOptions, train_reward

    pairs = read_pairs(source, format, columns=columns)
    chosen = TrainOptions(**options, allow_download=bool(allow_download))
    click.echo(train_reward(pairs, out, chosen).folder)


@cli.group("batch")
def batch_group() -> None:
    """Prompt ratings through batch files: OpenAI's Batch API, `vllm run-batch`."""


@batch_group.command("write")
@click.argument("run")
@click.argument("file", type=click.Path(path_type=Path))
def batch_write_command(run: str, file: Path) -> None:
    """Write a request for every prompt of RUN that its rater has not answered yet to FILE."""
    from fifa.run.steps import open_run, read_step
    from fifa.scoring.raters.batch import write_batch

    opened = open_run(run)
    pairs = read_step(opened)
    count = write_batch(pairs, opened.recipe.score.quality, file, folder=opened.scores)
    click.echo(f"{count:,} requests in {file}", err=True)
    click.echo(file)


@batch_group.command("read")
@click.argument("run")
@click.argument("file", type=click.Path(path_type=Path))
def batch_read_command(run: str, file: Path) -> None:
    """Take the answers in FILE, so that `fifa score RUN` need not ask for them."""
    from fifa.run.steps import open_run, read_step
    from fifa.scoring.raters.batch import read_batch

    opened = open_run(run)
    pairs = read_step(opened)
    taken = read_batch(pairs, opened.recipe.score.quality, file, folder=opened.scores)
    click.echo(taken, err=True)


@cli.command("demo")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-run"), show_default=True)
@click.option(
    "--arms", default="fifa,random", show_default=True, help="Of fifa,margin,random,full."
)
@click.option("--seed", default=0, show_default=True, help="Of everything that is drawn.")
@click.option("--fresh", is_flag=True, help="Rate the prompts here; takes a few minutes more.")
def demo_command(out: Path, arms: str, seed: int, fresh: bool) -> None:
    """All of it in a built-in world: filter, train, generate, judge, report. No GPU needed."""
    from fifa.demo import Demo, demo

    click.echo(demo(out, Demo(arms=tuple(filter(None, arms.split(","))), seed=seed, fresh=fresh)))


cli.add_command(evaluate_command)
cli.add_command(compare_command)
cli.add_command(vote_group)


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
