"""What a run can tell of its labels, for whoever trains on its subset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from fifa.data.table import Pairs
from fifa.scoring.rewards.metrics import draw_rows, fit_temperature, wrong_labels
from fifa.scoring.table import BLIND, Scores
from fifa.scoring.trust import MOST
from fifa.selection.choose import aligned_rewards

Error = Annotated[float, Field(ge=0, le=0.5)]


@dataclass(frozen=True)
class LabelFacts:
    """What all pairs of a run, selected or not, tell of its labels.

    Parameters
    ----------
    temperature
        sigmoid(signed_margin / temperature) is the probability that people prefer the winner. None
        without a margin, and for one that was made from the label it would be compared with.
    noise, low, high
        The share of the labels that are wrong and its 95 % interval, by
        `fifa.scoring.rewards.metrics.wrong_labels`; None where the scorers cannot tell.
    scorers
        How many there are.
    pairs
        How many the noise was measured on.
    """

    temperature: Annotated[float, Field(gt=0)] | None = None
    noise: Error | None = None
    low: Error | None = None
    high: Error | None = None
    scorers: int = 0
    pairs: int = 0


def label_facts(pairs: Pairs, selection: pa.Table, scores: Scores, unit: str) -> LabelFacts:
    """What the pairs, their `fifa.selection.table.SELECTION` and their scores tell of the labels.

    ``unit`` is that of the margins: `fifa.scoring.margin.pair_rewards`.
    """
    if not scores.margins:
        return LabelFacts()
    rows = draw_rows(len(pairs), MOST)
    label, prompt = (pairs.table[name].to_numpy()[rows] for name in ("label", "prompt_index"))
    temperature = None
    if not any(BLIND in table.column_names for table in scores.margins.values()):
        margin = selection["signed_margin"].to_numpy()[rows]
        temperature = fit_temperature(margin, np.maximum(label, 1 - label))
    rewards = {
        name: (zero[rows], one[rows])
        for name, (zero, one) in aligned_rewards(pairs, scores, unit, blind=True).items()
    }
    found = wrong_labels(rewards, label, prompt)
    if found is None:
        return LabelFacts(temperature, scorers=len(rewards))
    noise, low, high, count = found
    return LabelFacts(temperature, noise, low, high, len(rewards), count)
