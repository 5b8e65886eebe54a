"""REPORT: several runs in one page, and in one table on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fifa.evaluation.compare import Compared
from fifa.formatting import number, percent, shorten, span, time
from fifa.reporting import charts
from fifa.reporting.page import render
from fifa.shards.files import write_text


def write_comparison(compared: Compared, path: str | Path) -> Path:
    """Write a page with one table and one figure of several runs; the same runs, the same bytes."""
    path = Path(path)
    write_text(path, render("compare.html.j2", _context(compared)))
    return path


def comparison_text(compared: Compared) -> str:
    """The table for a terminal."""
    heads = ["checkpoint", *(s.name + (" *" if s.picked else "") for s in compared.scales)]
    heads += ["diversity", "selecting", "training", "acc. hours"]
    rows = [heads]
    for entry in compared.entries:
        wins = [f"{percent(c.wins.share)} ({span(c.wins)})" for c in entry.wins]
        apart = number(entry.diversity.mean.mean) if entry.diversity else ""
        cost = entry.cost
        times = [time(cost.selecting or float("nan")), time(cost.training), number(cost.hours)]
        rows.append([entry.label, *wins, apart, *times])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _context(compared: Compared) -> dict[str, Any]:
    rows = [
        charts.Row(
            f"{scale.name}{' *' if any(e.wins[i].scale.picked for e in compared.entries) else ''}",
            tuple((place + 1, e.wins[i].wins) for place, e in enumerate(compared.entries)),
        )
        for i, scale in enumerate(compared.scales)
    ]
    title = "Win rates against the base by scorer, with intervals"
    placed = [(place + 1, curve) for place, curve in compared.curves]
    name = compared.scales[0].name
    figures = [
        figure
        for x in charts.AXES
        if placed and (figure := charts.draw_learning(placed, x, f"curve-{x}", name)) is not None
    ]
    return {
        "title": shorten(", ".join(dict.fromkeys(e.run for e in compared.entries)), 80),
        "c": compared,
        "best": max(
            (e for e in compared.entries if e.wins[0].wins.n),
            key=lambda e: e.wins[0].wins.share,
            default=None,
        ),
        "wins": charts.draw_wins(rows, "wins", title),
        "figures": figures,
        "role": charts.role,
    }
