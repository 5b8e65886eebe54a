"""What a committee of scorers says of the labels: how good it is, and which it contradicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fifa.reporting.numbers import Columns, Floats, draw_rows
from fifa.scoring.rewards.committee import committee_report, dissent, likely_mislabelled

MOST = 200_000  # pairs that members are judged on; a larger set is sampled


@dataclass(frozen=True)
class LabelNoise:
    """The committee's section.

    Parameters
    ----------
    members
        Rows of `fifa.scoring.rewards.committee.MEMBERS`.
    dissent
        Rows of `fifa.scoring.rewards.committee.DISSENT`.
    rows
        Rows of the pairs that all members contradict, the most doubtful first.
    sampled
        How many pairs members were judged on; 0 for all.
    """

    members: list[dict[str, Any]]
    dissent: list[dict[str, Any]]
    rows: list[int]
    sampled: int

    @property
    def excess(self) -> float:
        """Share of pairs that all contradict, beyond what independent errors explain."""
        last = self.dissent[-1]
        return float(last["share"] - last["expected"])


def label_noise(columns: Columns, rewards: dict[str, tuple[Floats, Floats]]) -> LabelNoise | None:
    """The committee's section; None for fewer than two scorers or too few labelled pairs.

    ``rewards`` are ``(reward_0, reward_1)``, [pairs] each, by the scorer's name.
    """
    rows = draw_rows(len(columns.label), MOST)
    label = columns.label[rows]
    if len(rewards) < 2 or np.count_nonzero(label != 0.5) < 2:
        return None
    judged = {name: (first[rows], second[rows]) for name, (first, second) in rewards.items()}
    contradicted = likely_mislabelled(judged, label)["row"].to_numpy()
    return LabelNoise(
        members=committee_report(judged, label, columns.prompt[rows]).to_pylist(),
        dissent=dissent(judged, label).to_pylist(),
        rows=rows[contradicted].tolist(),
        sampled=len(rows) if len(rows) < len(columns.label) else 0,
    )
