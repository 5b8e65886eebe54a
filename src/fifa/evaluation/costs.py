"""What it cost: selecting and training, kept apart, from the logs that they left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fifa.evaluation.provenance import Training, number
from fifa.evaluation.stats import Number

# The run's steps by what they are: every other one is neither
SELECTING = {"read": "reading", "margin": "scoring", "quality": "rating", "diversity": "embedding"}
CHOOSING = ("select", "export")


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
