import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from fifa.config import Select
from fifa.selection.choose import importance

HOW = ["none", "z", "rank", "robust"]
values = arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-1000, 1000, width=32, allow_nan=False)
)


def normalized(x, how):
    """A term alone."""
    return importance(x, None, None, Select(normalize=how), len(x))


def test_each_normalisation_is_the_textbook_one():
    x = np.random.default_rng(0).gamma(2, 3, 501).astype(np.float32)
    np.testing.assert_array_equal(normalized(x, "none"), x)
    np.testing.assert_allclose(normalized(x, "z"), stats.zscore(x.astype(float)), rtol=1e-6)
    np.testing.assert_allclose(normalized(x, "rank"), (stats.rankdata(x) - 0.5) / 501, rtol=1e-6)
    unit = stats.iqr(x.astype(float)) / 1.349
    np.testing.assert_allclose(normalized(x, "robust"), (x - np.median(x)) / unit, rtol=1e-6)


@pytest.mark.parametrize("how", ["z", "rank", "robust"])
def test_a_term_that_is_the_same_for_all_pairs_is_zero(how):
    assert not normalized(np.full(9, 3.7, np.float32), how).any()
    assert not normalized(np.full(1, -2, np.float32), how).any()


def test_robust_falls_back_to_the_standard_deviation_where_half_the_values_are_equal():
    x = np.array([4] * 8 + [1, 2], np.float32)
    np.testing.assert_allclose(normalized(x, "robust"), (x - 4) / x.astype(float).std(), rtol=1e-6)


@pytest.mark.parametrize("how", HOW)
@given(values, st.randoms(use_true_random=False))
def test_a_pairs_value_does_not_depend_on_the_order_of_the_pairs(how, x, random):
    order = list(range(len(x)))
    random.shuffle(order)
    np.testing.assert_array_equal(normalized(x[order], how), normalized(x, how)[order])


@pytest.mark.parametrize("how", HOW)
@given(values)
@example(np.array([0, 1e-40, 2e-40, 3e-40, 1000], np.float32))  # beyond float32 in units of that
def test_normalising_keeps_the_order_and_stays_finite(how, x):
    found = normalized(x, how)
    assert np.isfinite(found).all()
    assert (np.diff(found[np.argsort(x, kind="stable")]) >= 0).all()


@pytest.mark.parametrize("how", HOW)
def test_importance_is_margin_plus_weighted_quality_and_diversity(how):
    m, q, h = np.random.default_rng(1).normal(size=(3, 40)).astype(np.float32)
    knobs = Select(alpha=0.3, gamma=2.0, normalize=how)
    expected = normalized(m, how) + 0.3 * normalized(q, how) + 2 * normalized(h, how)
    np.testing.assert_allclose(importance(m, q, h, knobs, 40), expected, rtol=1e-6, atol=1e-6)


def test_an_absent_term_and_one_of_weight_zero_change_nothing():
    m, q, h = np.random.default_rng(1).normal(size=(3, 40)).astype(np.float32)
    alone = importance(m, None, None, Select(), 40)
    none = Select(alpha=0, gamma=0)
    np.testing.assert_array_equal(importance(m, q * np.nan, h, none, 40), alone)
    assert not importance(None, q, h, none, 40).any()
    np.testing.assert_array_equal(importance(None, None, None, none, 3), np.zeros(3))
