import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from worlds import make_pairs, make_scores

from fifa.config import Select
from fifa.errors import FifaError
from fifa.scoring.margin import committee
from fifa.selection.choose import (
    Terms,
    aspects_disagree,
    columns_needed,
    gather_terms,
    reason_codes,
)
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
            "other_generator": False,
            "aspects_disagree": False,
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


def made_by(models, **more):
    """Pairs by these generators, each with its own prompt, and two labels by aspect."""
    pairs = make_pairs(len(models), prompts=len(models))
    columns = {
        name: pa.array([pair[side] for pair in models]).dictionary_encode()
        for side, name in enumerate(("model_0", "model_1"))
    }
    columns |= {name: pa.array(values, pa.float32()) for name, values in more.items()}
    table = pairs.table
    for name, column in columns.items():
        table = table.append_column(name, column)
    return replace(pairs, table=table)


MODELS = [("a", "a"), ("a", "b"), ("b", "c"), (None, "a"), ("c", "a"), ("a", None)]


@pytest.mark.parametrize(
    ("knobs", "stopped"),
    [
        (Select(generators=("a",)), [0, 1, 1, 1, 1, 1]),
        (Select(generators=("a", "b")), [0, 0, 1, 1, 1, 1]),
        (Select(not_generators=("a",)), [1, 1, 0, 1, 1, 1]),
        (Select(not_generators=("b",)), [0, 1, 1, 0, 0, 0]),
        (Select(generators=("a", "b"), not_generators=("b",)), [0, 1, 1, 1, 1, 1]),
    ],
)
def test_pairs_of_other_generators_are_stopped_on_either_side(knobs, stopped):
    pairs = made_by(MODELS)
    table = pairs.table.set_column(
        pairs.table.schema.get_field_index("label"), "label", pa.array([1.0] * 6, pa.float32())
    )
    codes = reason_codes(table, Terms(), replace(knobs, drop_duplicates=False), ())
    assert [REASONS[code] == "other_generator" for code in codes] == list(map(bool, stopped))


def test_an_unknown_generator_is_refused_with_those_there_are():
    pairs = made_by(MODELS)
    with pytest.raises(FifaError, match="no generator is named 'A'") as refused:
        reason_codes(pairs.table, Terms(), Select(not_generators=("A", "b")), ())
    assert refused.value.do == "take some of a, b, c"
    with pytest.raises(FifaError, match="does not say which generator"):
        reason_codes(make_pairs(4).table, Terms(), Select(generators=("a",)), ())


def test_aspects_disagree_where_two_labels_have_different_winners():
    label = pa.array([1.0, 1.0, 0.8, 0.2, 1.0, 0.0], pa.float32())
    pairs = made_by(
        MODELS,
        label_alignment=[0.9, 0.4, 0.5, 0.1, None, 0.5],
        label_coherence=[0.6, 0.9, 0.5, 0.9, None, 0.1],
    )
    table = pairs.table.set_column(pairs.table.schema.get_field_index("label"), "label", label)
    table = table.append_column("label_score", pa.array([-9.0] * 6))  # float64: no label
    assert aspects_disagree(table).tolist() == [False, True, False, True, False, False]
    codes = reason_codes(table, Terms(), Select(drop_disagreeing=True, drop_duplicates=False), ())
    assert [REASONS[code] for code in codes].count("aspects_disagree") == 2
    assert "aspects_disagree" not in [
        REASONS[code] for code in reason_codes(table, Terms(), Select(), ())
    ]
    with pytest.raises(FifaError, match="no labels by aspect"):
        reason_codes(make_pairs(4).table, Terms(), Select(drop_disagreeing=True), ())


def test_only_the_columns_that_a_gate_asks_for_are_needed():
    there = ["pair_id", "model_0", "model_1", "label", "label_alignment", "label_votes"]
    assert columns_needed(Select(), there) == []
    assert columns_needed(Select(generators=("a",)), there) == ["model_0", "model_1"]
    assert columns_needed(Select(drop_disagreeing=True), there) == ["label_alignment"]
