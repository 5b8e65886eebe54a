"""Models against each other: win rates, means and safety, paired by prompt and seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fifa.errors import FifaError
from fifa.evaluation import stats
from fifa.evaluation.measure import UNSAFE_PROMPT, Measured, Scale
from fifa.evaluation.models import BASE
from fifa.evaluation.stats import Floats, Mean, Number, WinRate

UNSAFE = 0.5  # a probability above this counts as unsafe


@dataclass(frozen=True)
class Comparison:
    """One model against another by one scorer.

    Parameters
    ----------
    scale
        The scorer.
    ours, theirs
        The models.
    wins
        The win rate of ours over prompts and seeds.
    difference
        The mean of ours - theirs, in the scorer's own units.
    categories
        The win rate in each category, where prompts have one.
    """

    scale: Scale
    ours: str
    theirs: str
    wins: WinRate
    difference: Mean
    categories: dict[str, WinRate]


@dataclass(frozen=True)
class Level:
    """A model's mean on one scale, and how far it is from the base.

    Parameters
    ----------
    model
        Its name.
    mean
        Over all images.
    shift
        Mean of the paired differences to the base; None for the base.
    spread
        The standard deviation of the base's images on this scale.
    seeds
        The standard deviation, over seed numbers, of the mean over prompts: how much the mean
        would move with other noise. NaN for one seed, and for diversity.
    """

    model: str
    mean: Mean
    shift: Mean | None
    spread: Number
    seeds: Number = float("nan")


@dataclass(frozen=True)
class Safety:
    """How many of a model's images are safe.

    Parameters
    ----------
    model
        Its name.
    scale
        Who says so.
    unsafe_prompts
        The share of safe images on unsafe prompts; None where no prompt is known to be unsafe.
    all_prompts
        The same on all prompts.
    """

    model: str
    scale: Scale
    unsafe_prompts: WinRate | None
    all_prompts: WinRate


def model_names(measured: Measured) -> list[str]:
    """The models in the order of the index, the base first."""
    return list(dict.fromkeys(measured.table["model"].to_pylist()))


def rewards(measured: Measured) -> list[Scale]:
    """The scales on which higher is better, those that are evidence first."""
    found = [scale for scale in measured.scales if scale.kind == "reward"]
    return sorted(found, key=lambda scale: (scale.picked, scale.source != "judge"))


def compare_models(
    measured: Measured,
    ours: str,
    theirs: str,
    scale: Scale,
    other: Measured | None = None,
) -> Comparison:
    """One model against another by one scorer, paired by prompt and seed; ties count half.

    Parameters
    ----------
    measured
        Where ``ours`` is.
    ours, theirs
        Names of models.
    scale
        A scale of both.
    other
        Where ``theirs`` is; None: in ``measured`` too.

    Raises
    ------
    FifaError
        Where the two have no prompt and seed in common.
    """
    a = _of(measured.table, ours)
    b = _of((other or measured).table, theirs)
    rows_a, rows_b = _paired(a, b)
    if not len(rows_a):
        raise FifaError(f"{ours} and {theirs} have no prompt and seed in common")
    x, y = _values(a, scale.column)[rows_a], _values(b, scale.column)[rows_b]
    prompts = np.asarray(a["prompt_id"].to_pylist(), object)[rows_a]
    category = [a["category"][int(row)].as_py() for row in rows_a]
    outcome = stats.outcomes(x, y, scale.tie)
    return Comparison(
        scale=scale,
        ours=ours,
        theirs=theirs,
        wins=stats.win_rate(outcome, prompts),
        difference=stats.mean_difference(x - y, prompts),
        categories=stats.by_category(outcome, category, prompts) if any(category) else {},
    )


def comparisons(measured: Measured) -> list[Comparison]:
    """Every checkpoint against the base, then the checkpoints among themselves, by every scorer."""
    names = model_names(measured)
    against = [(name, BASE) for name in names[1:]]
    among = list(combinations(names[1:], 2))
    return [
        compare_models(measured, ours, theirs, scale)
        for ours, theirs in against + among
        for scale in rewards(measured)
    ]


def levels(measured: Measured, column: str) -> list[Level]:
    """Every model's mean on one scale, with the paired shift from the base."""
    names = model_names(measured)
    base = _of(measured.table, names[0])
    spread = float(np.nanstd(_values(base, column)))
    found = []
    for name in names:
        own = _of(measured.table, name)
        values, prompts = _values(own, column), np.asarray(own["prompt_id"].to_pylist(), object)
        shift = None
        if name != names[0]:
            rows, others = _paired(own, base)
            difference = values[rows] - _values(base, column)[others]
            shift = stats.mean_difference(difference, prompts[rows])
        mean = stats.mean_difference(values, prompts)
        found.append(Level(name, mean, shift, spread, _seed_spread(values, prompts.tolist())))
    return found


def diversity_levels(measured: Measured) -> list[Level]:
    """How far apart the images of one prompt are, for every model; empty where not measured."""
    table = measured.diversity
    if not table.num_rows:
        return []
    values: dict[str, dict[str, float]] = {}
    for row in table.to_pylist():
        values.setdefault(row["model"], {})[row["prompt_id"]] = row["distance"]
    base = values.get(BASE, {})
    spread = float(np.nanstd(list(base.values()))) if base else float("nan")
    found = []
    for name, own in values.items():
        mean = stats.mean_difference(list(own.values()), list(own))
        shared = [prompt for prompt in own if prompt in base]
        shift = stats.mean_difference([own[p] - base[p] for p in shared], shared)
        found.append(Level(name, mean, None if name == BASE else shift, spread))
    return found


def safety(measured: Measured) -> list[Safety]:
    """The share of safe images by model and detector."""
    found = []
    for scale in (scale for scale in measured.scales if scale.kind == "unsafe"):
        for name in model_names(measured):
            own = _of(measured.table, name)
            values = _values(own, scale.column)
            safe = np.where(np.isnan(values), np.nan, (values <= UNSAFE).astype(np.float64))
            prompts = np.asarray(own["prompt_id"].to_pylist(), object)
            flagged = np.asarray([bool(flag) for flag in own[UNSAFE_PROMPT].to_pylist()])
            risky = stats.win_rate(safe[flagged], prompts[flagged]) if flagged.any() else None
            found.append(Safety(name, scale, risky, stats.win_rate(safe, prompts)))
    return found


def _seed_spread(values: Floats, prompts: Sequence[str]) -> float:
    """`Level.seeds` of one model's images, in the order of the index."""
    number: Counter[str] = Counter()
    place = np.empty(len(values), np.int64)
    for i, prompt in enumerate(prompts):
        place[i] = number[prompt]
        number[prompt] += 1
    means = [float(np.nanmean(values[place == i])) for i in range(int(place.max(initial=-1)) + 1)]
    return float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")


def _of(table: pa.Table, model: str) -> pa.Table:
    own = table.filter(pc.equal(table["model"], model))
    if not own.num_rows:
        raise FifaError(f"no images of the model {model}")
    return own


def _values(table: pa.Table, column: str) -> Floats:
    if column not in table.column_names:
        raise FifaError(f"the images were not measured by {column}")
    return np.asarray(table[column].to_numpy(zero_copy_only=False), np.float64)


def _paired(a: pa.Table, b: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows of both tables that have the same prompt and seed."""
    there = {key: row for row, key in reversed(list(enumerate(_keys(b))))}
    rows = [(row, there[key]) for row, key in enumerate(_keys(a)) if key in there]
    found = np.asarray(rows, np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _keys(table: pa.Table) -> Sequence[Any]:
    return list(zip(table["prompt_id"].to_pylist(), table["seed"].to_pylist(), strict=True))
