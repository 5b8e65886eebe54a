"""Whether a margin can be trusted: known worlds have known verdicts, pairs are counted once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fifa.scoring.rewards.metrics import clustered, prompt_bootstrap, wilson
from fifa.scoring.trust import LEAST, PARTS, measure_trust, same_verdicts


def judged(kind: str, n: int, seed: int = 0):
    """Differences and labels of a judge of one kind, three pairs a prompt."""
    rng = np.random.default_rng(seed)
    label = rng.choice([0.0, 1.0], n)
    side, size = np.where(label > 0.5, 1, -1), np.abs(rng.normal(size=n)) + 0.01
    if kind == "first":
        return np.ones(n), label
    if kind == "logistic":  # the label is drawn by the margin: log-odds times 3
        size = rng.normal(size=n) * 2
        return size * 3, (rng.random(n) < 1 / (1 + np.exp(-size))).astype(float)
    if kind == "blind below":  # a coin for the smaller half, right above it
        coin = rng.choice([-1, 1], n)
        return np.where(size < np.median(size), coin, side) * size, label
    right = rng.random(n) < float(kind)
    return size * np.where(right, side, -side), label


@pytest.mark.parametrize(
    ("kind", "n", "finding", "refused"),
    [
        ("0.5", 2000, "near chance", True),
        ("0.53", 20_000, "near chance", True),
        ("0.58", 20_000, "near chance", True),
        ("0.58", 600, "weak", False),
        ("0.72", 2000, "usable", False),
        ("0.3", 2000, "contradicts", True),
        ("first", 2000, "position", True),
        ("logistic", 2000, "usable", False),
        ("blind below", 2000, "usable", False),
        ("0.5", 60, "too few", False),
        ("0.72", 15, "too few", False),
    ],
)
def test_the_verdict_is_what_the_world_is(kind, n, finding, refused):
    trust = measure_trust(kind, *judged(kind, n), np.arange(n) // 3)
    assert (trust.finding, trust.refused) == (finding, refused)
    assert trust.verdict and "nan" not in trust.verdict
    if kind == "0.72" and n == 2000:
        assert trust.usable == 0
    if kind == "blind below":
        assert trust.usable == 5 and "from a margin of" in trust.verdict
    if kind == "logistic":
        assert trust.temperature == pytest.approx(3, rel=0.1) and trust.ece < 0.03
        assert all(abs(b.confidence - b.outcome) < 0.12 for b in trust.bins)
    if kind == "first":
        assert (trust.won_by_0.share, trust.won_by_1.share, trust.first.share) == (1, 0, 1)


def test_a_chance_judge_is_seldom_taken_for_a_usable_one_and_a_good_one_never_refused():
    group = np.arange(300)
    found = {
        kind: [measure_trust("", *judged(kind, 300, seed), group) for seed in range(40)]
        for kind in ("0.5", "0.75")
    }
    assert sum(trust.finding == "usable" for trust in found["0.5"]) <= 1
    assert not any(trust.refused for trust in found["0.75"])


def test_ties_votes_and_pairs_without_a_margin_are_counted_by_the_stated_rule():
    difference = [1.0, -1.0, 2.0, np.nan, np.inf, 0.0, 1.0]
    label = [0.7, 0.7, 0.5, 1.0, 1.0, 1.0, np.nan]
    trust = measure_trust("x", difference, label, np.arange(7))
    assert (trust.pairs, trust.unscored, trust.ties) == (7, 2, 2)
    assert trust.accuracy.n == 3 and trust.accuracy.share == pytest.approx((1 + 0 + 0.5) / 3)
    assert sum(b.n for b in trust.bins) == 4  # the tie is one of them
    assert trust.won_by_1.n == 0 and trust.finding == "too few"


@given(st.integers(0, 400), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_the_parts_hold_every_judged_pair_once_smallest_margins_first(n, seed):
    rng = np.random.default_rng(seed)
    difference, label = rng.normal(size=n), rng.choice([0, 0.5, 1], n)
    trust = measure_trust("x", difference, label, np.arange(n))
    counts = [part.own.n for part in trust.parts]
    assert len(counts) == min(PARTS, trust.accuracy.n // LEAST)
    if counts:
        assert sum(counts) == trust.accuracy.n and max(counts) - min(counts) <= 1
        assert trust.parts[0].onwards == trust.accuracy
        margins = [part.margin for part in trust.parts]
        assert margins == sorted(margins)
        right = sum(part.own.share * part.own.n for part in trust.parts)
        assert right == pytest.approx(trust.accuracy.share * trust.accuracy.n)


def test_an_interval_over_prompts_is_wilsons_without_them_and_wide_as_the_bootstraps_with_them():
    rng = np.random.default_rng(0)
    right = (rng.random(400) < 0.7).astype(float)
    alone = clustered(right, np.arange(400))
    assert (alone.low, alone.high) == pytest.approx(wilson(right.sum(), 400), abs=2e-3)
    prompt = np.arange(400) // 8
    alike = (rng.random(50) < 0.7).astype(float)[prompt]  # all pairs of a prompt are alike
    both = clustered(alike, prompt)
    assert both.high - both.low > 2 * (alone.high - alone.low)
    bootstrap = prompt_bootstrap(2 * alike - 1, np.ones(400), prompt)
    assert (both.low, both.high) == pytest.approx(bootstrap, abs=0.02)
    sure = clustered(np.ones(400), prompt)
    assert (sure.low, sure.high) == pytest.approx(wilson(50, 50))


def test_two_judges_agree_where_both_have_an_opinion():
    found = same_verdicts(
        {"a": [1, -1, 0, 2, np.nan], "b": [3, 1, 1, 1, 1], "c": [1, 1, 1, 1, 1]}, np.arange(5)
    )
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found["a", "b"][0] == pytest.approx(2 / 3) and found["a", "b"].n == 3
