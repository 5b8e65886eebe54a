"""REPORT: several runs in one page, and in one table on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fifa.evaluation.compare import Compared
from fifa.formatting import interval, number, percent, seconds, shorten
from fifa.reporting.figures import draw_learning, draw_wins, role
from fifa.reporting.page import render
from fifa.shards.files import write_text


def write_comparison(compared: Compared, path: str | Path) -> Path:
    """Write a page with one table and one figure of several runs; the same runs, the same bytes."""
    path = Path(path)
    write_text(path, render("compare.html.j2", _context(compared)))
    return path


def comparison_text(compared: Compared) -> str:
    """The table for a terminal."""
    scorers = [scale.name + (" *" if scale.picked else "") for scale in compared.scales]
    rows = [["checkpoint", *scorers, "diversity", "selecting", "training", "acc. hours"]]
    for entry in compared.entries:
        wins = [f"{percent(c.wins.share)} ({interval(c.wins)})" for c in entry.wins]
        diversity = number(entry.diversity.mean.mean) if entry.diversity else ""
        cost = entry.cost
        times = [seconds(cost.selecting or float("nan")), seconds(cost.training)]
        rows.append([entry.label, *wins, diversity, *times, number(cost.hours)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _context(compared: Compared) -> dict[str, Any]:
    entries = compared.entries
    wins = []
    for i, scale in enumerate(compared.scales):
        picked = any(entry.wins[i].scale.picked for entry in entries)
        rates = [(place, entry.wins[i].wins) for place, entry in enumerate(entries, 1)]
        wins.append((f"{scale.name}{' *' if picked else ''}", rates))
    curves = [(place + 1, curve) for place, curve in compared.curves]
    judged = [entry for entry in entries if entry.wins[0].wins.n]
    return {
        "title": shorten(", ".join(dict.fromkeys(entry.run for entry in entries)), 80),
        "compared": compared,
        "colours": {entry.label: role(place) for place, entry in enumerate(entries, 1)},
        "best": max(judged, key=lambda entry: entry.wins[0].wins.share, default=None),
        "wins_figure": draw_wins(wins, "wins"),
        "figures": draw_learning(curves, compared.scales[0].name),
    }
