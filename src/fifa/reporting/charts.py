"""The evaluation's figures: win rates with their intervals, and learning curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from fifa.evaluation.curves import Curve
from fifa.evaluation.stats import WinRate
from fifa.formatting import shorten
from fifa.reporting.figures import COLOURS, DOTTED, canvas, role, svg

AXES = {
    "step": "steps of training",
    "pairs": "pairs seen, each time counted",
    "hours": "accelerator hours",
}
LINE, GAP = 0.2, 0.16  # inches from one win rate to the next, and beside that between two rows

Row = tuple[str, Sequence[tuple[int, WinRate]]]  # a label, and win rates by the model's place


def draw_wins(rows: Sequence[Row], name: str, by: str = "by scorer") -> Markup | None:
    """Win rates as points with their intervals, one row a scorer or category.

    Rows without a win rate are left out; None where no row has one.
    """
    rows = [row for row in rows if row[1]]
    if not rows:
        return None
    most = max(len(wins) for _, wins in rows)
    height = 0.62 + sum(GAP + LINE * len(wins) for _, wins in rows)
    figure, axes = canvas((4.6, max(1.5, height)))
    axes.axvline(0.5, **DOTTED)
    ticks, low, high, top = [], 0.42, 0.58, 0.0
    for _, wins in rows:
        for line, (place, rate) in enumerate(wins):
            y, colour = top - LINE * line, COLOURS[role(place)]
            axes.plot([rate.low, rate.high], [y, y], color=colour, lw=2.4, alpha=0.45)
            axes.plot([rate.share], [y], marker="o", ms=6.5, color=colour, lw=0, clip_on=False)
            low, high = min(low, rate.low), max(high, rate.high)
        ticks.append(top - LINE * (len(wins) - 1) / 2)
        top -= LINE * len(wins) + GAP
    axes.set_yticks(ticks, [shorten(label, 20) for label, _ in rows])
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.set_ylim(top + GAP + (0.02 if most > 1 else 0), 0.2)
    axes.set_xlim(max(0.0, low - 0.03), min(1.0, high + 0.03))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value * 100:.0f} %")
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("win rate against the base")
    return svg(figure, name, f"Win rates against the base {by}, with intervals")


def draw_learning(curves: Sequence[tuple[int, Curve]], label: str) -> list[Markup]:
    """The mean reward of each training, a figure for each of `AXES` that is known.

    Parameters
    ----------
    curves
        The model's place in the index, and its curve.
    label
        Of the reward.
    """
    figures = []
    for x, axis in AXES.items():
        figure, axes = canvas()
        for place, curve in curves:
            points = [point for point in curve.points if np.isfinite(getattr(point, x))]
            if len(points) < 2:
                continue
            at, colour = [getattr(point, x) for point in points], COLOURS[role(place)]
            low, high = ([getattr(p.mean, end) for p in points] for end in ("low", "high"))
            axes.fill_between(at, low, high, color=colour, alpha=0.12, lw=0)
            axes.plot(at, [p.mean.mean for p in points], color=colour, lw=2, marker="o", ms=3.5)
        if not axes.lines:
            continue
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(axis)
        axes.set_ylabel(shorten(label, 30))
        figures.append(svg(figure, f"curve-{x}", f"{label} against {axis}"))
    return figures
