"""Several runs in one table: what each of their checkpoints bought, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.evaluation.costs import Cost, cost_of
from fifa.evaluation.curves import Curve, Point, learning_curves, time_to_match
from fifa.evaluation.generate import FOLDER
from fifa.evaluation.measure import Measured, Scale, load_measured
from fifa.evaluation.models import BASE, name_checkpoints
from fifa.evaluation.results import (
    Comparison,
    Level,
    Safety,
    compare_models,
    diversity_levels,
    model_names,
    rewards,
    safety,
)
from fifa.evaluation.steps import CURVE_SUFFIX, load_facts


@dataclass(frozen=True)
class Entry:
    """One checkpoint of one run.

    Parameters
    ----------
    label
        For people: the checkpoint's name, and the run's where that alone tells it from others.
    run, model
        The run's name and the checkpoint's.
    wins
        Against its own run's base, by each of the scorers that all runs share.
    diversity
        How far apart the images of one prompt are, and the change from the base; None where it
        was not measured.
    safety
        The share of safe images by each detector.
    cost
        What it cost.
    """

    label: str
    run: str
    model: str
    wins: tuple[Comparison, ...]
    diversity: Level | None
    safety: tuple[Safety, ...]
    cost: Cost


@dataclass(frozen=True)
class Compared:
    """Several runs beside each other.

    Parameters
    ----------
    scales
        The scorers that all runs share, those that are evidence first.
    entries
        Every checkpoint of every run.
    direct
        Checkpoints of different runs against each other by the first scorer, paired by prompt
        and seed, where they have some in common.
    curves
        Of the first scorer, with the entry's place.
    matches
        The places of two entries, and where the first matches the best of the second (None:
        never).
    differences
        What is not the same in all runs, in words: then their figures are not comparable.
    """

    scales: tuple[Scale, ...]
    entries: tuple[Entry, ...]
    direct: tuple[Comparison, ...]
    curves: tuple[tuple[int, Curve], ...]
    matches: tuple[tuple[int, int, Point | None], ...]
    differences: tuple[str, ...]


@dataclass(frozen=True)
class _Run:
    name: str
    facts: dict[str, Any]
    measured: Measured
    curve: Measured | None


def compare_runs(runs: Sequence[str | Path]) -> Compared:
    """Put the evaluations of several run folders beside each other.

    Parameters
    ----------
    runs
        Run folders with an evaluation each; the same prompts, seeds and settings make them
        comparable, and what differs is told.

    Raises
    ------
    FifaError
        For a folder without an evaluation, and for runs that share no scorer.
    """
    opened = [_open(name, Path(path)) for name, path in name_checkpoints(_texts(runs)).items()]
    scales = _common(opened)
    labels = _labels(opened)
    entries = tuple(
        _entry(labels[run.name, model], run, model, scales)
        for run in opened
        for model in model_names(run.measured)[1:]
    )
    curves = []
    for run in opened:
        facts = {model["name"]: model for model in run.facts["models"]}
        for curve in learning_curves(run.curve, facts) if run.curve else ():
            places = [
                i for i, e in enumerate(entries) if (e.run, e.model) == (run.name, curve.model)
            ]
            if places and curve.scale.column == scales[0].column:
                curves.append((places[0], curve))
    return Compared(
        scales=scales,
        entries=entries,
        direct=tuple(_direct(opened, entries, scales[0])),
        curves=tuple(curves),
        matches=tuple(
            (i, j, time_to_match(ours, theirs.best.mean.mean))
            for i, ours in curves
            for j, theirs in curves
            if i != j
        ),
        differences=tuple(_differences(opened)),
    )


def _texts(runs: Sequence[str | Path]) -> list[str]:
    if not runs:
        raise FifaError("no run to compare", do="fifa compare RUN RUN ...")
    return [str(Path(run).resolve()) for run in runs]


def _open(name: str, path: Path) -> _Run:
    folder = path / FOLDER
    facts, measured = load_facts(folder), load_measured(folder)
    if measured is None:
        raise FifaError("nothing is measured here yet", where=str(path), do="`fifa evaluate` again")
    return _Run(name, facts, measured, load_measured(folder, CURVE_SUFFIX))


def _common(runs: Sequence[_Run]) -> tuple[Scale, ...]:
    columns = [{scale.column for scale in rewards(run.measured)} for run in runs]
    shared = set[str].intersection(*columns)
    if not shared:
        told = "; ".join(
            f"{run.name}: {', '.join(sorted(own)) or 'none'}"
            for run, own in zip(runs, columns, strict=True)
        )
        raise FifaError(f"the runs share no scorer ({told})", do="evaluate them with the same ones")
    # a scorer that picked the data of any run is no evidence for that run
    picked = {s.column for run in runs for s in rewards(run.measured) if s.picked}
    own = [scale for scale in rewards(runs[0].measured) if scale.column in shared]
    return tuple(sorted(own, key=lambda scale: scale.column in picked))


def _labels(runs: Sequence[_Run]) -> dict[tuple[str, str], str]:
    pairs = [(run.name, model) for run in runs for model in model_names(run.measured)[1:]]
    models = [model for _, model in pairs]
    return {
        (run, model): model if models.count(model) == 1 else f"{run}: {model}"
        for run, model in pairs
    }


def _entry(label: str, run: _Run, model: str, scales: Sequence[Scale]) -> Entry:
    of = {scale.column: scale for scale in rewards(run.measured)}
    facts: dict[str, Any] = next(m for m in run.facts["models"] if m["name"] == model)
    apart = [level for level in diversity_levels(run.measured) if level.model == model]
    return Entry(
        label=label,
        run=run.name,
        model=model,
        wins=tuple(compare_models(run.measured, model, BASE, of[s.column]) for s in scales),
        diversity=apart[0] if apart else None,
        safety=tuple(s for s in safety(run.measured) if s.model == model),
        cost=cost_of(model, facts),
    )


def _direct(runs: Sequence[_Run], entries: Sequence[Entry], scale: Scale) -> list[Comparison]:
    by_name = {run.name: run.measured for run in runs}
    found = []
    for early, late in combinations(entries, 2):
        try:
            comparison = compare_models(
                by_name[early.run], early.model, late.model, scale, by_name[late.run]
            )
        except FifaError:  # no prompt and seed in common
            continue
        found.append(
            Comparison(
                scale,
                early.label,
                late.label,
                comparison.wins,
                comparison.difference,
                comparison.categories,
            )
        )
    return found


def _differences(runs: Sequence[_Run]) -> list[str]:
    """Settings, base and prompts that differ: ``guidance: 7.5 (a), 5 (b)``."""
    named: dict[str, list[str]] = {}
    for run in runs:
        known = {
            **run.facts["settings"],
            "seeds": run.facts["seeds"],
            "first seed": run.facts["first_seed"],
            "base model": run.facts["models"][0]["weights"],
            "prompts": f"{len(set(run.measured.table['prompt_id'].to_pylist())):,}",
        }
        for name, value in known.items():
            named.setdefault(name, []).append(str(value))
    return [
        f"{name}: " + ", ".join(f"{v} ({run.name})" for v, run in zip(values, runs, strict=True))
        for name, values in named.items()
        if len(set(values)) > 1
    ]
