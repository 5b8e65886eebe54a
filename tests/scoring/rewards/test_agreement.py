"""Agreement with people: intervals against scipy's, the curve against a loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import binomtest

from fifa.scoring.rewards.metrics import agreement, agreement_by_margin, wilson


@given(st.integers(1, 2000), st.data())
def test_wilson_is_scipys(n: int, data: st.DataObject) -> None:
    agreed = data.draw(st.integers(0, n))
    theirs = binomtest(agreed, n).proportion_ci(0.95, method="wilson")
    assert wilson(agreed, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_ties_are_left_out_and_indifference_counts_half() -> None:
    got = agreement(np.float32([1, -2, 0, math.nan]))
    assert got.share == 0.5
    assert got.n == 3
    assert got.low < 0.5 < got.high


def test_nothing_to_compare_is_not_a_number() -> None:
    got = agreement(np.float32([math.nan]))
    assert math.isnan(got.share)
    assert got.n == 0
    assert agreement_by_margin(np.float32([math.nan])).num_rows == 0


@given(hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-8, 8, width=16)))
def test_the_curve_is_the_agreement_of_every_prefix(signed: np.ndarray) -> None:
    table = agreement_by_margin(signed, [0.1, 0.5, 1.0])
    margin = np.abs(signed)
    ranked = sorted(zip(margin.tolist(), signed.tolist(), strict=True), key=lambda p: -p[0])
    for row in table.to_pylist():
        top = ranked[: row["n"]]
        assert row["n"] == max(1, round(row["fraction"] * len(signed)))
        assert row["share"] == pytest.approx(agreement(np.float32([s for _, s in top])).share)
        assert row["threshold"] == top[-1][0]
