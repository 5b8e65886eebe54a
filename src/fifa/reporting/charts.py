"""The evaluation's figures: win rates with their intervals, and learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from fifa.evaluation.curves import Curve
from fifa.evaluation.stats import WinRate
from fifa.formatting import shorten
from fifa.reporting.figures import COLOURS, SCORERS, canvas, locator, svg

# Of the models in the order of the index: the base is grey, the first checkpoint is the page's blue
ROLES = ("all", "kept", *(f"scorer-{i}" for i in range(SCORERS)))
AXES = {
    "steps": "steps of training",
    "pairs": "pairs seen, each time counted",
    "hours": "accelerator hours",
}


@dataclass(frozen=True)
class Row:
    """A line of `draw_wins`: a label, and the win rate of each model by its place in the index."""

    label: str
    wins: tuple[tuple[int, WinRate], ...]


def role(place: int) -> str:
    """The style sheet's variable for the model at this place of the index."""
    return ROLES[min(place, len(ROLES) - 1)]


def draw_wins(rows: Sequence[Row], name: str, title: str) -> Markup:
    """Win rates as points with their intervals, one line a scorer or category."""
    most = max(len(row.wins) for row in rows)
    height = 0.62 + sum(0.16 + 0.2 * max(1, len(row.wins)) for row in rows)
    figure, axes = canvas(name, size=(4.6, max(1.5, height)))
    axes.axvline(0.5, color=COLOURS["dropped"], lw=1.1, ls=(0, (1, 2)))
    ticks, low, high = [], 0.42, 0.58
    place = 0.0
    for row in rows:
        step = 0.2
        for i, (model, wins) in enumerate(row.wins):
            y = -(place + step * i)
            colour = COLOURS[role(model)]
            axes.plot([wins.low, wins.high], [y, y], color=colour, lw=2.4, alpha=0.45)
            axes.plot([wins.share], [y], marker="o", ms=6.5, color=colour, lw=0, clip_on=False)
            low, high = min(low, wins.low), max(high, wins.high)
        ticks.append(-(place + step * (len(row.wins) - 1) / 2))
        place += step * max(1, len(row.wins)) + 0.16
    axes.set_yticks(ticks, [shorten(row.label, 20) for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.set_ylim(-(place - 0.16) + (0.02 if most > 1 else 0), 0.2)
    axes.set_xlim(max(0.0, low - 0.03), min(1.0, high + 0.03))
    axes.xaxis.set_major_locator(locator(6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value * 100:.0f} %")
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("win rate against the base")
    return svg(figure, name, title)


def draw_learning(
    curves: Sequence[tuple[int, Curve]], x: str, name: str, label: str
) -> Markup | None:
    """The mean reward of each training against one of `AXES`; None where that is not known.

    Parameters
    ----------
    curves
        The model's place in the index, and its curve.
    x
        A key of `AXES`.
    name
        Of the figure.
    label
        Of the reward.
    """
    figure, axes = canvas(name)
    drawn = 0
    for place, curve in curves:
        points = [point for point in curve.points if np.isfinite(_at(point, x))]
        if len(points) < 2:
            continue
        drawn += 1
        at = [_at(point, x) for point in points]
        colour = COLOURS[role(place)]
        low, high = ([getattr(p.mean, end) for p in points] for end in ("low", "high"))
        axes.fill_between(at, low, high, color=colour, alpha=0.12, lw=0)
        axes.plot(at, [p.mean.mean for p in points], color=colour, lw=2, marker="o", ms=3.5)
    if not drawn:
        return None
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(locator(5))
    axes.yaxis.set_major_locator(locator(5))
    axes.set_xlabel(AXES[x])
    axes.set_ylabel(shorten(label, 30))
    return svg(figure, name, f"{label} against {AXES[x]}")


def _at(point: Any, x: str) -> float:
    return float(point.step if x == "steps" else getattr(point, x))
