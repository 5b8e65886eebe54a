"""What `fifa evaluate` does to a run folder: prompts to images to numbers to the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from fifa.config import Compute, Evaluate, changed
from fifa.console import echo
from fifa.errors import FifaError
from fifa.evaluation.generate import CURVE, FOLDER, generate
from fifa.evaluation.judges import Judge, as_judges, load_detector
from fifa.evaluation.measure import (
    CURVE_SUFFIX,
    DIVERSITY,
    MEASURES,
    Measured,
    check_scorers,
    measure,
    with_suffix,
)
from fifa.evaluation.models import Model, find_models, name_checkpoints, read_training, run_scorers
from fifa.evaluation.prompts import Prompts, read_prompts
from fifa.evaluation.results import RESULTS, Results, make_results, save_results
from fifa.evaluation.sampling import PipelineLoader, Settings, settings_for
from fifa.evaluation.win_rates import Comparison, steps_of
from fifa.models.runtime import make_runtime, release_memory
from fifa.reporting.page import write_report
from fifa.run.folder import begin, log_step
from fifa.scoring.quality import make_rater
from fifa.scoring.rewards.image_encoders import make_image_encoder
from fifa.shards.executors import executor_of
from fifa.shards.files import make_folder, sweep, write_yaml
from fifa.shards.lock import only_writer
from fifa.shards.pool import Executor

KNOBS = "evaluation.yaml"


@dataclass(frozen=True)
class Evaluated:
    """An evaluation that is done.

    Parameters
    ----------
    folder
        The run folder; ``folder / "report.html"`` is the page.
    images
        `fifa.evaluation.generate.IMAGES`.
    measured
        Every number of every image.
    results
        What the numbers say.
    """

    folder: Path
    images: pa.Table
    measured: Measured
    results: Results

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Checkpoints against the base, then among themselves, by every scorer."""
        return self.results.comparisons


def evaluate(
    base: str | Path,
    tuned: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    prompts: str | Path,
    out: str | Path,
    *,
    judges: Sequence[Judge] | Mapping[str, Any] | None = None,
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
        ``limit``, ``seeds``, ``first_seed`` and ``curve`` of `fifa.config.Evaluate`,
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
    if not isinstance(tuned, Mapping):
        paths = [tuned] if isinstance(tuned, str | Path) else tuned
        tuned = name_checkpoints([str(path) for path in paths])
    knobs["tuned"] = {name: str(path) for name, path in tuned.items()}
    if not knobs.get("scorers"):  # the default ones are for those who bring no judge
        knobs["scorers"] = () if judges else None
    evaluation = changed(Evaluate(), base=str(base), prompts=str(prompts), **knobs)
    evaluated = run_evaluation(evaluation, out, judges=judges, compute=compute)
    write_report(evaluated.folder)
    return evaluated


def run_evaluation(
    evaluation: Evaluate,
    out: str | Path,
    *,
    judges: Sequence[Judge] | Mapping[str, Any] | None = None,
    compute: Compute | None = None,
) -> Evaluated:
    """Generate, measure and compare in a run folder; see `evaluate`."""
    out = Path(out)
    with ExitStack() as held:
        held.enter_context(only_writer(out))
        if (out / FOLDER).is_dir():  # where people may be voting
            held.enter_context(only_writer(out / FOLDER))
        return _run(evaluation, out, judges, compute)


def _run(
    asked: Evaluate,
    out: Path,
    judges: Sequence[Judge] | Mapping[str, Any] | None,
    compute: Compute | None,
) -> Evaluated:
    if asked.measure.scorers == ("none",):
        asked = changed(asked, scorers=())
    compute = compute or Compute(device=asked.generate.device, **asdict(asked.cluster))
    prompts = read_prompts(asked.prompts, limit=asked.limit)
    models = find_models(asked.base, asked.tuned, asked.generate)
    settings = settings_for(asked.generate, models[0].base)
    named = as_judges(judges)
    check_evaluation(asked, compute)
    trainings = {model.name: read_training(model) for model in models[1:]}
    picked = dict.fromkeys(
        [
            *asked.measure.picked,
            *run_scorers(out),
            *chain.from_iterable(training.scorers for training in trainings.values()),
        ]
    )
    folder = start(out, asked)
    with log_step(out, "generate"), executor_of(compute) as executor:
        images, on_the_way = _generate(asked, models, prompts, folder, settings, executor)
    release_memory()  # of the pipeline, before scorers look for theirs
    options: dict[str, Any] = {"judges": named, "picked": tuple(picked), "compute": compute}
    with log_step(out, "measure"):
        measured, curve = measure(images, folder, asked.measure, **options), None
        if on_the_way is not None:
            # only what a curve shows: neither safety nor diversity
            rewards = replace(asked.measure, detector=None, rater="none", encoder="none")
            curve = measure(on_the_way, folder, rewards, **options, suffix=CURVE_SUFFIX)
        results = make_results(
            asked, models, settings, prompts, measured, curve, trainings, tuple(picked)
        )
        save_results(folder, results)
    return Evaluated(out, images, measured, results)


def start(out: Path, evaluation: Evaluate) -> Path:
    """The evaluation's folder in the run folder ``out``, which is made if need be.

    Raises `FifaError` as `fifa.run.folder.begin`.
    """
    folder = begin(out) / FOLDER
    make_folder(folder)
    sweep(folder)
    (folder / RESULTS).unlink(missing_ok=True)  # it is there only where all else agrees with it
    write_yaml(folder / KNOBS, evaluation.to_yaml())
    return folder


def echo_wins(evaluated: Evaluated) -> None:
    """Print how often each checkpoint wins against the base, by every scorer."""
    names = [len(c.ours) for c in evaluated.comparisons] or [0]
    for c in evaluated.comparisons:
        wins, mark = c.wins, " (picked the data)" if c.scale.picked else ""
        echo(
            f"{c.ours:>{max(names)}} wins {wins.share:6.1%} ({wins.low:.1%} to {wins.high:.1%}, "
            f"{wins.ties:,} ties) against {c.theirs} by {c.scale.name}{mark}"
        )


def check_evaluation(asked: Evaluate, compute: Compute) -> None:
    """Raise `FifaError` for what can be known to be wrong before hours of images."""
    try:
        check_scorers(asked.measure.scorers, compute)
    except FifaError as error:
        if asked.measure.scorers != Evaluate().measure.scorers:
            raise
        raise FifaError(
            f"the default scorers are not available: {error.what}",
            where=error.where,
            do="connect to the network, or give --score NAME:FOLDER or --score none",
        ) from error
    if asked.measure.detector:
        runtime = make_runtime(compute.device, compute.dtype)
        load_detector(asked.measure.detector, asked.measure.unsafe_labels, runtime)
    if asked.measure.rater != "none":
        make_rater(asked.measure.rater)
    if asked.measure.encoder != "none":
        make_image_encoder(asked.measure.encoder, make_runtime(compute.device))


def _generate(
    asked: Evaluate,
    models: list[Model],
    prompts: Prompts,
    folder: Path,
    settings: Settings,
    executor: Executor,
) -> tuple[pa.Table, pa.Table | None]:
    """The images of all models, and those of the checkpoints on their way if asked for."""
    how: dict[str, Any] = {"executor": executor}
    if executor.is_here:
        how["loader"] = PipelineLoader(models[0].base, settings, asked.generate.device)
    images = generate(asked, models, prompts, settings, folder, **how)
    steps = [step for model in models[1:] for step in steps_of(model)] if asked.curve else []
    if asked.curve and not steps:
        echo("no checkpoint has any checkpoints/step-*: there is no curve to draw")
    for name in (CURVE, *(with_suffix(name, CURVE_SUFFIX) for name in (MEASURES, DIVERSITY))):
        (folder / name).unlink(missing_ok=True)  # of an earlier evaluation in this folder
    if not steps:
        return images, None
    some = [models[0], *steps]
    return images, generate(
        asked, some, prompts, settings, folder, index=CURVE, most=asked.curve, **how
    )
