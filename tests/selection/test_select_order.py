from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fifa.selection.strategies import ascending, draws, id_bytes, midranks, occurrence

ids = st.lists(st.text("0123456789abcdefé", min_size=1, max_size=12), unique=True, min_size=1)
coarse = st.sampled_from([-2.5, -1.0, -0.0, 0.0, 1.0, 3e38, 1e-40])


@given(ids, st.data())
def test_equal_keys_are_ordered_by_id_whatever_the_order_of_the_rows(names, data):
    keys = data.draw(st.lists(coarse, min_size=len(names), max_size=len(names)))
    found = ascending(np.array(keys, np.float32), id_bytes(pa.chunked_array([names])))
    expected = sorted(range(len(names)), key=lambda i: (keys[i], names[i].encode()))
    assert found.tolist() == expected


def test_only_the_given_rows_are_ordered():
    names = id_bytes(pa.chunked_array([["d", "c"], ["b", "a"]]))
    rows = np.array([0, 2, 3], np.int32)
    assert ascending(np.array([1, 0, 1], np.float32), names, rows).tolist() == [2, 3, 0]


def test_many_equal_keys_and_long_common_prefixes_are_still_exact():
    rng = np.random.default_rng(0)
    names = [f"same-prefix-{i:06d}" for i in rng.permutation(5000)]
    keys = rng.integers(0, 3, 5000).astype(np.float32)
    expected = sorted(range(5000), key=lambda i: (keys[i], names[i]))
    assert ascending(keys, id_bytes(pa.chunked_array([names]))).tolist() == expected


def test_ids_of_a_slice_are_the_slices_own():
    column = pa.chunked_array([pa.array(["aa", "bbb", "c", "dd"])[1:3]])
    assert id_bytes(column).tolist() == [b"bbb", b"c"]


@given(st.lists(coarse, min_size=1, max_size=50))
def test_midranks_are_the_average_ranks_of_scipy(values):
    array = np.array(values, np.float32)
    np.testing.assert_array_equal(midranks(array), stats.rankdata(array))


@given(st.lists(st.integers(0, 5), max_size=50))
def test_occurrence_counts_earlier_members_of_the_group(groups):
    seen: Counter[int] = Counter()
    expected = []
    for group in groups:
        expected.append(seen[group])
        seen[group] += 1
    assert occurrence(np.array(groups, np.int32)).tolist() == expected


def test_draws_are_uniform_and_depend_on_id_and_seed_only():
    names = id_bytes(pa.chunked_array([[f"{i:020x}" for i in range(20_000)]]))
    rows = np.arange(20_000, dtype=np.int32)
    drawn = draws(names, rows, seed=7)
    assert stats.kstest(drawn, "uniform").pvalue > 0.01
    np.testing.assert_array_equal(draws(names, rows[::-1], seed=7), drawn[::-1])
    assert abs(stats.pearsonr(drawn, draws(names, rows, seed=8)).statistic) < 0.03
