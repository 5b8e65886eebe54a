"""What the page says of an evaluation: from its files to the templates' words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fifa.errors import FifaError
from fifa.evaluation.curves import time_to_match
from fifa.evaluation.generate import FOLDER, read_index
from fifa.evaluation.judges import LOOKS
from fifa.evaluation.measure import Scale, load_measured
from fifa.evaluation.models import BASE
from fifa.evaluation.results import ModelFacts, Results, load_results
from fifa.evaluation.win_rates import Comparison
from fifa.formatting import shorten
from fifa.reporting import charts
from fifa.reporting.grids import draw_grids
from fifa.reporting.reward_hacking import signs

if TYPE_CHECKING:
    from fifa.evaluation.vote.results import Results as Votes

MOST_CATEGORIES = 12


def evaluation_context(run: Path) -> dict[str, Any]:
    """What the templates of the evaluation read; `FifaError` where nothing was measured yet."""
    folder = run / FOLDER
    results = load_results(folder)
    images, measured = read_index(folder), load_measured(folder)
    if not images.select(["model", "file"]).equals(measured.table.select(["model", "file"])):
        raise FifaError(
            "other images were made after these were measured",
            where=str(folder),
            do="run the same `fifa evaluate` to its end",
        )
    names, found, scales = results.names, results.comparisons, results.scales
    tuned = names[1:]
    head = headline(found)
    looks = {name: results.levels[name] for name in LOOKS}
    grids, hidden = draw_grids(folder, images, measured, head.ours, head.scale) if head else ([], 0)
    return {
        "models": [_model(model, place) for place, model in enumerate(results.models)],
        "facts": results,
        "prompts": len(set(images["prompt_id"].to_pylist())),
        "images": len(images),
        "head": head,
        "people": _people(run, names),
        "others": _others(found, head),
        "against": _by_scale([c for c in found if c.theirs == BASE], scales),
        "among": _by_scale([c for c in found if c.theirs != BASE], scales),
        "scales": scales,
        "place": {name: place for place, name in enumerate(names)},
        "role": charts.role,
        "wins": _wins_figure(found, scales, tuned),
        "categories": _categories(found, head, tuned),
        "levels": [(scale, results.levels[scale.column]) for scale in scales],
        "grids": grids,
        "hidden": hidden,
        "curves": _curves(results, head),
        "safety": results.safety,
        "diversity": results.diversity,
        "looks": looks,
        "signs": signs(tuned, found, results.diversity, looks),
        "costs": results.costs,
        "settings": _settings(results),
    }


def _people(run: Path, names: list[str]) -> Votes | None:
    """What people voted so far, on models that are still in the index; None without votes."""
    from fifa.evaluation.vote.results import vote_results
    from fifa.evaluation.vote.store import FILE

    if not (run / FOLDER / FILE).exists():
        return None
    results = vote_results(run)
    known = [v for v in results.verdicts if v.ours in names and v.theirs in names and v.rate.n]
    known.sort(key=lambda v: (v.theirs != BASE, -v.rate.share))
    return replace(results, verdicts=tuple(known)) if known else None


def headline(found: Sequence[Comparison]) -> Comparison | None:
    """The comparison that the verdict is of: the best checkpoint by the first independent scorer.

    Judges come before scorers, and what picked the data last (`fifa.evaluation.win_rates.rewards`).
    """
    first = next((c.scale for c in found), None)
    against = [c for c in found if c.theirs == BASE and c.scale == first and c.wins.n]
    return max(against, key=lambda c: c.wins.share, default=None)


def _model(model: ModelFacts, place: int) -> dict[str, Any]:
    methods = {
        "base": "the base model",
        "lora": "LoRA on the base",
        "part": "its own UNet or transformer",
        "pipeline": "a whole pipeline",
    }
    return {
        "name": shorten(model.name, 40),
        "method": methods[model.method],
        "source": shorten(model.source, 120),
        "weights": model.weights,
        "colour": charts.role(place),
    }


def _others(found: Sequence[Comparison], head: Comparison | None) -> list[Comparison]:
    """What stands beside the verdict: the other checkpoints against the base and against it."""
    return [
        c
        for c in found
        if head is not None
        and c is not head
        and c.scale == head.scale
        and (c.theirs == BASE or head.ours in (c.ours, c.theirs))
    ]


def _by_scale(found: list[Comparison], scales: Sequence[Scale]) -> list[Comparison]:
    return sorted(found, key=lambda c: scales.index(c.scale))


def _wins_figure(found: Sequence[Comparison], scales: Sequence[Scale], tuned: list[str]) -> Any:
    rows = []
    for scale in scales:
        own = [c for c in found if c.scale == scale and c.theirs == BASE and c.wins.n]
        wins = tuple((tuned.index(c.ours) + 1, c.wins) for c in own)
        if wins:
            rows.append(charts.Row(f"{scale.name}{' *' if scale.picked else ''}", wins))
    title = "Win rates against the base by scorer, with intervals"
    return charts.draw_wins(rows, "wins", title) if rows else None


def _categories(found: Sequence[Comparison], head: Comparison | None, tuned: list[str]) -> Any:
    """The figure and the table by category, for the verdict's scorer; None without categories."""
    if head is None or not head.categories:
        return None
    own = [c for c in found if c.scale == head.scale and c.theirs == BASE]
    sizes = {name: wins.prompts for name, wins in head.categories.items() if wins.n}
    names = sorted(sizes, key=lambda name: (-sizes[name], name))[:MOST_CATEGORIES]
    rows = [
        charts.Row(
            name,
            tuple(
                (tuned.index(c.ours) + 1, c.categories[name]) for c in own if name in c.categories
            ),
        )
        for name in names
    ]
    if len(rows) < 2:
        return None
    return {
        "figure": charts.draw_wins(rows, "categories", "Win rates by category, with intervals"),
        "rows": [(shorten(row.label, 60), sizes[row.label]) for row in rows],
        "all": len(sizes),
    }


def _curves(results: Results, head: Comparison | None) -> dict[str, Any] | None:
    """Figures for the verdict's scorer, and what the others say in tables."""
    curves, names = results.curves, results.names
    costs = {cost.model: cost for cost in results.costs}
    if not curves or head is None:
        return None
    own = [curve for curve in curves if curve.scale.column == head.scale.column]
    placed = [(names.index(curve.model) if curve.model in names else 0, curve) for curve in own]
    figures = [
        figure
        for x in charts.AXES
        if (figure := charts.draw_learning(placed, x, f"curve-{x}", head.scale.name)) is not None
    ]
    matches = []
    for ours, theirs in permutations(own, 2):
        point = time_to_match(ours, theirs.best.mean.mean)
        # what selecting took is 0 where no run of ours did it: then the sum is not known
        selecting = costs[ours.model].selecting or float("nan")
        total = point.seconds + selecting if point else float("nan")
        matches.append((ours, theirs, point, total))
    return {
        "figures": figures,
        "matches": matches,
        "curves": curves,
        "scale": head.scale,
        "prompts": own[0].points[0].mean.prompts,
    }


def _settings(results: Results) -> list[tuple[str, str]]:
    settings = results.settings
    size = (
        f"{settings.width} x {settings.height}"
        if settings.width and settings.height
        else "the model's own"
    )
    named = {
        "sampler": settings.sampler,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "size": size,
        "negative prompt": settings.negative or "none",
        "images a prompt": results.seeds,
        "precision": f"{settings.dtype} on {settings.device}",
    }
    return [
        (name, shorten(str("the pipeline's own" if value is None else value), 80))
        for name, value in named.items()
    ]
