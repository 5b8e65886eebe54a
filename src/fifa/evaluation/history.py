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
class Levels:
    """Means by noise level, from the image to noise alone; NaN where a number is not known.

    Parameters
    ----------
    winner, loser
        By how much of the reference's error on the preferred and the rejected image the error is
        above it.
    accuracy
        Implicit accuracy.
    gradient
        The norm of the loss's gradient at the network's outputs.
    """

    winner: tuple[Number, ...]
    loser: tuple[Number, ...]
    accuracy: tuple[Number, ...]
    gradient: tuple[Number, ...]


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
    taught_levels, held_levels
        By noise level: over the last tenth of the lines, and at the last measurement.
    """

    model: str
    taught: tuple[Moment, ...]
    held: tuple[Moment, ...]
    best: int
    taught_levels: Levels | None = None
    held_levels: Levels | None = None


def history_of(model: str, lines: Sequence[Mapping[str, Any]]) -> History:
    """The history of ``model`` from the lines of a training's statistics."""
    known = [line for line in lines if isfinite(number(line.get("step")))]
    size = max(1, ceil(len(known) / POINTS))
    parts = [known[start : start + size] for start in range(0, len(known), size)]
    taught = tuple(_moment(part, "") for part in parts)
    held = tuple(_moment([line], "heldout_") for line in known if "heldout_loss" in line)
    losses = [moment for moment in held if isfinite(moment.loss)]
    best = min(losses, key=lambda moment: moment.loss, default=None)
    own = [line["by_level"] for line in known if "by_level" in line]
    measured = [line["heldout_by_level"] for line in known if "heldout_by_level" in line]
    return History(
        model,
        taught,
        held,
        best.step if best else 0,
        _levels(own[-max(1, len(own) // 10) :]),
        _levels(measured[-1:]),
    )


def number(value: Any) -> float:
    """``value`` where it is a number, NaN where it is anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain else nan


def _moment(lines: Sequence[Mapping[str, Any]], prefix: str) -> Moment:
    values = {
        curve: _mean([line.get(prefix + name) for line in lines]) for curve, name in CURVES.items()
    }
    return Moment(int(lines[-1]["step"]), **values)


def _levels(lines: Sequence[Any]) -> Levels | None:
    """The means of some lines, each with the weight of its pairs; None where they say nothing."""
    plain = [line for line in lines if isinstance(line, dict) and _whole(_row(line, "pairs"))]
    plain = [line for line in plain if len(_row(line, "pairs")) == len(_row(plain[-1], "pairs"))]
    if not plain:
        return None
    rows = [_row(line, "pairs") for line in plain]

    def total(name: str) -> list[float]:
        """The sums by level over all pairs."""
        sums = [0.0] * len(rows[0])
        for line, pairs in zip(plain, rows, strict=True):
            values = _row(line, name)
            values = values if len(values) == len(pairs) else [nan] * len(pairs)
            for level, (value, n) in enumerate(zip(values, pairs, strict=True)):
                sums[level] += value * n if n else 0.0
        return sums

    def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, ...]:
        return tuple(a / b if b else nan for a, b in zip(above, below, strict=True))

    pairs = [sum(column) for column in zip(*rows, strict=True)]

    def change(side: str) -> tuple[float, ...]:
        error, above = total(f"{side}_error"), total(f"{side}_minus_reference")
        return ratio(above, [one - other for one, other in zip(error, above, strict=True)])

    return Levels(
        winner=change("winner"),
        loser=change("loser"),
        accuracy=ratio(total("implicit_accuracy"), pairs),
        gradient=ratio(total("output_gradient"), pairs),
    )


def _whole(pairs: Sequence[float]) -> bool:
    return bool(pairs) and all(map(isfinite, pairs))


def _row(line: Mapping[str, Any], name: str) -> list[float]:
    """A number a level; empty where a line has no such row."""
    row = line.get(name)
    return [number(value) for value in row] if isinstance(row, list) else []


def _mean(values: Sequence[Any]) -> float:
    found = [value for value in map(number, values) if isfinite(value)]
    return sum(found) / len(found) if found else nan
