"""EVALUATE: images of base and tuned models, what scorers and people say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fifa.config import Compute
    from fifa.evaluation.judges import Judge, Measure
    from fifa.evaluation.steps import Evaluated


def evaluate(
    base: str | Path,
    tuned: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    prompts: str | Path,
    out: str | Path,
    *,
    judges: Sequence[Judge] | Mapping[str, Judge | Measure] | None = None,
    compute: Compute | None = None,
    **knobs: Any,
) -> Evaluated:
    """Compare checkpoints with the model they came from, and write the report.

    Parameters
    ----------
    base
        The model that was tuned: a folder in diffusers' layout, or a hub id.
    tuned
        Checkpoints, by name if they are a mapping: a LoRA (file or folder), a folder with
        ``unet/`` or ``transformer/``, or a whole pipeline.
    prompts
        Text, CSV, TSV, Parquet, JSON or JSON lines, or a folder of these.
    out
        The run folder: a new one, or one that `filter_pairs` made. An evaluation that was
        stopped goes on where it was, and ends with the same bytes.
    judges
        Beside the reward models: functions from prompts and RGB images to float32 [n] by name
        (higher is better), or `fifa.evaluation.judges.Judge`.
    compute
        Where and how reward models run.
    **knobs
        ``limit``, ``seeds``, ``first_seed`` and ``curve`` of `fifa.evaluation.config.Evaluation`,
        and every knob of its ``generate`` (``steps``, ``guidance``, ``sampler``, ``width``,
        ``height``, ``batch``, ...) and ``measure`` (``scorers``, ``picked``, ``rater``,
        ``detector``, ``unsafe_labels``, ``encoder``, ...).

    Returns
    -------
    Evaluated
        The index of images, all measures, and the comparisons.

    Raises
    ------
    FifaError
        For whatever a person can mend; what was done until then is kept.
    """
    from fifa.evaluation.steps import make_evaluation, run_evaluation
    from fifa.reporting.page import write_report

    evaluation = make_evaluation(base, tuned, prompts, knobs)
    named = dict(judges) if isinstance(judges, Mapping) else judges
    evaluated = run_evaluation(evaluation, out, judges=named, compute=compute)
    write_report(evaluated.folder)
    return evaluated
