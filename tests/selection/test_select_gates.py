import math

import numpy as np
import pytest
from worlds import make_pairs, make_scores

from fifa.config import Select
from fifa.scoring.margin import committee
from fifa.selection.choose import gather_terms, reason_codes
from fifa.selection.table import GATES, REASONS


def slow_reasons(pairs, scores, knobs, unreadable):
    """Every gate by a loop over the pairs, written from the documentation."""
    label = pairs.table["label"].to_numpy()
    rewards = [
        (t["reward_0"].to_numpy(), t["reward_1"].to_numpy()) for t in scores.margins.values()
    ]
    seen = committee(rewards, label) if rewards else None
    quality = scores.quality.to_pylist() if scores.quality is not None else None
    diversity = scores.diversity.to_pylist() if scores.diversity is not None else None
    reasons = []
    for i, row in enumerate(pairs.table.to_pylist()):
        rated = quality[row["prompt_index"]] if quality else None
        flags = set((rated["flags"] or "").split(",")) if rated else set()
        low, high = knobs.margin_window
        margin = float(seen.margin[i]) if seen else 0.0
        holes = [
            not math.isfinite(margin),
            rated is not None and rated["flags"] is None,
            rated is not None and knobs.alpha > 0 and not math.isfinite(rated["rating"]),
            diversity is not None
            and knobs.gamma > 0
            and not math.isfinite(diversity[row["prompt_index"]]["entropy"]),
        ]
        needed = 1.0 if knobs.strategy == "consensus" else knobs.min_agreement
        stopped = {
            "tie": row["label"] == 0.5,
            "duplicate": knobs.drop_duplicates and row["repeat"],
            "unreadable_image": row["pair_id"] in unreadable,
            "unsafe_prompt": bool(flags & set(knobs.unsafe_flags)),
            "low_quality_prompt": (knobs.drop_nonsense and "nonsense" in flags)
            or (
                rated is not None
                and knobs.min_quality is not None
                and math.isfinite(rated["rating"])
                and rated["rating"] < knobs.min_quality
            ),
            "not_scored": any(holes),
            "contradicts_label": needed is not None
            and seen is not None
            and float(seen.agreement[i]) < needed,
            "outside_margin_window": (low is not None and margin < low)
            or (high is not None and margin > high),
        }
        assert set(stopped) == set(GATES)
        reasons.append(next((gate for gate in GATES if stopped[gate]), "below_cutoff"))
    if knobs.margin_percentiles != (0.0, 100.0):
        margins = [float(seen.margin[i]) for i, r in enumerate(reasons) if r == "below_cutoff"]
        low, high = np.percentile(margins, knobs.margin_percentiles)
        for i, reason in enumerate(reasons):
            if reason == "below_cutoff" and not low <= float(seen.margin[i]) <= high:
                reasons[i] = "outside_margin_window"
    return reasons


@pytest.mark.parametrize(
    "knobs",
    [
        Select(),
        Select(unsafe_flags=("hate",), drop_nonsense=False, drop_duplicates=False),
        Select(min_quality=2.5, min_agreement=0.5),
        Select(min_agreement=1.0, alpha=0, gamma=0),
        Select(margin_window=(0.3, None)),
        Select(margin_window=(0.25, 1.5), margin_percentiles=(10, 80)),
        Select(strategy="consensus", margin_percentiles=(0, 50)),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(4))
def test_every_pair_has_the_reason_of_the_first_gate_that_stops_it(knobs, seed):
    pairs = make_pairs(200, 30, seed)
    scores = make_scores(pairs, scorers=1 + seed % 3, seed=seed)
    unreadable = set(pairs.table["pair_id"].to_pylist()[::17])
    terms = gather_terms(pairs, scores, knobs)
    codes = reason_codes(pairs.table, terms, knobs, unreadable)
    expected = slow_reasons(pairs, scores, knobs, unreadable)
    assert [REASONS[code] for code in codes] == expected
    assert len(set(expected)) > 3  # the worlds have something for the gates to do


def test_seven_scorers_of_ten_are_not_below_a_share_of_seven_tenths():
    pairs = make_pairs(40, 5)
    label = pairs.table["label"].to_numpy()
    toward = np.sign(label - 0.5).astype(np.float32)
    scores = make_scores(pairs, scorers=10)
    for place, (name, table) in enumerate(scores.margins.items()):
        sign = 1 if place < 7 else -1
        scores.margins[name] = table.set_column(1, "reward_0", [sign * toward]).set_column(
            2, "reward_1", [0 * toward]
        )
    terms = gather_terms(pairs, scores, Select())
    codes = reason_codes(pairs.table, terms, Select(min_agreement=0.7), ())
    assert "contradicts_label" not in [REASONS[code] for code in codes]
