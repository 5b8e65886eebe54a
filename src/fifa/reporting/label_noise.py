"""What a committee of scorers says of the labels: its members, and whom they all contradict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fifa.formatting import shorten
from fifa.reporting.data import Columns, draw_rows
from fifa.scoring.rewards.committee import committee_report, dissent, likely_mislabelled

MOST = 200_000  # pairs that members are judged on; a larger set is sampled
LISTED = 100


@dataclass(frozen=True)
class Doubts:
    """The committee's section.

    Parameters
    ----------
    members
        Rows of `fifa.scoring.rewards.committee.MEMBERS`, names shortened.
    dissent
        Rows of `fifa.scoring.rewards.committee.DISSENT`.
    rows
        Rows of ``pairs.parquet`` that all members contradict, the most doubtful first.
    sampled
        How many pairs members were judged on; 0 for all.
    """

    members: tuple[dict[str, Any], ...]
    dissent: tuple[dict[str, Any], ...]
    rows: tuple[int, ...]
    sampled: int

    @property
    def beyond(self) -> float:
        """Share of pairs that all contradict, beyond what independent errors explain."""
        last = self.dissent[-1]
        return float(last["share"] - last["expected"])


def load_doubts(columns: Columns, margins: dict[str, Path]) -> Doubts | None:
    """The committee's section; None for fewer than two scorers or too few labelled pairs."""
    if len(margins) < 2:
        return None
    rows = draw_rows(len(columns.label), MOST)
    rewards = {}
    for spec, path in margins.items():
        table = pq.read_table(path, columns=["reward_0", "reward_1"])
        sides = (table[name].to_numpy()[rows] for name in table.column_names)
        rewards[shorten(spec.removeprefix("column:"), 60)] = tuple(sides)
    label, prompt = columns.label[rows], columns.prompt[rows]
    if np.count_nonzero(label != 0.5) < 2 or len(rewards) < 2:
        return None
    doubted = likely_mislabelled(rewards, label)["row"].to_numpy()
    return Doubts(
        members=tuple(committee_report(rewards, label, prompt).to_pylist()),
        dissent=tuple(dissent(rewards, label).to_pylist()),
        rows=tuple(rows[doubted].tolist()),
        sampled=len(rows) if len(rows) < len(columns.label) else 0,
    )
