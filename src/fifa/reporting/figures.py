"""The page's figures: drawn by matplotlib, then made to follow the page's fonts and colours.

Colours are drawn as stand-ins and replaced by the style sheet's variables, so one figure serves a
light and a dark page; text stays text. Nothing in a figure comes from the data set but numbers.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET  # of what matplotlib has written, never of a file
from collections.abc import Sequence
from math import log
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fifa.evaluation.crossed import Crossed
from fifa.evaluation.history import History
from fifa.evaluation.stats import WinRate
from fifa.evaluation.win_rates import Curve
from fifa.formatting import number, shorten
from fifa.reporting.numbers import Histogram, PromptMap
from fifa.scoring.rewards.metrics import Agreement

# What stands for each of the style sheet's variables while matplotlib draws
COLOURS = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "kept": "#040404",
    "all": "#050505",
    "dropped": "#060606",
    **{f"scorer-{i}": f"#1{i}1{i}1{i}" for i in range(7)},
}
SCORERS = 7  # lines that can be told apart in one figure
# Of what shares a figure, in order: all pairs or the base model are grey, the kept pairs or the
# first checkpoint are the page's blue
ROLES = ("all", "kept", *(f"scorer-{i}" for i in range(SCORERS)))
DOTTED: dict[str, Any] = {"color": COLOURS["dropped"], "lw": 1.1, "ls": (0, (1, 2))}  # a coin toss
SIZE = (4.3, 2.9)  # inches of 72 units: about a phone's width, so that text keeps its size there

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fifa",
    "font.size": 11,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "text.color": COLOURS["ink"],
    "text.parse_math": False,
}
AXES = {
    "step": "steps of training",
    "pairs": "pairs seen, each time counted",
    "hours": "accelerator hours",
}
# The two images of a pair: a label and dashes
SIDES: dict[str, tuple[str, Any]] = {
    "winner": ("preferred image of ", "-"),
    "loser": ("rejected image of ", (0, (3, 1.5))),
}
# Figures of a training by their title: its curves with a label and dashes
HISTORY: dict[str, dict[str, tuple[str, Any]]] = {
    "loss": {"loss": ("", "-")},
    "implicit accuracy": {"accuracy": ("", "-")},
    "error minus the base's": SIDES,
}
# The same by noise level
BY_LEVEL: dict[str, dict[str, tuple[str, Any]]] = {
    "error above the base's": SIDES,
    "implicit accuracy": {"accuracy": ("", "-")},
    "output gradient": {"gradient": ("", "-")},
}
LINE, GAP = 0.2, 0.16  # inches from one win rate to the next, and beside that between two rows
Row = tuple[str, Sequence[tuple[int, WinRate]]]  # a label, and win rates by the model's place
Share = tuple[float, float, float]  # a value and the two ends of its interval


def role(place: int) -> str:
    """The style sheet's variable for what stands at this place of `ROLES`."""
    return ROLES[min(place, len(ROLES) - 1)]


def draw_agreement(curves: Sequence[pa.Table], cut: tuple[float, Agreement] | None) -> Markup:
    """Agreement among the top x by margin: the first curve with its band, the others as lines.

    Parameters
    ----------
    curves
        Tables of `fifa.scoring.rewards.metrics.agreement_by_margin`; of the others at most
        `SCORERS` are drawn.
    cut
        The share of the labelled pairs that was kept, and the agreement among them.
    """
    figure, axes = canvas()
    first, *others = ({name: c[name].to_numpy() for name in c.column_names} for c in curves)
    x = first["fraction"]
    axes.fill_between(x, first["low"], first["high"], color=COLOURS["kept"], alpha=0.16, lw=0)
    for i, other in enumerate(others[:SCORERS]):
        axes.plot(other["fraction"], other["share"], color=COLOURS[f"scorer-{i}"], lw=1.3)
    axes.plot(x, first["share"], color=COLOURS["kept"], lw=2.2)
    low = min([first["low"].min(), *(other["share"].min() for other in others)])
    start = min([x[0], *(other["fraction"][0] for other in others)])
    if cut is not None:
        low, start = min(low, cut[1].low), min(start, cut[0])
        axes.axvline(cut[0], color=COLOURS["ink"], lw=1, ls=(0, (4, 3)))
        _draw_intervals(axes, [cut[0]], [cut[1]], color=COLOURS["ink"], ms=6, lw=1.4, capsize=3.5)
    start *= 0.9
    axes.set_xscale("log")
    ticks = _ticks_1_3_10(start)
    axes.set_xlim(start, 1.06)
    axes.set_xticks(ticks, [_percent(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("share of pairs, largest margins first")
    _agreement_axis(axes, low)
    return svg(
        figure, "curve", "Agreement with the people's labels against the share kept by margin"
    )


def draw_parts(shares: Sequence[Agreement]) -> Markup:
    """Agreement in each part by margin, with intervals and the line of a coin toss."""
    figure, axes = canvas()
    x = range(1, len(shares) + 1)
    colour = COLOURS["kept"]
    axes.bar(x, [s.share for s in shares], width=0.74, color=colour, alpha=0.35, lw=0)
    _draw_intervals(axes, x, shares, color=colour, ms=4, capsize=2.5)
    axes.set_xticks(x)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(f"{len(shares)} equal parts by margin, smallest first")
    _agreement_axis(axes, min(s.low for s in shares))
    return svg(figure, "parts", "Agreement with the people's labels in each part by margin")


def _draw_intervals(
    axes: Axes, x: Sequence[float], shares: Sequence[Agreement], **style: Any
) -> None:
    # Where all agree, rounding may put an end of the interval on the wrong side of the share
    ends = [(max(0.0, s.share - s.low), max(0.0, s.high - s.share)) for s in shares]
    axes.errorbar(x, [s.share for s in shares], np.array(ends).T, fmt="o", **style)


def _agreement_axis(axes: Axes, low: float) -> None:
    bottom = max(0.0, np.floor(min(low, 0.48) * 10) / 10)
    axes.axhline(0.5, **DOTTED)
    ticks = np.arange(round(bottom * 10), 11, 1 if bottom > 0.25 else 2) / 10
    axes.set_yticks(ticks, [f"{t:.0%}" for t in ticks])
    axes.set_ylim(bottom, 1.015)


def draw_histogram(histogram: Histogram, label: str) -> Markup:
    """Before as a grey area, after as a line, both as shares; medians as ticks on the axis."""
    figure, axes = canvas()
    axes.stairs(histogram.before, histogram.edges, fill=True, color=COLOURS["all"], alpha=0.45)
    axes.stairs(histogram.after, histogram.edges, color=COLOURS["kept"], lw=2, baseline=None)
    top = max(float(histogram.before.max()), float(histogram.after.max())) * 1.14
    for value, colour in ((histogram.median_before, "all"), (histogram.median_after, "kept")):
        if np.isfinite(value):
            axes.plot([value], [top * 0.965], marker="v", color=COLOURS[colour], ms=7, lw=0)
    axes.set_ylim(0, top)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(lambda value, _: _percent(value))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(label)
    return svg(figure, f"histogram-{label}", f"Distribution of {label}: all pairs and kept pairs")


def draw_map(prompts: PromptMap) -> Markup:
    """All prompts as grey points and the kept ones over them; the points are a bitmap."""
    figure, axes = canvas((6.2, 4.4), dpi=120)
    size = float(np.clip(20_000 / max(len(prompts.before), 1), 5, 28))
    # A bitmap cannot follow the style sheet: these two are seen on a light and on a dark page
    for points, colour, alpha in (
        (prompts.before, "#818b98", 0.7),
        (prompts.after, "#3b82f6", 0.8),
    ):
        x, y = points.T
        axes.scatter(x, y, s=size, c=colour, alpha=alpha, lw=0, rasterized=True)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.margins(0.03)
    return svg(figure, "map", "Prompts in two dimensions: all in grey, kept in blue")


def canvas(size: tuple[float, float] = SIZE, dpi: int = 72) -> tuple[Figure, Axes]:
    """Empty axes in the page's style, ``size`` in inches of 72 units."""
    figure, [axes] = stacked(1, size, dpi)
    return figure, axes


def stacked(
    rows: int, size: tuple[float, float] = SIZE, dpi: int = 72
) -> tuple[Figure, list[Axes]]:
    """Empty axes above each other that share one below, in the page's style."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        every = list(figure.subplots(rows, sharex=True, squeeze=False)[:, 0])
    figure.patch.set_visible(False)
    for axes in every:
        axes.tick_params(length=3)
        axes.patch.set_visible(False)
    return figure, every


def _ticks_1_3_10(start: float) -> list[float]:
    ticks = [m * 10.0**e for e in range(-7, 1) for m in (1, 3)]
    inside = [t for t in ticks if start <= t <= 1]
    # Few decades: add more steps; many decades: only the tens
    if len(inside) < 3:
        inside = [t for t in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0) if t >= start]
    if len(inside) > 7:
        inside = [t for t in inside if abs(np.log10(t) - round(np.log10(t))) < 1e-9]
    return inside


def _percent(share: float) -> str:
    return f"{share * 100:.4g} %"


def svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as inline SVG: no style attributes, the page's colours, identifiers its own."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        anonymous = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", dpi=figure.dpi, metadata=anonymous)
    root = ET.fromstring(buffer.getvalue())
    _plain(root, name)
    view = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"class": "plot", "viewBox": view, "role": "img", "aria-label": title})
    text = ET.tostring(root, encoding="unicode")
    for role, colour in COLOURS.items():
        text = text.replace(f'"{colour}"', f'"var(--{role})"')
    return Markup(text)  # our own drawing, serialised by ElementTree: safe as it stands


def _plain(element: ET.Element, name: str) -> None:
    """Strip namespaces, style sheets and unused identifiers; style attributes become plain ones."""
    element.tag = element.tag.rpartition("}")[2]
    for child in list(element):
        if child.tag.rpartition("}")[2] in ("metadata", "style"):
            element.remove(child)
        else:
            _plain(child, name)
    found: dict[str, str] = {}
    for key, value in element.attrib.items():
        key = key.rpartition("}")[2]
        if key == "style":
            for part in value.split(";"):
                rule, _, setting = (piece.strip() for piece in part.partition(":"))
                if rule == "font":  # "10.5px 'DejaVu Sans', ...": the page has its own family
                    size = re.search(r"([\d.]+)px", setting)
                    found["font-size"] = size.group(1) if size else "10"
                elif rule and rule not in ("font-family", "image-rendering"):
                    found[rule] = setting
        elif key == "id" and element.tag not in ("path", "clipPath", "image"):
            continue
        elif key == "id":
            found["id"] = f"{name}-{value}"
        elif key == "href" and value.startswith("#"):
            found["href"] = f"#{name}-{value[1:]}"
        else:
            found[key] = value.replace("url(#", f"url(#{name}-")
    found.pop("xmlns", None)
    element.attrib.clear()
    element.attrib.update(found)


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


def draw_history(history: History, name: str) -> list[Markup]:
    """How a training went: its loss, its implicit accuracy, its errors against the reference's.

    Pairs that it was trained on are grey and those held out blue; the loser's error is dashed.
    Figures without a line of two points are left out. ``name`` begins those of the others.
    """
    sides = (("taught", "the pairs trained on", "all"), ("held", "held-out pairs", "kept"))
    figures = []
    for title, curves in HISTORY.items():
        figure, axes = canvas()
        told = []
        for side, pairs, colour in sides:
            style: dict[str, Any] = {"color": COLOURS[colour], "lw": 1.4, "alpha": 0.8}
            if side == "held":
                style = {"color": COLOURS[colour], "lw": 2, "marker": "o", "ms": 3}
            for curve, (label, dashes) in curves.items():
                points = [(m.step, getattr(m, curve)) for m in getattr(history, side)]
                points = [(step, value) for step, value in points if np.isfinite(value)]
                if len(points) < 2:
                    continue
                axes.plot(*zip(*points, strict=True), ls=dashes, **style)
                (_, first), (step, last) = points[0], points[-1]
                told.append(f"{label}{pairs}: {number(first)} to {number(last)} at step {step:,}")
        if not told:
            continue
        if history.best:
            axes.axvline(history.best, color=COLOURS["ink"], lw=1, ls=(0, (4, 3)))
            late = history.best > 0.8 * history.taught[-1].step
            axes.annotate(
                "best",
                (history.best, 1.0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(-4 if late else 4, 0),
                textcoords="offset points",
                ha="right" if late else "left",
                va="top",
                color=COLOURS["ink"],
            )
            told.append(f"the lowest held-out loss is at step {history.best:,}")
        if "winner" in curves:
            axes.axhline(0, **DOTTED)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(AXES["step"])
        axes.set_ylabel(title)
        figures.append(svg(figure, f"{name}-{next(iter(curves))}", f"{title}: {'; '.join(told)}"))
    return figures


def draw_trials(curves: Sequence[Sequence[tuple[int, float]]]) -> Markup:
    """The held-out loss of the trials of a search by step, the best one first and in colour."""
    figure, axes = canvas()
    for place, curve in reversed(list(enumerate(curves))):
        steps, losses = zip(*[(0, log(2)), *curve], strict=True)
        colour, width = (COLOURS["kept"], 2.2) if place == 0 else (COLOURS["all"], 1.2)
        axes.plot(steps, losses, color=colour, lw=width, marker="o", ms=3)
    axes.axhline(log(2), **DOTTED)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(AXES["step"])
    axes.set_ylabel("held-out loss")
    return svg(figure, "trials", "Loss on held-out pairs of every trial by steps of training")


def draw_levels(history: History, name: str) -> Markup | None:
    """Where in time a training fails: errors, implicit accuracy and gradient by noise level.

    In the colours and dashes of `draw_history`; None where nothing is known by level.
    """
    figure, every = stacked(len(BY_LEVEL), (SIZE[0], 2.2 * SIZE[1]))
    told = []
    sides = (
        ("the pairs trained on", history.taught_levels),
        ("held-out pairs", history.held_levels),
    )
    for axes, (title, curves) in zip(every, BY_LEVEL.items(), strict=True):
        for colour, (pairs, levels) in zip(("all", "kept"), sides, strict=True):
            for curve, (label, dashes) in curves.items():
                values = np.array(getattr(levels, curve) if levels else ())
                known = np.flatnonzero(np.isfinite(values))
                if not len(known):
                    continue
                at = (known + 0.5) / len(values)
                axes.plot(at, values[known], ls=dashes, marker="o", ms=3, color=COLOURS[colour])
                low, high = at[values[known].argmin()], at[values[known].argmax()]
                told.append(
                    f"{title}, {label}{pairs}: lowest {number(values[known].min())} at {low:.2f}, "
                    f"highest {number(values[known].max())} at {high:.2f}"
                )
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if "gradient" not in curves:
            axes.yaxis.set_major_formatter(lambda value, _: _percent(value))
            axes.axhline(0.5 if "accuracy" in curves else 0, **DOTTED)
        axes.set_ylabel(title)
    every[-1].set_xlim(0, 1)
    every[-1].set_xlabel("noise level (0: the image, 1: noise alone)")
    return svg(figure, f"{name}-levels", f"By noise level. {'; '.join(told)}") if told else None


def draw_rounds(
    lines: Sequence[tuple[int, Sequence[Share | None]]],
    label: str,
    name: str,
    level: float | None = None,
) -> Markup | None:
    """What each round of a loop bought, a line each with the band of its interval.

    Parameters
    ----------
    lines
        The place in `ROLES`, and a value with its interval for the base and for each round; None
        where it is not known.
    label
        Of the values.
    name
        Of the figure.
    level
        Where "no change" is.

    Returns None where no line has two values.
    """
    figure, axes = canvas()
    rounds = 1
    for place, values in lines:
        known = [(x, value) for x, value in enumerate(values) if value is not None]
        if len(known) < 2:
            continue
        at, colour = [x for x, _ in known], COLOURS[role(place)]
        low, high, middle = ([value[i] for _, value in known] for i in (1, 2, 0))
        axes.fill_between(at, low, high, color=colour, alpha=0.12, lw=0)
        axes.plot(at, middle, color=colour, lw=2, marker="o", ms=3.5)
        rounds = max(rounds, at[-1])
    if not axes.lines:
        return None
    if level is not None:
        axes.axhline(level, **DOTTED)
    axes.set_xticks(range(rounds + 1), ["base", *map(str, range(1, rounds + 1))])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    return svg(figure, name, f"{label} of the base and of the model of each round")


def draw_lines(
    lines: Sequence[tuple[str, Sequence[tuple[float, Crossed]]]],
    axis: str,
    name: str,
    shares: bool = False,
) -> Markup | None:
    """Gains by a number, a line each with the band of its interval; None for no line.

    Parameters
    ----------
    lines
        A colour of `ROLES`, and the numbers with their gains.
    axis
        What the numbers are; ``shares`` of all pairs are drawn on a log scale.
    name
        Of the figure.
    """
    figure, axes = canvas()
    for colour, points in lines:
        at = [x for x, _ in points]
        low, middle, high = ([getattr(p, n) for _, p in points] for n in ("low", "mean", "high"))
        axes.fill_between(at, low, high, color=COLOURS[colour], alpha=0.12, lw=0)
        axes.plot(at, middle, color=COLOURS[colour], lw=2, marker="o", ms=3.5)
    if not axes.lines:
        return None
    every = sorted({x for _, points in lines for x, _ in points})
    if shares:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(every, [_percent(x) for x in every])
    axes.axhline(0, **DOTTED)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(axis)
    axes.set_ylabel("gain over the base")
    return svg(figure, name, f"Gain over the base by {axis}")
