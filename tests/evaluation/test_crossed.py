"""Intervals over seeds and prompts at once: what they are, and that they cover."""

import numpy as np
import pytest
from scipy.stats import chi2, t

from fifa.evaluation.crossed import crossed, spread_ends, student
from fifa.scoring.rewards.metrics import wilson


@pytest.mark.parametrize(
    ("seed", "prompt", "left"),
    [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.3, 1.0, 1.0), (0.1, 0.1, 1.0), (1.0, 1.0, 0.1)],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(seed, prompt, left):
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1500):
        y = seed * rng.normal(size=(5, 1)) + prompt * rng.normal(size=40)
        found = crossed(y + left * rng.normal(size=(5, 40)))
        held += found.low <= 0 <= found.high
    assert held / 1500 > 0.935  # 0.95, less what chance takes of 1,500


def test_it_is_students_over_seeds_where_prompts_are_alike():
    y = np.array([[1.0], [2.0], [4.0]]) * np.ones(50)
    found = crossed(y)
    half = t.ppf(0.975, 2) * y[:, 0].std(ddof=1) / np.sqrt(3)
    assert found.mean == pytest.approx(7 / 3)
    assert (found.low, found.high) == pytest.approx((7 / 3 - half, 7 / 3 + half))


def test_ends_and_what_is_missing():
    assert (crossed(np.eye(3), 0, 1).low, crossed(1 - np.eye(3), 0, 1).high) == (0, 1)
    alike = crossed(np.ones((3, 40)), 0, 1)
    assert (alike.low, alike.high) == pytest.approx((1 - wilson(0, 40)[1], 1))
    one = crossed([[0.0, 1.0]])
    assert one.mean == 0.5 and not one.known
    gap = np.array([[0.0, 1.0, np.nan], [1.0, 0.0, 5.0]])
    assert crossed(gap).prompts == 2
    assert not crossed(np.empty((0, 3))).known and np.isnan(crossed(np.full((2, 2), np.nan)).mean)


def test_quantiles_are_those_of_the_tables():
    for freedom in (1, 1.7, 4, 39, 400):
        assert student(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=1e-4)
    for freedom in (1, 2, 4, 19):
        ends = np.sqrt(freedom / chi2.ppf([0.975, 0.025], freedom))
        assert spread_ends(freedom) == pytest.approx(tuple(ends), rel=1e-3)
