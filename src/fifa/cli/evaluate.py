"""`fifa evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fifa.cli.options import KnobCommand, chosen, out_option


@click.command("evaluate", cls=KnobCommand, knobs="Evaluate")
@out_option
def command(out: Path, **options: Any) -> None:
    """Compare checkpoints with their base model.

    All of them make images for the same prompts and seeds; the images are scored, compared and
    shown in a report.
    """
    from fifa.config import Evaluate
    from fifa.evaluation.models import name_checkpoints
    from fifa.reporting.page import write_report
    from fifa.run.evaluation import echo_wins, run_evaluation

    if options["tuned"]:
        options["tuned"] = name_checkpoints(options["tuned"])
    evaluated = run_evaluation(chosen(Evaluate(), options), out)
    report = write_report(evaluated.folder)
    echo_wins(evaluated)
    click.echo(report)
