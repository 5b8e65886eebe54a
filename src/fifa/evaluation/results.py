"""``results.json``: every comparison, mean, curve and cost of an evaluation, with its interval.

What the numbers are is computed once, when an evaluation is measured; the report and
`fifa compare` read them here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from fifa.config import Evaluate
from fifa.errors import FifaError
from fifa.evaluation.generate import FOLDER
from fifa.evaluation.history import History, history_of
from fifa.evaluation.judges import COLOURS
from fifa.evaluation.measure import Measured, Scale
from fifa.evaluation.models import Cost, Method, Model, Training, cost_of
from fifa.evaluation.prompts import Prompts
from fifa.evaluation.sampling import Settings
from fifa.evaluation.win_rates import (
    Comparison,
    Curve,
    Level,
    Safety,
    comparisons,
    diversity_levels,
    learning_curves,
    levels,
    rewards,
    safety,
)
from fifa.shards.files import write_sealed_json
from fifa.shards.sealed import check_whole

RESULTS = "results.json"


@dataclass(frozen=True)
class ModelFacts:
    """One of the models that were compared.

    Parameters
    ----------
    name, method, source, weights
        As in `fifa.evaluation.models.Model`.
    """

    name: str
    method: Method
    source: str
    weights: str


@dataclass(frozen=True)
class Results:
    """What an evaluation found.

    Parameters
    ----------
    format
        Of the file.
    models
        The base first, then the checkpoints in the order in which they were named.
    settings
        How the images were made.
    seeds, first_seed
        Images a prompt and model, and the number of the first seed.
    prompts, rows, dropped
        Prompts that images were made for; rows of the source, and how many of them were left
        out, by reason.
    picked
        The specs of the reward models that picked the training data.
    scales
        The reward models and judges, those that are evidence first.
    comparisons
        Every checkpoint against the base, then the checkpoints among themselves, by every scale.
    levels
        Every model's mean on each of ``scales`` and on brightness, contrast and saturation, by
        column.
    diversity
        How far apart the images of one prompt are, for every model; empty where not measured.
    safety
        The share of safe images by detector and model.
    curves
        Of every training whose checkpoints were measured on the way, by scale.
    costs
        What every checkpoint cost.
    histories
        How every training went, where its statistics are known.
    """

    format: Literal[2]
    models: tuple[ModelFacts, ...]
    settings: Settings
    seeds: int
    first_seed: int
    prompts: int
    rows: int
    dropped: dict[str, int]
    picked: tuple[str, ...]
    scales: tuple[Scale, ...]
    comparisons: tuple[Comparison, ...]
    levels: dict[str, tuple[Level, ...]]
    diversity: tuple[Level, ...]
    safety: tuple[Safety, ...]
    curves: tuple[Curve, ...]
    costs: tuple[Cost, ...]
    histories: tuple[History, ...] = ()

    @property
    def names(self) -> list[str]:
        """The models' names, the base first."""
        return [model.name for model in self.models]


_FILE = TypeAdapter(Results)


def make_results(
    asked: Evaluate,
    models: Sequence[ModelFacts | Model],
    settings: Settings,
    prompts: Prompts,
    measured: Measured,
    on_the_way: Measured | None,
    trainings: Mapping[str, Training],
    picked: tuple[str, ...],
) -> Results:
    """All that an evaluation's measures say.

    Parameters
    ----------
    asked, models, settings, prompts, picked
        What was evaluated, and how.
    measured
        Every number of every image.
    on_the_way
        The same of the checkpoints of `fifa.evaluation.win_rates.steps_of`; None for no curve.
    trainings
        By checkpoint's name.
    """
    scales = rewards(measured)
    columns = [*(scale.column for scale in scales), *COLOURS]
    return Results(
        format=2,
        models=tuple(ModelFacts(m.name, m.method, m.source, m.weights) for m in models),
        settings=settings,
        seeds=asked.seeds,
        first_seed=asked.first_seed,
        prompts=len(prompts),
        rows=prompts.rows,
        dropped=prompts.dropped,
        picked=picked,
        scales=tuple(scales),
        comparisons=tuple(comparisons(measured)),
        levels={column: tuple(levels(measured, column)) for column in columns},
        diversity=tuple(diversity_levels(measured)),
        safety=tuple(safety(measured)),
        curves=tuple(learning_curves(on_the_way, trainings)) if on_the_way else (),
        costs=tuple(cost_of(name, training) for name, training in trainings.items()),
        histories=tuple(history_of(name, one.lines) for name, one in trainings.items()),
    )


def save_results(folder: Path, results: Results) -> None:
    """Write what `load_results` reads into an evaluation's ``folder``."""
    write_sealed_json(folder / RESULTS, _FILE.dump_json(results, indent=1).decode())


def load_results(folder: Path) -> Results:
    """What an evaluation found, from ``RUN/evaluate/results.json``.

    Parameters
    ----------
    folder
        The evaluation's own folder, ``RUN / FOLDER``.

    Raises
    ------
    FifaError
        Where there is no evaluation, where it was stopped before all was measured, and where
        another version of fifa wrote it.
    """
    path = folder / RESULTS
    if not path.is_file():
        begun = folder.is_dir()
        raise FifaError(
            "nothing has been measured here yet" if begun else "no evaluation here",
            where=str(folder),
            do="run the same `fifa evaluate` to its end"
            if begun
            else "make one: fifa evaluate --base MODEL --tuned CHECKPOINT --prompts FILE --out RUN",
        )
    check_whole(path, "run the same `fifa evaluate` again: it makes it again")
    try:
        return _FILE.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise FifaError(
            "the evaluation was made by another version of fifa",
            where=str(path),
            do="run the same `fifa evaluate` again",
        ) from error


def is_evaluated(run: str | Path) -> bool:
    """Whether a folder holds an evaluation, finished or not."""
    return (Path(run) / FOLDER).is_dir()
