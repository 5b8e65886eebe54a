"""Win rates, intervals, tests and alpha against scipy, the krippendorff package and plain loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import krippendorff
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from fifa.errors import FifaError
from fifa.evaluation import stats

NAN = math.nan
OUTCOMES = st.sampled_from([0.0, 0.5, 1.0, NAN])
COMPARISONS = st.lists(st.tuples(OUTCOMES, st.integers(0, 5)), max_size=30)


def columns(comparisons: list[tuple[float, int]]) -> tuple[list[float], list[str]]:
    return [value for value, _ in comparisons], [f"p{prompt}" for _, prompt in comparisons]


@given(
    st.lists(st.tuples(*[st.one_of(st.integers(-3, 3), st.sampled_from([NAN, math.inf]))] * 2)),
    st.sampled_from([0.0, 1.0]),
)
def test_outcomes_are_what_a_loop_says(scores: list[tuple[float, float]], tie: float) -> None:
    ours, theirs = [a for a, _ in scores], [b for _, b in scores]
    for (a, b), got in zip(scores, stats.outcomes(ours, theirs, tie), strict=True):
        if math.isnan(a) or math.isnan(b):
            assert math.isnan(got)
        else:
            assert got == (0.5 if a == b or abs(a - b) <= tie else float(a > b))


@given(COMPARISONS)
def test_a_win_rate_counts_ties_half_and_missing_ones_apart(
    comparisons: list[tuple[float, int]],
) -> None:
    outcome, prompt = columns(comparisons)
    got = stats.win_rate(outcome, prompt, samples=50)
    known = [(value, name) for value, name in zip(outcome, prompt, strict=True) if value == value]
    assert (got.wins, got.losses) == (outcome.count(1.0), outcome.count(0.0))
    assert got.ties == outcome.count(0.5)
    assert got.n == len(known)
    assert got.missing == len(outcome) - len(known)
    assert got.prompts == len({name for _, name in known})
    if known:
        assert got.share == pytest.approx(sum(value for value, _ in known) / len(known))
        assert 0 <= got.low <= got.high <= 1
    else:
        assert math.isnan(got.share)
        assert math.isnan(got.low)
        assert math.isnan(got.p)


def test_other_outcomes_are_refused() -> None:
    with pytest.raises(FifaError, match="an outcome is"):
        stats.win_rate([0.7, 1.0])
    with pytest.raises(FifaError, match="2 prompts for 3 comparisons"):
        stats.win_rate([0.0, 1.0, 1.0], ["a", "b"])


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 50))
def test_one_comparison_a_prompt_is_scipys_sign_test(wins: int, losses: int, ties: int) -> None:
    assume(wins + losses)
    got = stats.sign_flip([1.0] * wins + [0.0] * losses + [0.5] * ties)
    assert got == pytest.approx(scipy_stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)


@given(COMPARISONS)
def test_the_exact_test_is_all_flips_of_all_prompts(comparisons: list[tuple[float, int]]) -> None:
    known = [(value, prompt) for value, prompt in comparisons if value == value]
    assume(known)
    prompts = sorted({prompt for _, prompt in known})
    balance = [sum(2 * v - 1 for v, prompt in known if prompt == name) for name in prompts]
    far = 0
    for signs in itertools.product((-1, 1), repeat=len(balance)):
        flipped = sum(sign * own for sign, own in zip(signs, balance, strict=True))
        far += abs(flipped) >= abs(sum(balance))
    assert stats.sign_flip(*columns(comparisons)) == pytest.approx(far / 2 ** len(balance))


def test_the_exact_test_is_scipys_permutation_test() -> None:
    rng = np.random.default_rng(3)
    prompt = np.repeat(np.arange(12), 4)
    outcome = rng.choice([0.0, 0.5, 1.0], 48, p=[0.25, 0.2, 0.55])
    balance = np.array([(outcome[prompt == i] - 0.5).sum() for i in range(12)])
    theirs = scipy_stats.permutation_test(
        (balance,), lambda x, axis: x.sum(axis), permutation_type="samples", n_resamples=math.inf
    )
    assert stats.sign_flip(outcome, prompt) == pytest.approx(theirs.pvalue)


def test_the_exact_test_of_many_prompts_is_near_the_normal_one() -> None:
    rng = np.random.default_rng(5)
    prompt = np.repeat(np.arange(5000), 8)
    outcome = rng.choice([0.0, 0.5, 1.0], 40_000, p=[0.397, 0.2, 0.403])
    balance = np.bincount(prompt, 2 * outcome - 1)
    z = balance.sum() / np.sqrt((balance**2).sum())
    assert stats.sign_flip(outcome, prompt) == pytest.approx(
        2 * scipy_stats.norm.sf(abs(z)), rel=0.02
    )


def test_repeating_seeds_is_no_new_evidence() -> None:
    once = stats.sign_flip([1.0] * 7 + [0.0], range(8))
    assert stats.sign_flip(([1.0] * 7 + [0.0]) * 10, [*range(8)] * 10) == pytest.approx(once)
    assert stats.sign_flip(([1.0] * 7 + [0.0]) * 10) < once / 100


# in steps of 0.01: sums that differ by no more than rounding are a tie to one side only
@given(
    st.lists(
        st.tuples(st.integers(-900, 900).map(lambda n: n / 100), st.integers(0, 3)),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=30, deadline=None)
def test_drawn_flips_come_near_all_flips(found: list[tuple[float, int]]) -> None:
    difference, prompt = columns(found)
    sums = [sum(d for d, own in found if own == name) for name in {own for _, own in found}]
    flips = itertools.product((-1, 1), repeat=len(sums))
    seen = abs(sum(sums)) * (1 - 1e-9)
    far = [abs(sum(s * own for s, own in zip(f, sums, strict=True))) >= seen for f in flips]
    got = stats.sign_flip_mean(difference, prompt, samples=4000)
    assert got == pytest.approx(np.mean(far), abs=0.05)  # 6 standard errors of 4,000 draws


def test_the_bootstrap_is_that_of_all_resamples() -> None:
    values, prompt = [1.0, 0.5, 0.0, 1.0, NAN, 0.0, 0.5], ["a", "a", "b", "c", "c", "d", "d"]
    of = {"a": [1.0, 0.5], "b": [0.0], "c": [1.0], "d": [0.0, 0.5]}
    every = []
    for drawn in itertools.product(of, repeat=4):
        pooled = [value for name in drawn for value in of[name]]
        every.append(sum(pooled) / len(pooled))
    got = stats.bootstrap_means(values, prompt, samples=200_000)
    expected = {round(mean, 9): every.count(mean) / len(every) for mean in set(every)}
    seen, times = np.unique(got.round(9), return_counts=True)
    assert set(seen) == set(expected)
    for mean, share in zip(seen.tolist(), times / len(got), strict=True):
        assert share == pytest.approx(expected[mean], abs=0.006)


@pytest.mark.parametrize("seeds", [1, 5])
def test_the_interval_is_scipys_over_prompts(seeds: int) -> None:
    rng = np.random.default_rng(11)
    prompt = np.repeat(np.arange(80), seeds)
    lean = np.repeat(rng.uniform(0.2, 0.9, 80), seeds)
    outcome = np.where(rng.random(80 * seeds) < 0.15, 0.5, rng.random(80 * seeds) < lean)
    outcome[rng.random(80 * seeds) < 0.1] = NAN
    known = ~np.isnan(outcome)
    sums = np.bincount(prompt[known], outcome[known], 80)
    counts = np.bincount(prompt[known], minlength=80)
    keep = counts > 0
    theirs = scipy_stats.bootstrap(
        (sums[keep], counts[keep]),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    got = stats.win_rate(outcome, prompt)
    assert (got.low, got.high) == pytest.approx((theirs.low, theirs.high), abs=0.008)


def test_the_interval_covers_the_truth_19_times_of_20() -> None:
    rng = np.random.default_rng(2)
    prompt, covered = np.repeat(np.arange(60), 4), 0
    for _ in range(300):
        lean = np.repeat(rng.beta(3, 2, 60), 4)  # mean 0.6, seeds of a prompt alike
        got = stats.win_rate((rng.random(240) < lean).astype(float), prompt, samples=600)
        covered += got.low <= 0.6 <= got.high
    assert 0.90 <= covered / 300 <= 0.99


def test_the_same_seed_gives_the_same_interval_and_blocks_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    values, prompt = rng.normal(size=90), rng.integers(0, 30, 90)
    once = stats.mean_difference(values, prompt)
    monkeypatch.setattr(stats, "BLOCK", 7 * 30)
    assert stats.mean_difference(values, prompt) == once
    assert stats.mean_difference(values, prompt, seed=1).low != once.low
    assert once.mean == pytest.approx(values.mean())


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("prompts", [1, 7, 200])
def test_where_all_prompts_agree_the_interval_is_wilsons(share: float, prompts: int) -> None:
    got = stats.win_rate(np.full(3 * prompts, share), np.repeat(np.arange(prompts), 3))
    theirs = scipy_stats.binomtest(int(share) * prompts, prompts).proportion_ci(method="wilson")
    assert (got.low, got.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_a_model_against_itself_ties_exactly() -> None:
    scores = np.random.default_rng(0).normal(size=120)
    got = stats.win_rate(stats.outcomes(scores, scores), np.repeat(np.arange(40), 3))
    assert (got.share, got.ties, got.p) == (0.5, 120, 1.0)
    assert got.low < 0.5 < got.high
    assert got.high - got.low < 0.1


def test_categories_are_win_rates_of_their_own() -> None:
    outcome = np.array([1.0, 0.0, 0.5, 1.0, 1.0, NAN])
    prompt = ["a", "a", "b", "c", "d", "e"]
    category = ["animals", "animals", None, "food", "food", "food"]
    got = stats.by_category(outcome, category, prompt, samples=100)
    assert list(got) == ["animals", "food", "no category"]
    assert got["animals"] == stats.win_rate(outcome[:2], prompt[:2], samples=100)
    assert got["food"] == stats.win_rate(outcome[3:], prompt[3:], samples=100)
    assert got["no category"].ties == 1


def random_votes(rng: np.random.Generator) -> Any:
    voters, units, values = rng.integers(2, 7), rng.integers(2, 30), rng.integers(2, 5)
    truth = rng.integers(0, values, units)
    votes = np.where(
        rng.random((voters, units)) < 0.6, truth, rng.integers(0, values, (voters, units))
    ).astype(float)
    votes[rng.random((voters, units)) < rng.uniform(0, 0.7)] = NAN
    return votes


@given(st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_alpha_is_the_krippendorff_packages(seed: int) -> None:
    votes = random_votes(np.random.default_rng(seed))
    paired = votes[:, (~np.isnan(votes)).sum(0) >= 2]
    if len(set(paired[~np.isnan(paired)])) < 2:
        assert math.isnan(stats.alpha(votes))
        return
    theirs = krippendorff.alpha(paired, level_of_measurement="nominal")
    assert stats.alpha(votes) == pytest.approx(theirs, abs=1e-9)


@given(st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_alpha_is_that_of_all_pairs_of_votes(seed: int) -> None:
    votes = random_votes(np.random.default_rng(seed))
    units = [[v for v in unit if v == v] for unit in votes.T.tolist()]
    units = [unit for unit in units if len(unit) >= 2]
    every = [v for unit in units for v in unit]
    assume(len(set(every)) > 1)
    observed = sum(
        sum(a != b for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units
    ) / len(every)
    expected = sum(a != b for a, b in itertools.permutations(every, 2)) / (
        len(every) * (len(every) - 1)
    )
    assert stats.alpha(votes) == pytest.approx(1 - observed / expected)


def test_alpha_of_krippendorffs_own_example() -> None:
    n = NAN  # "Computing Krippendorff's Alpha-Reliability", part C: 4 observers, 12 units
    votes = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, n, n, n],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, n, 3],
        [n, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, n],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, n],
    ]
    assert stats.alpha(votes) == pytest.approx(0.743, abs=5e-4)


def test_alpha_of_too_little_is_not_a_number() -> None:
    assert math.isnan(stats.alpha(np.full((3, 4), NAN)))
    assert math.isnan(stats.alpha([[1, NAN], [NAN, 2]]))
    assert math.isnan(stats.alpha([[1, 1], [1, 1]]))
    assert math.isnan(stats.alpha(np.empty((0, 5))))
