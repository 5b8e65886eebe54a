"""`fifa evaluate` and `fifa compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

SAMPLERS = "ddim, ddpm, dpm++, euler, euler-a, flow-euler, flow-heun, heun, lms, pndm, unipc"


def _names(ctx: Any, param: Any, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(filter(None, map(str.strip, value.split(","))))


@click.command("evaluate")
@click.option("--base", required=True, help="The model that was tuned: a folder or a hub id.")
@click.option(
    "--tuned",
    required=True,
    multiple=True,
    help="A checkpoint, PATH or NAME=PATH: a LoRA, a folder with unet/ or transformer/, or a "
    "whole pipeline. Give it several times.",
)
@click.option(
    "--prompts",
    required=True,
    help="Text (a line each), CSV, TSV, Parquet, JSON or JSON lines, or a folder of these.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run folder.")
@click.option("--limit", type=int, help="At most so many prompts, in turn from each category.")
@click.option("--seeds", type=int, help="Images a prompt and model.  [default: 4]")
@click.option("--first-seed", type=int, help="The number of the first seed.  [default: 0]")
@click.option(
    "--curve",
    type=int,
    help="Measure every checkpoints/step-* too, on about so many of the prompts.",
)
@click.option(
    "--score",
    "scorers",
    multiple=True,
    help="A reward model: pickscore, hpsv2.1, clipscore, ..., NAME:FOLDER, proxy:FOLDER; none. "
    "Give it several times.  [default: pickscore, hpsv2.1, clipscore]",
)
@click.option(
    "--picked",
    multiple=True,
    help="A reward model that picked the data, where the checkpoint does not say so itself.",
)
@click.option("--rater", help="Finds unsafe prompts: local, openai:MODEL@URL.  [default: none]")
@click.option("--unsafe-categories", callback=_names, help="Categories of unsafe prompts.")
@click.option("--detector", help="A transformers image classifier that finds unsafe images.")
@click.option("--unsafe-labels", callback=_names, help="The detector's labels that mean unsafe.")
@click.option("--encoder", help="Of images, for diversity.  [default: efficientnet-lite0]")
@click.option("--steps", type=int, help="Of the sampler.  [default: 50 SD, SDXL; 28 SD3, FLUX]")
@click.option(
    "--guidance", type=float, help="[default: 7.5 SD, 5 SDXL, 7 SD3, 3.5 FLUX; the same for all]"
)
@click.option("--sampler", help=f"{SAMPLERS}.  [default: the base model's own]")
@click.option("--width", type=int, help="In pixels; the model's own if not given.")
@click.option("--height", type=int, help="In pixels; the model's own if not given.")
@click.option("--negative", help="A negative prompt.")
@click.option("--batch", type=int, help="Images made together.  [default: 4]")
@click.option("--device", help="cuda, cuda:1, mps, cpu; the fastest if not given.")
@click.option("--dtype", help="float32, bfloat16 or float16 of the image models.")
def evaluate_command(
    base: str,
    tuned: tuple[str, ...],
    prompts: str,
    out: Path,
    scorers: tuple[str, ...],
    picked: tuple[str, ...],
    **options: Any,
) -> None:
    """What a training bought: images of base and checkpoints, scored, compared and shown."""
    from fifa.run.evaluation import echo_wins, evaluate

    evaluated = evaluate(
        base, tuned, prompts, out, scorers=scorers or None, picked=picked or None, **options
    )
    echo_wins(evaluated)
    click.echo(evaluated.folder / "report.html")


@click.command("compare")
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("compare.html"),
    show_default=True,
    help="The page.",
)
def compare_command(runs: tuple[str, ...], out: Path) -> None:
    """Several evaluated RUNs in one table and one figure."""
    from fifa.evaluation.compare import compare_runs
    from fifa.reporting.comparison import comparison_text, write_comparison

    compared = compare_runs(runs)
    for difference in compared.differences:
        click.echo(f"not the same in all runs: {difference}", err=True)
    click.echo(comparison_text(compared), err=True)
    click.echo(write_comparison(compared, out))
