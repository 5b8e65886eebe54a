"""Whether the margin that a selection goes by may be trusted, by the data set's own labels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fifa.config import Select
from fifa.console import echo
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.margin import committee
from fifa.scoring.rewards.metrics import draw_rows
from fifa.scoring.table import Scores
from fifa.scoring.trust import MOST, Trust, measure_trust
from fifa.selection.choose import aligned_rewards
from fifa.selection.strategies import STRATEGIES

COMMITTEE = "committee"


def differences(
    pairs: Pairs,
    scores: Scores,
    unit: str = Select.margin_unit,
    rows: npt.NDArray[np.int64] | None = None,
) -> Mapping[str, npt.NDArray[np.float32]]:
    """By judge: reward_0 - reward_1, [rows]; of several also the committee's, which comes first.

    None of them knows the choice of the pair it is about: what `fifa.scoring.table.BLIND` says.
    ``unit`` is that of `fifa.scoring.margin.pair_rewards`, ``rows`` those of ``pairs`` to look at;
    None: all.
    """
    rewards = aligned_rewards(pairs, scores, unit, blind=True)
    if rows is not None:
        rewards = {name: (zero[rows], one[rows]) for name, (zero, one) in rewards.items()}
    every = np.ones(len(pairs) if rows is None else len(rows), np.float32)  # all won by image 0
    found = {name: committee([one], every).signed_margin for name, one in rewards.items()}
    if len(rewards) > 1:
        found = {COMMITTEE: committee(list(rewards.values()), every).signed_margin} | found
    return found


def check_trust(pairs: Pairs, scores: Scores, knobs: Select, where: str) -> Trust | None:
    """Say whether the margin is of use here, before pairs are selected by it.

    Returns None where there is no margin, or the strategy asks for none. Raises `FifaError` for a
    margin that is refused (`fifa.scoring.trust.Trust.refused`), unless ``knobs.anyway``.
    """
    if not scores.margins or STRATEGIES[knobs.strategy].needs not in ("margin", "importance"):
        return None
    rows = draw_rows(len(pairs), MOST)
    name, difference = next(iter(differences(pairs, scores, knobs.margin_unit, rows).items()))
    columns = (pairs.table[name].to_numpy()[rows] for name in ("label", "prompt_index"))
    trust = measure_trust(name, difference, *columns)
    if trust.refused and not knobs.anyway:
        raise FifaError(
            f"the margin {name} cannot be trusted: {trust.verdict}",
            where=where,
            do=f"take another --margin, see more with `fifa trust {where}`, or go on with --anyway",
        )
    echo(f"margin {name}: {trust.verdict}")
    return trust
