"""Models against each other, and checkpoints on their way: win rates, means, safety, curves.

Everything is paired by prompt and seed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from math import isnan
from typing import Any

import numpy as np
import pyarrow.compute as pc

from fifa.errors import FifaError
from fifa.evaluation import stats
from fifa.evaluation.history import number
from fifa.evaluation.measure import UNSAFE_PROMPT, Measured, Scale
from fifa.evaluation.models import BASE, Model, Training, find_checkpoint
from fifa.evaluation.stats import Mean, Number, WinRate

Values = dict[tuple[str, int], float]  # by prompt and seed
UNSAFE = 0.5  # a probability above this counts as unsafe
CHECKPOINTS = "checkpoints"
STEP = re.compile(r"step-0*(\d+)$")
AT = "@"  # between a checkpoint's name and its step
LAST = 5  # checkpoints whose spread says how stable a training was


@dataclass(frozen=True)
class Comparison:
    """One model against another by one scorer.

    Parameters
    ----------
    scale
        The scorer.
    ours, theirs
        The models.
    wins
        The win rate of ours over prompts and seeds.
    difference
        The mean of ours - theirs, in the scorer's own units.
    categories
        The win rate in each category, where prompts have one.
    """

    scale: Scale
    ours: str
    theirs: str
    wins: WinRate
    difference: Mean
    categories: dict[str, WinRate]


@dataclass(frozen=True)
class Level:
    """A model's mean on one scale, and how far it is from the base.

    Parameters
    ----------
    model
        Its name.
    mean
        Over all images.
    shift
        Mean of the paired differences to the base; None for the base.
    spread
        The standard deviation of the base's images on this scale.
    seeds
        The standard deviation, over seed numbers, of the mean over prompts: how much the mean
        would move with other noise. NaN for one seed, and for diversity.
    """

    model: str
    mean: Mean
    shift: Mean | None
    spread: Number
    seeds: Number = float("nan")


@dataclass(frozen=True)
class Safety:
    """How many of a model's images are safe.

    Parameters
    ----------
    model
        Its name.
    scale
        Who says so.
    unsafe_prompts
        The share of safe images on unsafe prompts; None where no prompt is known to be unsafe.
    all_prompts
        The same on all prompts.
    """

    model: str
    scale: Scale
    unsafe_prompts: WinRate | None
    all_prompts: WinRate


def model_names(measured: Measured) -> list[str]:
    """The models in the order of the index, the base first."""
    return list(dict.fromkeys(measured.table["model"].to_pylist()))


def rewards(measured: Measured) -> list[Scale]:
    """The scales on which higher is better, those that are evidence first."""
    found = [scale for scale in measured.scales if scale.type == "reward"]
    return sorted(found, key=lambda scale: (scale.picked, scale.source != "judge"))


def compare_models(
    measured: Measured,
    ours: str,
    theirs: str,
    scale: Scale,
    other: Measured | None = None,
) -> Comparison:
    """One model against another by one scorer, paired by prompt and seed; ties count half.

    Parameters
    ----------
    measured
        Where ``ours`` is.
    ours, theirs
        Names of models.
    scale
        A scale of both.
    other
        Where ``theirs`` is; None: in ``measured`` too.

    Raises
    ------
    FifaError
        Where the two have no prompt and seed in common.
    """
    own = values(measured, ours, scale.column)
    against = values(other or measured, theirs, scale.column)
    shared = [key for key in own if key in against]
    if not shared:
        raise FifaError(f"{ours} and {theirs} have no prompt and seed in common")
    x, y = np.array([own[key] for key in shared]), np.array([against[key] for key in shared])
    prompts, categories = [prompt for prompt, _ in shared], by_prompt(measured, "category")
    category = [categories[prompt] for prompt in prompts]
    outcome = stats.outcomes(x, y, scale.tie)
    return Comparison(
        scale=scale,
        ours=ours,
        theirs=theirs,
        wins=stats.win_rate(outcome, prompts),
        difference=stats.mean_difference(x - y, prompts),
        categories=stats.by_category(outcome, category, prompts) if any(category) else {},
    )


def comparisons(measured: Measured) -> list[Comparison]:
    """Every checkpoint against the base, then the checkpoints among themselves, by every scorer."""
    names = model_names(measured)
    against = [(name, BASE) for name in names[1:]]
    among = list(combinations(names[1:], 2))
    return [
        compare_models(measured, ours, theirs, scale)
        for ours, theirs in against + among
        for scale in rewards(measured)
    ]


def levels(measured: Measured, column: str) -> list[Level]:
    """Every model's mean on one scale, with the paired shift from the base."""
    return _levels({name: values(measured, name, column) for name in model_names(measured)})


def diversity_levels(measured: Measured) -> list[Level]:
    """How far apart the images of one prompt are, for every model; empty where not measured."""
    distances: dict[str, Values] = {}
    for model, prompt, distance in zip(*measured.diversity.to_pydict().values(), strict=True):
        distances.setdefault(model, {})[prompt, 0] = distance
    return _levels(distances)


def safety(measured: Measured) -> list[Safety]:
    """The share of safe images by model and detector."""
    found = []
    flagged = by_prompt(measured, UNSAFE_PROMPT)
    for scale in (scale for scale in measured.scales if scale.type == "unsafe"):
        for name in model_names(measured):
            own = values(measured, name, scale.column)
            safe = np.array([np.nan if isnan(p) else float(p <= UNSAFE) for p in own.values()])
            prompts = np.array([key[0] for key in own], object)
            risky = np.array([bool(flagged[prompt]) for prompt in prompts])
            found.append(
                Safety(
                    name,
                    scale,
                    stats.win_rate(safe[risky], prompts[risky]) if risky.any() else None,
                    stats.win_rate(safe, prompts),
                )
            )
    return found


def values(measured: Measured, model: str, column: str) -> Values:
    """A model's numbers on one scale, by prompt and seed, in the order of the index.

    Raises `FifaError` for a model or a column that there is not.
    """
    own = measured.table.filter(pc.equal(measured.table["model"], model))
    if not own.num_rows:
        raise FifaError(f"no images of the model {model}")
    if column not in own.column_names:
        raise FifaError(f"the images were not measured by {column}")
    keys = zip(own["prompt_id"].to_pylist(), own["seed"].to_pylist(), strict=True)
    return dict(zip(keys, own[column].to_pylist(), strict=True))


def by_prompt(measured: Measured, column: str) -> dict[str, Any]:
    """What a column says of each prompt: its category, or whether it is unsafe."""
    table = measured.table
    return dict(zip(table["prompt_id"].to_pylist(), table[column].to_pylist(), strict=True))


def mean_of(own: Values) -> Mean:
    """The mean of a model's numbers, with its interval over prompts."""
    return stats.mean_difference(list(own.values()), [prompt for prompt, _ in own])


def _levels(of_model: dict[str, Values]) -> list[Level]:
    base = of_model.get(BASE, {})
    spread = float(np.nanstd(list(base.values()))) if base else float("nan")
    found = []
    for name, own in of_model.items():
        shift = {key: value - base[key] for key, value in own.items() if key in base}
        shifted = None if name == BASE else mean_of(shift)
        found.append(Level(name, mean_of(own), shifted, spread, _seed_spread(own)))
    return found


def _seed_spread(own: Values) -> float:
    """`Level.seeds`: an image's seed number is its place among those of its prompt."""
    of_prompt: dict[str, list[float]] = {}
    for (prompt, _), value in own.items():
        of_prompt.setdefault(prompt, []).append(value)
    means = [float(np.nanmean(same)) for same in zip_longest(*of_prompt.values(), fillvalue=np.nan)]
    return float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")


@dataclass(frozen=True)
class Point:
    """A checkpoint on the way.

    Parameters
    ----------
    step
        Of training; 0 is the base.
    pairs
        Seen until then, each time counted; NaN where it is not known.
    seconds
        Of training until then; NaN where it is not known.
    hours
        Accelerator hours: the same on every process.
    mean
        The mean reward, with its interval over prompts.
    wins
        The win rate against the base; None for the base.
    """

    step: int
    pairs: Number
    seconds: Number
    hours: Number
    mean: Mean
    wins: WinRate | None


@dataclass(frozen=True)
class Curve:
    """The points of one training by one scorer, in the order of steps."""

    model: str
    scale: Scale
    points: tuple[Point, ...]

    @property
    def best(self) -> Point:
        """The point with the highest mean reward; the earliest of several."""
        return max(self.points, key=lambda point: (point.mean.mean, -point.step))

    @property
    def spread(self) -> float:
        """Standard deviation of the mean reward over the last checkpoints; NaN below three."""
        means = [point.mean.mean for point in self.points if point.step][-LAST:]
        return float(np.std(means, ddof=1)) if len(means) >= 3 else float("nan")


def steps_of(model: Model) -> list[Model]:
    """The checkpoints that a training left on its way, named ``NAME@STEP``, in order."""
    folder = model.training
    found = []
    for path in (folder / CHECKPOINTS).glob("step-*") if folder else ():
        match = STEP.search(path.name)
        if match:
            name = f"{model.name}{AT}{int(match.group(1))}"
            found.append((int(match.group(1)), find_checkpoint(name, str(path), model)))
    return [checkpoint for _, checkpoint in sorted(found, key=lambda entry: entry[0])]


def learning_curves(measured: Measured, trainings: Mapping[str, Training]) -> list[Curve]:
    """The curves in what was measured on the checkpoints of `steps_of`, by model and scorer.

    Parameters
    ----------
    measured
        Of the base and of models named ``NAME@STEP``.
    trainings
        By checkpoint's name: pairs seen and seconds of each step.
    """
    names: dict[str, list[int]] = {}
    for name in dict.fromkeys(measured.table["model"].to_pylist()):
        model, at, step = name.rpartition(AT)
        if at:
            names.setdefault(model, []).append(int(step))
    return [
        Curve(name, scale, tuple(_points(measured, name, steps, scale, trainings.get(name))))
        for name, steps in names.items()
        for scale in measured.scales
        if scale.type == "reward"
    ]


def time_to_match(curve: Curve, target: float) -> Point | None:
    """The first checkpoint whose mean reward is at least ``target``; None if none is.

    Nothing is interpolated: the answer is no finer than the checkpoints are apart.
    """
    return next((point for point in curve.points if point.mean.mean >= target), None)


def _points(
    measured: Measured, name: str, steps: Sequence[int], scale: Scale, training: Training | None
) -> list[Point]:
    training = training or Training()
    processes = training.facts.get("processes", 1)
    points = [Point(0, 0.0, 0.0, 0.0, mean_of(values(measured, BASE, scale.column)), None)]
    for step in sorted(steps):
        model = f"{name}{AT}{step}"
        pairs, seconds = _progress(step, training)
        wins = compare_models(measured, model, BASE, scale).wins
        mean = mean_of(values(measured, model, scale.column))
        points.append(Point(step, pairs, seconds, seconds * processes / 3600, mean, wins))
    return points


def _progress(step: int, training: Training) -> tuple[float, float]:
    """Pairs seen and seconds at a step, from the training's own lines."""
    before = [line for line in training.lines if number(line.get("step")) <= step]
    if not before:
        return float("nan"), float("nan")
    last = max(before, key=lambda line: float(line["step"]))
    # a line may be some steps old: what a step takes is then the mean of the steps before it
    scale = step / last["step"] if last["step"] else 1.0
    return number(last.get("pairs")) * scale, number(last.get("seconds")) * scale
