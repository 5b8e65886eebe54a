"""How a training went: the lines of its ``stats.jsonl`` as the curves that the report draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, nan
from typing import Any

from fifa.evaluation.stats import Number

POINTS = 50  # of a curve, at most; more lines are averaged
# A curve, and what a line calls its number; of held-out pairs with ``heldout_`` before it.
CURVES = {
    "loss": "loss",
    "accuracy": "implicit_accuracy",
    "winner": "winner_minus_reference",
    "loser": "loser_minus_reference",
}


@dataclass(frozen=True)
class Moment:
    """The means of some lines of metrics; NaN where a number is not known.

    Parameters
    ----------
    step
        The last line's.
    loss, accuracy
        Loss and implicit accuracy.
    winner, loser
        The error on the preferred and on the rejected image, minus the reference's.
    """

    step: int
    loss: Number
    accuracy: Number
    winner: Number
    loser: Number


@dataclass(frozen=True)
class History:
    """How one training went.

    Parameters
    ----------
    model
        Its checkpoint's name.
    taught, held
        On the pairs that it was trained on, and on those held out; in the order of steps.
    best
        The step after which the loss on held-out pairs was lowest; 0 where none were.
    """

    model: str
    taught: tuple[Moment, ...]
    held: tuple[Moment, ...]
    best: int


def history_of(model: str, lines: Sequence[Mapping[str, Any]]) -> History:
    """The history of ``model`` from the lines of a training's statistics."""
    known = [line for line in lines if isfinite(number(line.get("step")))]
    size = max(1, ceil(len(known) / POINTS))
    parts = [known[start : start + size] for start in range(0, len(known), size)]
    taught = tuple(_moment(part, "") for part in parts)
    held = tuple(_moment([line], "heldout_") for line in known if "heldout_loss" in line)
    losses = [moment for moment in held if isfinite(moment.loss)]
    best = min(losses, key=lambda moment: moment.loss, default=None)
    return History(model, taught, held, best.step if best else 0)


def number(value: Any) -> float:
    """``value`` where it is a number, NaN where it is anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain else nan


def _moment(lines: Sequence[Mapping[str, Any]], prefix: str) -> Moment:
    values = {
        curve: _mean([line.get(prefix + name) for line in lines]) for curve, name in CURVES.items()
    }
    return Moment(int(lines[-1]["step"]), **values)


def _mean(values: Sequence[Any]) -> float:
    found = [value for value in map(number, values) if isfinite(value)]
    return sum(found) / len(found) if found else nan
