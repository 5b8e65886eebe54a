"""What the page says of an evaluation: its results, with figures and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

from fifa.errors import FifaError
from fifa.evaluation.generate import FOLDER, read_index
from fifa.evaluation.history import History
from fifa.evaluation.judges import COLOURS
from fifa.evaluation.measure import load_measured
from fifa.evaluation.models import BASE
from fifa.evaluation.results import Results, load_results
from fifa.evaluation.vote.results import Results as Votes
from fifa.evaluation.vote.results import vote_results
from fifa.evaluation.vote.store import FILE
from fifa.evaluation.win_rates import Comparison, Level, time_to_match
from fifa.formatting import number, percent, shorten, signed
from fifa.reporting.examples import side_by_side
from fifa.reporting.figures import draw_history, draw_learning, draw_levels, draw_wins, role

MOST_CATEGORIES = 12
MOST_TRAININGS = 6
METHODS = {
    "base": "the base model",
    "lora": "LoRA on the base",
    "part": "its own UNet or transformer",
    "pipeline": "a whole pipeline",
}


def evaluation_context(run: Path) -> dict[str, Any]:
    """What the templates of the evaluation read; `FifaError` where nothing was measured yet."""
    folder = run / FOLDER
    results = load_results(folder)
    images, measured = read_index(folder), load_measured(folder)
    if not images.select(["model", "file"]).equals(measured.table.select(["model", "file"])):
        raise FifaError(
            "the images have changed since they were measured",
            where=str(folder),
            do="run the same `fifa evaluate` to its end",
        )
    names, scales = results.names, results.scales
    colours_of = {name: role(place) for place, name in enumerate(names)}
    comparisons = sorted(results.comparisons, key=lambda c: scales.index(c.scale))
    against = [c for c in comparisons if c.theirs == BASE]
    best = headline(results.comparisons)
    shown = side_by_side(folder, images, measured, best.ours, best.scale) if best else ([], 0)
    wins = [
        (
            f"{scale.name}{' *' if scale.picked else ''}",
            [(names.index(c.ours), c.wins) for c in against if c.scale == scale and c.wins.n],
        )
        for scale in scales
    ]
    colours = {name: results.levels[name] for name in COLOURS}
    return {
        "results": results,
        "methods": METHODS,
        "colours": colours_of,
        "trainings": trainings(results.histories, colours_of),
        "images": len(images),
        "best": best,
        "others": _others(results.comparisons, best),
        "votes": _votes(run, names),
        "against": against,
        "among": [c for c in comparisons if c.theirs != BASE],
        "wins": draw_wins(wins, "wins"),
        "categories": _categories(against, best, names),
        "groups": shown[0],
        "hidden": shown[1],
        "curves": _curves(results, best),
        "symptoms": symptoms(names[1:], results.comparisons, results.diversity, colours),
        "settings": _settings(results),
    }


def headline(comparisons: Sequence[Comparison]) -> Comparison | None:
    """The comparison that the verdict is of: the best checkpoint by the first independent scorer.

    Judges come before scorers, and what picked the data last (`fifa.evaluation.win_rates.rewards`).
    """
    first = next((c.scale for c in comparisons), None)
    against = [c for c in comparisons if c.theirs == BASE and c.scale == first and c.wins.n]
    return max(against, key=lambda c: c.wins.share, default=None)


def _others(comparisons: Sequence[Comparison], best: Comparison | None) -> list[Comparison]:
    """What stands beside the verdict: the other checkpoints against the base and against it."""
    return [
        c
        for c in comparisons
        if best is not None
        and c is not best
        and c.scale == best.scale
        and (c.theirs == BASE or best.ours in (c.ours, c.theirs))
    ]


def _votes(run: Path, names: list[str]) -> Votes | None:
    """What people voted so far, on models that are still in the index; None without votes."""
    if not (run / FOLDER / FILE).exists():
        return None
    votes = vote_results(run)
    verdicts = [v for v in votes.verdicts if {v.ours, v.theirs} <= {*names} and v.rate.n]
    verdicts.sort(key=lambda v: (v.theirs != BASE, -v.rate.share))
    return replace(votes, verdicts=tuple(verdicts)) if verdicts else None


def _categories(
    against: list[Comparison], best: Comparison | None, names: list[str]
) -> dict[str, Any] | None:
    """The figure and the table by category, for the verdict's scorer; None without categories."""
    if best is None:
        return None
    prompts = {name: wins.prompts for name, wins in best.categories.items() if wins.n}
    shown = sorted(prompts, key=lambda name: (-prompts[name], name))[:MOST_CATEGORIES]
    if len(shown) < 2:
        return None
    own = [c for c in against if c.scale == best.scale]
    rows = [
        (name, [(names.index(c.ours), c.categories[name]) for c in own if name in c.categories])
        for name in shown
    ]
    return {
        "figure": draw_wins(rows, "categories", "by category"),
        "rows": [(shorten(name, 60), prompts[name]) for name in shown],
        "all": len(prompts),
    }


def _curves(results: Results, best: Comparison | None) -> dict[str, Any] | None:
    """Figures for the verdict's scorer, and what the others say in tables."""
    if not results.curves or best is None:
        return None
    names = results.names
    own = [curve for curve in results.curves if curve.scale.column == best.scale.column]
    placed = [(names.index(curve.model) if curve.model in names else 0, curve) for curve in own]
    costs = {cost.model: cost for cost in results.costs}
    matches = []
    for ours, theirs in permutations(own, 2):
        point = time_to_match(ours, theirs.best.mean.mean)
        # what selecting took is 0 where no run of ours did it: then the sum is not known
        selecting = costs[ours.model].selecting or float("nan")
        matches.append((ours, theirs, point, point.seconds + selecting if point else None))
    return {
        "figures": draw_learning(placed, best.scale.name),
        "matches": matches,
        "prompts": own[0].points[0].mean.prompts,
    }


def trainings(histories: Sequence[History], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the template of trainings reads: the figures of each, and its numbers at its best."""
    found = []
    for place, history in enumerate(histories[:MOST_TRAININGS]):
        figures = draw_history(history, f"training-{place}")
        best = next((one for one in history.held if one.step == history.best), None)
        if figures:
            found.append(
                {
                    "name": history.model,
                    "colour": colours[history.model],
                    "figures": figures,
                    "levels": draw_levels(history, f"training-{place}"),
                    "best": best,
                    "last": history.held[-1] if history.held else None,
                }
            )
    return found


def _settings(results: Results) -> dict[str, str]:
    """How the images were made, in words."""
    own, settings = "the pipeline's own", results.settings
    sized = settings.width and settings.height
    named = {
        "sampler": settings.sampler,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "size": f"{settings.width} x {settings.height}" if sized else "the model's own",
        "negative prompt": settings.negative or "none",
        "images a prompt": results.seeds,
        "precision": f"{settings.identity['dtype']} on {settings.device}",
    }
    return {
        name: shorten(own if value is None else str(value), 80) for name, value in named.items()
    }


class Symptom(NamedTuple):
    """Something that reward hacking would show as, looked for in one checkpoint."""

    model: str
    name: str
    finding: str  # in words and numbers
    present: bool  # the interval leaves out "no change"


def symptoms(
    tuned: list[str],
    comparisons: Sequence[Comparison],
    diversity: Sequence[Level],
    colours: Mapping[str, Sequence[Level]],
) -> list[Symptom]:
    """What reward hacking looks like, looked for in every checkpoint of ``tuned``."""
    found = []
    for model in tuned:
        own = [c for c in comparisons if c.ours == model and c.theirs == BASE and c.wins.n]
        picked = [c.wins.share for c in own if c.scale.picked]
        independent = [c for c in own if not c.scale.picked]
        if picked and independent:
            worst = min(independent, key=lambda c: c.wins.share)
            text = (
                f"{percent(max(picked))} by the scorer that picked the data, "
                f"{percent(worst.wins.share)} by {shorten(worst.scale.name, 40)}"
            )
            lost = any(c.wins.high < 0.5 for c in independent)
            found.append(Symptom(model, "gain that independent scorers do not see", text, lost))
        named = [("less varied images of one prompt", diversity)]
        named += [(f"shift in {name}", levels) for name, levels in colours.items()]
        for name, levels in named:
            for level in levels:
                if level.model == model and (shift := level.shift) is not None:
                    up = shift.low > 0 and levels is not diversity
                    found.append(Symptom(model, name, _change(level), shift.high < 0 or up))
    return found


def _change(level: Level) -> str:
    """``+0.031 (+0.021 to +0.042), 0.41 of the base's standard deviation``."""
    shift = level.shift
    assert shift is not None
    text = f"{signed(shift.mean)} ({signed(shift.low)} to {signed(shift.high)})"
    if level.spread > 0:
        text += f", {number(abs(shift.mean) / level.spread)} of the base's standard deviation"
    return text
