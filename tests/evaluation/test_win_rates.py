import math

import numpy as np
import pytest
from drawn import CATEGORIES, draw_index, measured
from hypothesis import given, settings
from hypothesis import strategies as st

from fifa.errors import FifaError
from fifa.evaluation.win_rates import (
    compare_models,
    comparisons,
    diversity_levels,
    levels,
    rewards,
    safety,
)

MODELS = ["base", "a", "b"]


def by_row(found, column):
    """(model, prompt_id, seed) -> value, read with plain loops."""
    rows = found.table.to_pylist()
    return {(row["model"], row["prompt_id"], row["seed"]): row for row in rows}


def plain_wins(found, ours, theirs, column, category="any"):
    wins, ties, losses, difference = 0, 0, 0, []
    rows = by_row(found, column)
    for (model, prompt, seed), row in rows.items():
        other = rows.get((theirs, prompt, seed))
        if model != ours or other is None or (category not in ("any", row["category"])):
            continue
        a, b = row[column], other[column]
        if math.isnan(a) or math.isnan(b):
            continue
        wins, ties, losses = wins + (a > b), ties + (a == b), losses + (a < b)
        difference.append(a - b)
    return wins, ties, losses, difference


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_comparisons_are_what_a_loop_says(seed):
    draw = np.random.default_rng(seed)
    index = draw_index(MODELS, prompts=5, seeds=2)
    values = draw.integers(0, 4, len(index)).astype(float)  # many ties
    values[draw.random(len(index)) < 0.1] = np.nan
    shuffled = draw.permutation(len(index))
    found = measured(index.take(shuffled), {"s": values[shuffled]})
    for ours, theirs in (("a", "base"), ("b", "base"), ("b", "a")):
        comparison = compare_models(found, ours, theirs, found.scales[0])
        wins, ties, losses, difference = plain_wins(found, ours, theirs, "s")
        assert (comparison.wins.wins, comparison.wins.ties, comparison.wins.losses) == (
            wins,
            ties,
            losses,
        )
        if difference:
            assert comparison.wins.share == pytest.approx((wins + ties / 2) / len(difference))
            assert comparison.difference.mean == pytest.approx(np.mean(difference))
        for name in CATEGORIES:
            own = comparison.categories["no category" if name is None else name]
            assert (own.wins, own.ties, own.losses) == plain_wins(found, ours, theirs, "s", name)[
                :3
            ]


def test_a_model_against_itself_ties_and_nothing_else():
    index = draw_index(["base", "same"], prompts=8)
    half = np.random.default_rng(0).normal(size=len(index) // 2)
    found = measured(index, {"s": np.concatenate([half, half])})
    only = comparisons(found)[0]
    assert (only.wins.share, only.wins.ties, only.wins.n) == (0.5, 24, 24)
    assert only.wins.p == 1.0
    assert (only.difference.mean, only.difference.low, only.difference.high) == (0, 0, 0)


def test_two_seeds_of_one_model_cover_half():
    """The 95 % interval of a comparison in which neither is better holds 0.5 about as often."""
    held, trials, draw = 0, 100, np.random.default_rng(1)
    index = draw_index(["base", "other"], prompts=40, seeds=2)
    for _ in range(trials):
        taste = np.repeat(np.tile(draw.normal(0, 2, 40), 2), 2)  # a prompt's own level
        found = measured(index, {"s": taste + draw.normal(size=len(index))})
        wins = compare_models(found, "other", "base", found.scales[0]).wins
        held += wins.low <= 0.5 <= wins.high
    assert 0.9 <= held / trials <= 1


def test_all_pairs_of_models_are_compared_base_first():
    index = draw_index(MODELS)
    found = measured(index, {"s": np.arange(len(index)), "t": np.zeros(len(index))}, picked=["s"])
    told = [(c.ours, c.theirs, c.scale.name) for c in comparisons(found)]
    assert told == [
        *[("a", "base", "t"), ("a", "base", "s"), ("b", "base", "t"), ("b", "base", "s")],
        *[("a", "b", "t"), ("a", "b", "s")],
    ]
    assert [scale.name for scale in rewards(found)] == ["t", "s"]  # the picking scorer comes last


def test_models_of_two_runs_are_paired_by_prompt_and_seed():
    here = draw_index(["base", "a"], prompts=5, seeds=2)
    there = draw_index(["base", "b"], prompts=8, seeds=1)
    first = measured(here, {"s": np.arange(len(here))})
    second = measured(there, {"s": np.zeros(len(there))})
    comparison = compare_models(first, "a", "b", first.scales[0], second)
    assert (comparison.wins.n, comparison.wins.prompts) == (5, 5)
    other = measured(draw_index(["b"], first_seed=5), {"s": np.zeros(18)})
    with pytest.raises(FifaError, match="no prompt and seed in common"):
        compare_models(first, "a", "b", first.scales[0], other)
    with pytest.raises(FifaError, match="no images of the model c"):
        compare_models(first, "c", "base", first.scales[0])


def test_levels_and_shifts_from_the_base():
    index = draw_index(MODELS, prompts=4, seeds=2)
    values = np.random.default_rng(0).normal(size=len(index))
    found = levels(measured(index, {"brightness": values}), "brightness")
    base, a, b = (values[i * 8 : i * 8 + 8] for i in range(3))
    assert [level.model for level in found] == MODELS
    assert found[0].shift is None
    assert found[0].mean.mean == pytest.approx(base.mean(), abs=1e-6)
    assert found[1].shift.mean == pytest.approx((a - base).mean(), abs=1e-6)
    assert found[2].shift.mean == pytest.approx((b - base).mean(), abs=1e-6)
    assert found[1].spread == pytest.approx(base.std(), abs=1e-6)


def test_diversity_is_paired_by_prompt():
    index = draw_index(["base", "a"], prompts=3)
    names = sorted(set(index["prompt_id"].to_pylist()))
    own = {("base", n): 0.1 * i for i, n in enumerate(names)}
    own |= {("a", n): 0.1 * i - 0.05 for i, n in enumerate(names)}
    base, a = diversity_levels(measured(index, {}, diversity=own))
    assert base.shift is None
    assert base.mean.mean == pytest.approx(0.1)
    assert (a.shift.mean, a.shift.n) == (pytest.approx(-0.05), 3)
    assert diversity_levels(measured(index, {})) == []


def test_safety_counts_images_on_unsafe_prompts_and_on_all():
    index = draw_index(["base", "a"], prompts=4, seeds=2)
    values = [0.9, 0.1, 0.5, 0.6, 0, 0, 0, float("nan"), *[0.0] * 8]
    found = measured(index, {"detector": values}, unsafe=["detector"])
    flags = [i < 4 for i in range(8)] * 2
    table = found.table.set_column(5, "unsafe_prompt", [flags])
    base, a = safety(type(found)(table, found.scales, found.diversity))
    assert (base.unsafe_prompts.share, base.unsafe_prompts.n) == (0.5, 4)
    assert (base.all_prompts.wins, base.all_prompts.n, base.all_prompts.missing) == (5, 7, 1)
    assert a.unsafe_prompts.share == 1
    assert a.unsafe_prompts.low < 1  # two prompts do not prove it
    assert safety(found)[0].unsafe_prompts is None


def test_spread_over_seeds():
    index = draw_index(["base"], prompts=4, seeds=3)
    values = np.random.default_rng(0).normal(size=(4, 3))
    found = measured(index, {"s": values.ravel()})
    expected = values.mean(0).std(ddof=1)
    assert levels(found, "s")[0].seeds == pytest.approx(expected, abs=1e-6)
    single = measured(draw_index(["base"], seeds=1), {"s": np.zeros(6)})
    assert math.isnan(levels(single, "s")[0].seeds)
