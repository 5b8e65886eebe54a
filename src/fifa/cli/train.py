"""`fifa train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fifa.cli.options import KnobCommand, chosen
from fifa.errors import FifaError


@click.command("train", cls=KnobCommand, knobs="Train")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The folder of the checkpoint."
)
@click.option(
    "--preset",
    help="A set of options: paper-sd15, paper-sdxl or lora-small; options given here win.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the options, and the steps, disk space and memory that they need; then stop.",
)
def command(out: Path, preset: str | None, dry_run: bool, **options: Any) -> None:
    """Train a diffusion model on the pairs.

    SOURCE is a RUN, a subset, or Parquet files in diffusers' schema. On several devices, use
    `accelerate launch -m fifa train ...`.
    """
    from fifa import config
    from fifa.run.folder import check_run
    from fifa.training.job import plan_training, run_training

    if preset and options["recipe"]:
        raise FifaError("a preset and a recipe at once", do="give one of --preset and --recipe")
    train = chosen(config.preset(preset) if preset else config.Train(), options)
    check_run(train.source)
    if dry_run:
        click.echo(train.to_yaml() + "\n" + str(plan_training(train, out)))
        return
    click.echo(run_training(train, out))
