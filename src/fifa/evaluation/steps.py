"""The main job: prompts to images to numbers, and what a person is told on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from fifa.config import Compute, build
from fifa.console import echo
from fifa.errors import FifaError
from fifa.evaluation.config import Evaluation, Generate, Measure
from fifa.evaluation.costs import checkpoint_facts
from fifa.evaluation.curves import steps_of
from fifa.evaluation.generate import CURVE, FOLDER, INDEX, generate
from fifa.evaluation.judges import Detector, Judge, as_judges
from fifa.evaluation.measure import Measured, check_scorers, measure
from fifa.evaluation.models import Model, find_models, name_checkpoints
from fifa.evaluation.prompts import Prompts, read_prompts
from fifa.evaluation.results import Comparison, comparisons
from fifa.evaluation.sampling import Settings, settle
from fifa.evaluation.selected_by import selection_scorers
from fifa.models.runtime import make_runtime
from fifa.run.steps import is_run, log_step
from fifa.shards.files import cannot_write, read_json, sweep, write_json, write_text

KNOBS = "evaluation.yaml"
FACTS = "evaluation.json"
RESULTS = "results.json"
CURVE_SUFFIX = "-curve"
SCORERS = ("pickscore", "hpsv2.1", "clipscore")  # unless others are named, or judges given
FORMAT = 1


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
    comparisons
        Checkpoints against the base, then among themselves, by every scorer.
    """

    folder: Path
    images: pa.Table
    measured: Measured
    comparisons: tuple[Comparison, ...]


def make_evaluation(
    base: str | Path,
    tuned: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    prompts: str | Path,
    knobs: Mapping[str, Any],
) -> Evaluation:
    """An `Evaluation` from flat knobs; None leaves a knob at its default.

    Raises `FifaError` for a knob that there is not, and for values out of range.
    """
    if isinstance(tuned, Mapping):
        named = {name: str(path) for name, path in tuned.items()}
    else:
        paths = [tuned] if isinstance(tuned, str | Path) else list(tuned)
        named = name_checkpoints([str(path) for path in paths])
    given = {name: value for name, value in knobs.items() if value is not None}
    parts: dict[str, dict[str, Any]] = {}
    for section, kind in (("generate", Generate), ("measure", Measure)):
        names = {field.name for field in fields(kind)}
        parts[section] = {name: given.pop(name) for name in list(given) if name in names}
    values = {"base": str(base), "tuned": named, "prompts": str(prompts), **given, **parts}
    evaluation: Evaluation = build(Evaluation, values, where="the evaluation")
    return evaluation


def run_evaluation(
    evaluation: Evaluation,
    out: str | Path,
    *,
    judges: Sequence[Judge] | dict[str, Any] | None = None,
    compute: Compute | None = None,
) -> Evaluated:
    """Generate, measure and compare in a run folder; see `fifa.evaluate`."""
    out = Path(out)
    asked = _with_scorers(evaluation, bool(judges))
    compute = compute or Compute(device=asked.generate.device)
    prompts = read_prompts(asked.prompts, limit=asked.limit)
    models = find_models(asked.base, asked.tuned)
    settings = settle(asked.generate, models[0].base)
    named = as_judges(judges)
    _check(asked, compute)
    picked = (*asked.measure.picked, *selection_scorers(models, out if is_run(out) else None))
    folder = start(out, asked)
    with log_step(out, "generate"):
        images, on_the_way = _generate(asked, models, prompts, folder, settings)
    facts = _facts(asked, models, prompts, settings, picked)
    write_json(folder / FACTS, facts)
    options: dict[str, Any] = {"judges": named, "picked": picked, "compute": compute}
    with log_step(out, "measure"):
        measured = measure(images, folder, asked.measure, **options)
        if on_the_way is not None:
            # only what a curve shows: neither safety nor diversity
            rewards = replace(asked.measure, detector=None, rater="none", encoder="none")
            measure(on_the_way, folder, rewards, **options, suffix=CURVE_SUFFIX)
        found = comparisons(measured)
        write_json(folder / RESULTS, [asdict(comparison) for comparison in found])
    return Evaluated(out, images, measured, tuple(found))


def start(out: Path, evaluation: Evaluation) -> Path:
    """The evaluation's folder in the run folder ``out``, which is made if need be.

    Raises `FifaError` for a folder with other things in it.
    """
    folder = out / FOLDER
    try:
        ours = is_run(out) or folder.is_dir()
        if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
            raise FifaError(
                "the folder is not empty and holds no run",
                where=str(out),
                do="choose another --out",
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    sweep(folder)
    write_text(folder / KNOBS, evaluation.to_yaml())
    return folder


def is_evaluated(run: str | Path) -> bool:
    """Whether a folder holds an evaluation that has got as far as measuring."""
    return (Path(run) / FOLDER / FACTS).is_file()


def load_facts(folder: Path) -> dict[str, Any]:
    """What `run_evaluation` wrote about an evaluation into its ``folder``.

    Raises `FifaError` where there is no evaluation.
    """
    path = folder / FACTS
    if not path.exists():
        raise FifaError(
            "no evaluation here",
            where=str(folder),
            do="make one: fifa evaluate --base MODEL --tuned CHECKPOINT --prompts FILE --out RUN",
        )
    facts: dict[str, Any] = read_json(path, "the evaluation")
    if facts.get("format") != FORMAT:
        raise FifaError("an evaluation of another version of fifa", where=str(path))
    return facts


def tell(evaluated: Evaluated) -> None:
    """Say how often each checkpoint wins against the base, by every scorer."""
    names = [len(c.ours) for c in evaluated.comparisons] or [0]
    for c in evaluated.comparisons:
        wins, mark = c.wins, " (picked the data)" if c.scale.picked else ""
        echo(
            f"{c.ours:>{max(names)}} wins {wins.share:6.1%} ({wins.low:.1%} to {wins.high:.1%}, "
            f"{wins.ties:,} ties) against {c.theirs} by {c.scale.name}{mark}"
        )


def _with_scorers(evaluation: Evaluation, judged: bool) -> Evaluation:
    if evaluation.measure.scorers == ("none",):
        return replace(evaluation, measure=replace(evaluation.measure, scorers=()))
    if evaluation.measure.scorers or judged:
        return evaluation
    return replace(evaluation, measure=replace(evaluation.measure, scorers=SCORERS))


def _check(asked: Evaluation, compute: Compute) -> None:
    """What can be wrong is told before hours of images."""
    try:
        check_scorers(asked.measure.scorers, compute)
    except FifaError as error:
        if asked.measure.scorers != SCORERS:
            raise
        raise FifaError(
            f"the default scorers are not here: {error.what}",
            where=error.where,
            do="get online, name others with --score NAME:FOLDER, or none with --score none",
        ) from error
    if asked.measure.detector:
        runtime = make_runtime(compute.device, compute.dtype, False, False)
        Detector(asked.measure.detector, asked.measure.unsafe_labels, runtime)
    if asked.measure.rater != "none":
        from fifa.scoring.quality import make_rater

        make_rater(asked.measure.rater)
    if asked.measure.encoder != "none":
        from fifa.scoring.rewards.features import make_image_encoder

        make_image_encoder(asked.measure.encoder, make_runtime(compute.device, None, False, False))


def _generate(
    asked: Evaluation, models: list[Model], prompts: Prompts, folder: Path, settings: Settings
) -> tuple[pa.Table, pa.Table | None]:
    """The images of all models, and those of the checkpoints on their way if asked for."""
    options: dict[str, Any] = {
        "seeds": asked.seeds,
        "first_seed": asked.first_seed,
        "batch": asked.generate.batch,
        "device": asked.generate.device,
    }
    images = generate(models, prompts, folder, settings, index=INDEX, **options)
    steps = [step for model in models[1:] for step in steps_of(model)] if asked.curve else []
    if asked.curve and not steps:
        echo("no checkpoint has any checkpoints/step-*: there is no curve to draw")
    for name in (CURVE, *(f"{kind}{CURVE_SUFFIX}.parquet" for kind in ("measures", "diversity"))):
        (folder / name).unlink(missing_ok=True)  # of an earlier evaluation in this folder
    if not steps:
        return images, None
    curve = generate(
        [models[0], *steps], prompts, folder, settings, index=CURVE, most=asked.curve, **options
    )
    return images, curve


def _facts(
    asked: Evaluation,
    models: Sequence[Model],
    prompts: Prompts,
    settings: Settings,
    picked: Sequence[str],
) -> dict[str, Any]:
    from fifa import __version__

    return {
        "format": FORMAT,
        "fifa": __version__,
        "models": [
            {
                "name": model.name,
                "method": model.method,
                "source": model.source,
                "weights": model.weights,
                **(checkpoint_facts(model) if model.method != "base" else {}),
            }
            for model in models
        ],
        "settings": asdict(settings),
        "seeds": asked.seeds,
        "first_seed": asked.first_seed,
        "curve": asked.curve,
        "picked": list(dict.fromkeys(picked)),
        "prompts": {
            "source": prompts.source,
            "prompts": len(prompts),
            "rows": prompts.rows,
            "dropped": prompts.dropped,
        },
    }
