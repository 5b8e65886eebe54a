"""``loop.html``: what each round of `fifa loop` made, kept and bought, in a table and figures."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

from fifa.evaluation.generate import FOLDER
from fifa.evaluation.measure import scorer_name
from fifa.evaluation.models import BASE
from fifa.evaluation.results import Results, load_results
from fifa.evaluation.win_rates import Comparison, Level
from fifa.formatting import interval, number, percent, shorten, text_table
from fifa.reporting.figures import Share, draw_rounds, role
from fifa.reporting.page import again, render
from fifa.shards.files import read_json, write_text

ROUND_FILE = "round.json"  # in a round's folder, when the round is finished
PAGE = "loop.html"
SAME = (0.5, 0.5, 0.5)  # the base against itself


def write_loop(folder: str | Path) -> Path:
    """Write ``loop.html`` into a loop's folder; the same files give the same bytes.

    Raises `FifaError` where nothing is evaluated there.
    """
    folder = Path(folder)
    path = folder / PAGE
    write_text(path, render("loop.html.j2", loop_context(folder), again(folder)))
    return path


def loop_context(folder: Path) -> dict[str, Any]:
    """What the template reads."""
    results = load_results(folder / FOLDER)
    rounds = _rounds(folder, results)
    names = results.names[1:]
    scales = results.scales
    wins = {
        (c.scale.column, c.ours): c for c in results.comparisons if c.theirs == BASE and c.wins.n
    }
    diversity = {level.model: level for level in results.diversity}
    levels = {
        (scale.column, level.model): level
        for scale in scales
        for level in results.levels[scale.column]
    }
    titles = {scale.column: scale.name + (" *" if scale.picked else "") for scale in scales}
    share = [
        (place, [SAME, *(_win(wins.get((s.column, name))) for name in names)])
        for place, s in enumerate(scales, 1)
    ]
    shift = [
        (place, [(0.0, 0.0, 0.0), *(_shift(levels[s.column, name]) for name in names)])
        for place, s in enumerate(scales, 1)
    ]
    apart = [(0, [_mean(diversity.get(name)) for name in results.names])]
    figures = (
        draw_rounds(share, "win rate against the base", "rounds-wins", 0.5),
        draw_rounds(shift, "change of the mean reward", "rounds-reward", 0.0),
        draw_rounds(apart, "distance within a prompt", "rounds-diversity"),
    )
    first = next((scale for scale in scales if not scale.picked), None) or (scales or (None,))[0]
    last = wins.get((first.column, names[-1])) if first is not None and names else None
    return {
        "title": shorten(folder.resolve().name, 80),
        "rounds": rounds,
        "scales": scales,
        "titles": titles,
        "wins": wins,
        "levels": levels,
        "diversity": diversity,
        "costs": {cost.model: cost for cost in results.costs},
        "last": last,
        "results": results,
        "base": BASE,
        "colours": {titles[s.column]: role(place) for place, s in enumerate(scales, 1)},
        "figures": [figure for figure in figures if figure is not None],
    }


def loop_text(folder: str | Path) -> str:
    """The table of the rounds for a terminal."""
    context = loop_context(Path(folder))
    scales = context["scales"]
    rows = [["", "pairs", "kept", *(context["titles"][scale.column] for scale in scales)]]
    rows[0] += ["diversity"]
    for name, facts in context["rounds"].items():
        row = [name, f"{facts['pairs']:,}", f"{facts['kept']:,}"]
        for scale in scales:
            found = context["wins"].get((scale.column, name))
            row.append(f"{percent(found.wins.share)} ({interval(found.wins)})" if found else "-")
        level = context["diversity"].get(name)
        rows.append([*row, number(level.mean.mean) if level else "-"])
    return "\n".join(text_table(rows))


def _rounds(folder: Path, results: Results) -> dict[str, dict[str, Any]]:
    """The facts of every round that was evaluated, by its name."""
    found = {}
    for name in results.names[1:]:
        facts = read_json(folder / name / ROUND_FILE, "the round", sealed=True)
        specs = list(facts["means"])
        facts["rewards"] = {scorer_name(spec, specs): facts["means"][spec] for spec in specs}
        found[name] = facts
    return found


def _win(found: Comparison | None) -> Share | None:
    return (found.wins.share, found.wins.low, found.wins.high) if found is not None else None


def _shift(level: Level) -> Share | None:
    """The mean difference to the base over the standard deviation of the base's images."""
    shift = level.shift
    if shift is None or not level.spread > 0 or not isfinite(shift.mean):
        return None
    return shift.mean / level.spread, shift.low / level.spread, shift.high / level.spread


def _mean(level: Level | None) -> Share | None:
    if level is None or not isfinite(level.mean.mean):
        return None
    return level.mean.mean, level.mean.low, level.mean.high
