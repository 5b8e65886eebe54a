"""How a checkpoint got there: reward against steps, pairs seen and accelerator hours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fifa.evaluation.measure import Measured, Scale
from fifa.evaluation.models import BASE, Model, find_checkpoint
from fifa.evaluation.provenance import Training
from fifa.evaluation.stats import Mean, Number, WinRate
from fifa.evaluation.win_rates import compare_models, mean_of, values

CHECKPOINTS = "checkpoints"
STEP = re.compile(r"step-0*(\d+)$")
AT = "@"  # between a checkpoint's name and its step
LAST = 5  # checkpoints whose spread says how stable a training was


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
    before = [line for line in training.lines if line["step"] <= step]
    if not before:
        return float("nan"), float("nan")
    last = max(before, key=lambda line: line["step"])
    # a line may be some steps old: what a step takes is then the mean of the steps before it
    scale = step / last["step"] if last["step"] else 1.0
    return last["pairs"] * scale, last["seconds"] * scale
