"""What it cost: selecting, training and evaluating, kept apart, from the logs that they left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fifa.evaluation.models import Model
from fifa.evaluation.selected_by import training_source
from fifa.shards.files import read_json, read_json_lines

# The run's steps by what they are: every other one is neither
SELECTING = {"read": "reading", "margin": "scoring", "quality": "rating", "diversity": "embedding"}
CHOOSING = ("select", "export")
LOG = "log.jsonl"
KNOWN = (
    *("base_model", "kind", "method", "steps", "pairs", "pairs_seen", "seconds", "processes"),
    *("device", "dtype", "accelerator_hours", "selection"),
)  # of train.json


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
    reading: float
    scoring: float
    rating: float
    embedding: float
    choosing: float
    training: float
    hours: float
    steps: float
    pairs: float
    tokens: float

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


def checkpoint_facts(model: Model) -> dict[str, Any]:
    """What is known of a checkpoint's making, for the evaluation to keep.

    Parameters
    ----------
    model
        The checkpoint.

    Returns
    -------
    ``train`` (its ``train.json``; empty if another trainer made it), ``steps`` (step, pairs seen
    and seconds of every line of its ``stats.jsonl``) and ``log`` (seconds and tokens by step of
    the run that selected its pairs).
    """
    folder = model.training
    if folder is None:
        return {"train": {}, "steps": [], "log": {}}
    facts = read_json(folder / "train.json", "the training", missing={})
    source = training_source(folder)
    places = (source, source.parent) if source is not None else ()
    log = next((place / LOG for place in places if (place / LOG).is_file()), None)
    return {
        "train": {name: facts[name] for name in KNOWN if name in facts},
        "steps": _steps(folder / "stats.jsonl"),
        "log": _log(log) if log is not None else {},
    }


def cost_of(name: str, facts: dict[str, Any]) -> Cost:
    """The cost of the checkpoint that `checkpoint_facts` was asked about."""
    train, log = facts.get("train", {}), facts.get("log", {})

    def seconds(steps: Iterable[str]) -> float:
        found = [log[step]["seconds"] for step in steps if step in log]
        return float(sum(found)) if found else float("nan")

    by_kind = {kind: seconds([step]) for step, kind in SELECTING.items()}
    return Cost(
        model=name,
        **by_kind,
        choosing=seconds(CHOOSING),
        training=_number(train.get("seconds")),
        hours=_number(train.get("accelerator_hours")),
        steps=_number(train.get("steps")),
        pairs=_number(train.get("pairs_seen")),
        tokens=float(sum(entry.get("tokens", 0) for entry in log.values())),
    )


def _number(value: Any) -> float:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain else float("nan")


def _steps(path: Path) -> list[dict[str, float]]:
    names = ("step", "pairs", "seconds")
    return [
        {name: _number(line.get(name)) for name in names}
        for line in read_json_lines(path)[0]
        if "step" in line
    ]


def _log(path: Path) -> dict[str, dict[str, float]]:
    """Seconds and tokens by step; a step that ran twice counts twice: it was paid for."""
    found: dict[str, dict[str, float]] = {}
    for line in read_json_lines(path)[0]:
        name = line.get("step")
        if not isinstance(name, str) or _number(line.get("seconds")) != _number(
            line.get("seconds")
        ):
            continue
        entry = found.setdefault(name, {"seconds": 0.0, "tokens": 0.0})
        entry["seconds"] += _number(line["seconds"])
        for key in ("tokens_in", "tokens_out"):
            tokens = _number(line.get(key))
            entry["tokens"] += tokens if tokens == tokens else 0.0
    return found
