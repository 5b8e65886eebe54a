"""Where a checkpoint comes from and what it cost: its training, and the run behind its pairs.

A reward model that picked the pairs is no evidence for the result: it praises its own taste.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

from fifa.config import RECIPE_FILE
from fifa.console import LOG_FILE
from fifa.errors import FifaError
from fifa.evaluation.models import Model
from fifa.evaluation.stats import Number
from fifa.scoring.specs import REWARDS
from fifa.shards.files import read_json, read_json_lines, read_yaml

# The run's steps by what they are: every other one is neither
SELECTING = {"read": "reading", "margin": "scoring", "quality": "rating", "diversity": "embedding"}
CHOOSING = ("select", "export")


@dataclass(frozen=True)
class Training:
    """What the files beside a checkpoint say; all empty where another program trained it.

    Parameters
    ----------
    facts
        Its ``train.json``.
    lines
        Step, pairs seen and seconds of every line of its ``stats.jsonl``.
    log
        Seconds and tokens by step of the run that selected its pairs.
    scorers
        The specs of the reward models that picked its pairs.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    lines: Sequence[dict[str, float]] = ()
    log: dict[str, dict[str, float]] = field(default_factory=dict)
    scorers: tuple[str, ...] = ()


def read_training(model: Model) -> Training:
    """The training of a checkpoint.

    ``train.json`` and, beside the pairs that it was trained on, ``subset.json`` or
    ``recipe.yaml`` say which reward models picked them, as far as that is known.
    """
    folder = model.training
    if folder is None:
        return Training()
    facts = read_json(folder / "train.json", "the training", missing={})
    scorers = _margins(facts)
    source = read_yaml(folder / "train.yaml", "the training", missing={}).get("source")
    places: tuple[Path, ...] = ()
    if isinstance(source, str) and source and "://" not in source:
        places = (Path(source), Path(source).parent)
    for place in places:
        subset = read_json(place / "subset.json", "the subset", missing={})
        scorers += [*run_scorers(place), *_margins(subset)]
    log = next((place / LOG_FILE for place in places if (place / LOG_FILE).is_file()), None)
    lines = [
        {name: number(line.get(name)) for name in ("step", "pairs", "seconds")}
        for line in read_json_lines(folder / "stats.jsonl")[0]
        if "step" in line
    ]
    return Training(facts, lines, _log(log) if log else {}, tuple(dict.fromkeys(scorers)))


def run_scorers(run: Path) -> list[str]:
    """The specs of the reward models in a run folder's recipe; none without a recipe."""
    return _margins(read_yaml(run / RECIPE_FILE, "the recipe", missing={}))


def number(value: Any) -> float:
    """``value`` where it is a number, NaN where it is anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain else float("nan")


def is_picked(spec: str, picked: Sequence[str]) -> bool:
    """Whether a scorer, or a close relative of it, is among those that picked the data.

    ``pickscore`` is the same model as ``pickscore:FOLDER`` and as the columns
    ``column:pickscore_prob_0,pickscore_prob_1``; hpsv2 and hpsv2.1 are relatives; one proxy is
    as good as another, for all are trained on the same feedback.
    """
    family = _family(spec)
    return any(spec == other or _is_relative(family, other) for other in picked)


def _log(path: Path) -> dict[str, dict[str, float]]:
    """Seconds and tokens by step; a step that ran twice counts twice: it was paid for."""
    found: dict[str, dict[str, float]] = {}
    for line in read_json_lines(path)[0]:
        name, seconds = line.get("step"), number(line.get("seconds"))
        if not isinstance(name, str) or isnan(seconds):
            continue
        entry = found.setdefault(name, {"seconds": 0.0, "tokens": 0.0})
        entry["seconds"] += seconds
        tokens = (number(line.get(key)) for key in ("tokens_in", "tokens_out"))
        entry["tokens"] += sum(count for count in tokens if not isnan(count))
    return found


def _family(spec: str) -> str:
    entry = REWARDS.parse(spec).entry
    return entry.family or entry.name


def _is_relative(family: str, picked: str) -> bool:
    """Whether what picked the data is of the family, or a source's columns called like it."""
    try:
        parsed = REWARDS.parse(picked.lower())
    except FifaError:  # a scorer of another version of FiFA
        return False
    if not parsed.is_column:
        return _family(parsed.text) == family
    return family != "proxy" and family in re.sub(r"[^a-z0-9]", "", parsed.model)


def _margins(facts: Any) -> list[str]:
    """Every ``margin`` list of specs in some facts, however deep."""
    if isinstance(facts, dict):
        own = facts.get("margin")
        if isinstance(own, dict):
            own = list(own)
        found = [spec for spec in own if isinstance(spec, str)] if isinstance(own, list) else []
        return found + [s for key, part in facts.items() if key != "margin" for s in _margins(part)]
    return [spec for part in facts for spec in _margins(part)] if isinstance(facts, list) else []


@dataclass(frozen=True)
class Cost:
    """What one checkpoint cost, in seconds unless another unit is named; NaN where unknown.

    Parameters
    ----------
    model
        Its name.
    reading, scoring, rating, embedding, choosing
        Of the run that selected its pairs.
    training
        Wall time.
    hours
        Accelerator hours of training: processes times wall time.
    steps, pairs
        Of training; pairs are counted each time they are seen.
    tokens
        Read and written by the rater.
    """

    model: str
    reading: Number
    scoring: Number
    rating: Number
    embedding: Number
    choosing: Number
    training: Number
    hours: Number
    steps: Number
    pairs: Number
    tokens: Number

    @property
    def selecting(self) -> float:
        """Seconds from the source to the subset; 0 where no run selected the pairs."""
        parts = (self.reading, self.scoring, self.rating, self.embedding, self.choosing)
        return sum(part for part in parts if part == part)

    @property
    def rest(self) -> float:
        """Seconds of selecting beside scoring and rating; NaN where nothing is known."""
        parts = (self.reading, self.embedding, self.choosing)
        found = [part for part in parts if part == part]
        return sum(found) if found else float("nan")

    @property
    def total(self) -> float:
        """Seconds from the source to the weights; NaN where the training's are not known."""
        return self.selecting + self.training


def cost_of(name: str, training: Training) -> Cost:
    """What the checkpoint ``name`` cost."""
    facts, log = training.facts, training.log

    def seconds(steps: Iterable[str]) -> float:
        found = [log[step]["seconds"] for step in steps if step in log]
        return float(sum(found)) if found else float("nan")

    return Cost(
        model=name,
        **{field: seconds([step]) for step, field in SELECTING.items()},
        choosing=seconds(CHOOSING),
        training=number(facts.get("seconds")),
        hours=number(facts.get("accelerator_hours")),
        steps=number(facts.get("steps")),
        pairs=number(facts.get("pairs_seen")),
        tokens=float(sum(entry["tokens"] for entry in log.values())),
    )
