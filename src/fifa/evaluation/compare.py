"""Several runs in one table: what each of their checkpoints bought, and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, permutations
from pathlib import Path

from fifa.errors import FifaError
from fifa.evaluation.generate import FOLDER
from fifa.evaluation.measure import Measured, Scale, load_measured
from fifa.evaluation.models import BASE, Cost, name_checkpoints
from fifa.evaluation.results import Results, load_results
from fifa.evaluation.win_rates import (
    Comparison,
    Curve,
    Level,
    Point,
    Safety,
    compare_models,
    time_to_match,
)


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


def compare_runs(runs: Sequence[str | Path]) -> Compared:
    """Put the evaluations of several run folders beside each other.

    Parameters
    ----------
    runs
        Run folders with an evaluation each; the same prompts, seeds and settings make them
        comparable, and what differs is listed.

    Raises
    ------
    FifaError
        For a folder without an evaluation, and for runs that share no scorer.
    """
    if not runs:
        raise FifaError("no run to compare", do="fifa compare RUN RUN ...")
    folders = {
        name: Path(path) / FOLDER
        for name, path in name_checkpoints([str(Path(run).resolve()) for run in runs]).items()
    }
    found = {name: load_results(folder) for name, folder in folders.items()}
    scales = _shared_scales(found)
    tuned = [(run, model) for run, results in found.items() for model in results.names[1:]]
    models = Counter(model for _, model in tuned)
    entries = tuple(
        _entry(model if models[model] == 1 else f"{run}: {model}", run, model, found[run], scales)
        for run, model in tuned
    )
    curves = [
        (tuned.index((run, curve.model)), curve)
        for run, results in found.items()
        for curve in results.curves
        if curve.scale.column == scales[0].column and (run, curve.model) in tuned
    ]
    measured = {name: load_measured(folder) for name, folder in folders.items()}
    return Compared(
        scales=scales,
        entries=entries,
        direct=tuple(_direct(measured, entries, scales[0])),
        curves=tuple(curves),
        matches=tuple(
            (i, j, time_to_match(ours, theirs.best.mean.mean))
            for (i, ours), (j, theirs) in permutations(curves, 2)
        ),
        differences=tuple(_differences(found)),
    )


def _shared_scales(runs: Mapping[str, Results]) -> tuple[Scale, ...]:
    columns = {name: {scale.column for scale in run.scales} for name, run in runs.items()}
    shared = set[str].intersection(*columns.values())
    if not shared:
        each = "; ".join(
            f"{run}: {', '.join(sorted(own)) or 'none'}" for run, own in columns.items()
        )
        raise FifaError(f"the runs share no scorer ({each})", do="evaluate them with the same ones")
    # a scorer that picked the data of any run is no evidence for that run
    picked = {scale.column for run in runs.values() for scale in run.scales if scale.picked}
    own = [scale for scale in next(iter(runs.values())).scales if scale.column in shared]
    return tuple(sorted(own, key=lambda scale: scale.column in picked))


def _entry(label: str, run: str, model: str, results: Results, scales: Sequence[Scale]) -> Entry:
    wins = {c.scale.column: c for c in results.comparisons if (c.ours, c.theirs) == (model, BASE)}
    return Entry(
        label=label,
        run=run,
        model=model,
        wins=tuple(wins[scale.column] for scale in scales),
        diversity=next((level for level in results.diversity if level.model == model), None),
        safety=tuple(safe for safe in results.safety if safe.model == model),
        cost=next(cost for cost in results.costs if cost.model == model),
    )


def _direct(
    measured: Mapping[str, Measured], entries: Sequence[Entry], scale: Scale
) -> Iterator[Comparison]:
    for early, late in combinations(entries, 2):
        try:
            comparison = compare_models(
                measured[early.run], early.model, late.model, scale, measured[late.run]
            )
        except FifaError:  # no prompt and seed in common
            continue
        yield replace(comparison, ours=early.label, theirs=late.label)


def _differences(runs: Mapping[str, Results]) -> list[str]:
    """Settings, base and prompts that differ: ``guidance: 7.5 (a), 5 (b)``."""
    named: dict[str, list[str]] = {}
    for run in runs.values():
        known = {
            **asdict(run.settings),
            "seeds": run.seeds,
            "first seed": run.first_seed,
            "base model": run.models[0].weights,
            "prompts": f"{run.prompts:,}",
        }
        for name, value in known.items():
            named.setdefault(name, []).append(str(value))
    return [
        f"{name}: " + ", ".join(f"{v} ({run})" for v, run in zip(values, runs, strict=True))
        for name, values in named.items()
        if len(set(values)) > 1
    ]
