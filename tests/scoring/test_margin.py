"""Margins: how columns are read, and the committee's arithmetic against a loop over pairs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fifa
from fifa.console import collect_facts
from fifa.data.table import PAIRS, PROMPTS, Pairs
from fifa.errors import FifaError
from fifa.scoring.margin import CHUNK, committee, margin_scores, pair_rewards
from fifa.scoring.table import MARGIN, SIGMAS, Scores, score_facts

DATA = Path("../shared/data/pickapic_val500/pairs.parquet")


def pairs_with(n: int, **columns: object) -> Pairs:
    table = PAIRS.empty_table()
    plain = {name: pa.nulls(n, table.schema.field(name).type) for name in PAIRS.names}
    plain["pair_id"] = pa.array([f"{i:020x}" for i in range(n)])
    plain.update({name: pa.array(values) for name, values in columns.items()})
    return Pairs(pa.table(plain), PROMPTS.empty_table())


def rewards(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    return table["reward_0"].to_numpy(), table["reward_1"].to_numpy()


def test_raw_scores_stay_as_they_are() -> None:
    pairs = pairs_with(3, a=[0.25, -3.0, 2.0], b=[0.5, 1.0, 0.0])
    table = margin_scores(pairs, "column:a,b")
    assert table.schema.equals(MARGIN)
    assert table["pair_id"].to_pylist() == pairs.table["pair_id"].to_pylist()
    assert rewards(table)[0].tolist() == [0.25, -3.0, 2.0]
    assert score_facts(table)["reading"] == "raw"


def test_probabilities_become_log_odds() -> None:
    pairs = pairs_with(3, p=[0.75, 0.5, 0.1], q=[0.25, 0.5, 0.9])
    table = margin_scores(pairs, "column:p,q")
    reward_0, reward_1 = rewards(table)
    expected = [math.log(3), 0.0, math.log(1 / 9)]
    assert (reward_0 - reward_1).tolist() == pytest.approx(expected, abs=1e-6)
    assert score_facts(table)["reading"] == "logodds"


def test_one_row_that_does_not_sum_to_one_makes_them_raw_scores() -> None:
    table = margin_scores(pairs_with(2, p=[0.75, 0.5], q=[0.25, 0.6]), "column:p,q")
    assert score_facts(table)["reading"] == "raw"


def test_the_reading_can_be_forced() -> None:
    pairs = pairs_with(2, p=[0.75, 0.5], q=[0.25, 0.5])
    raw = margin_scores(pairs, "column:raw:p,q")
    assert rewards(raw)[0].tolist() == [0.75, 0.5]
    pairs = pairs_with(2, p=[0.7, 0.2], q=[0.2, 0.2])
    odds = margin_scores(pairs, "column:logodds:p,q")
    assert rewards(odds)[0].tolist() == pytest.approx([math.log(0.7), math.log(0.2)])


def test_certain_probabilities_are_clipped_and_stay_finite() -> None:
    reward_0, reward_1 = rewards(margin_scores(pairs_with(1, p=[1.0], q=[0.0]), "column:p,q"))
    assert (reward_0 - reward_1).tolist() == pytest.approx([-math.log(1e-7)])


@pytest.mark.parametrize("reading", ["raw", "logodds"])
def test_what_is_not_finite_is_counted_and_not_hidden(reading: str) -> None:
    pairs = pairs_with(4, p=[float("nan"), 0.5, None, 0.5], q=[0.5, float("inf"), 0.5, 0.5])
    with collect_facts() as facts:
        reward_0, reward_1 = rewards(margin_scores(pairs, f"column:{reading}:p,q"))
    assert np.isfinite(reward_0 - reward_1).tolist() == [False, False, False, True]
    assert facts["margin_not_finite"] == 3


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("column:a,missing", "a, b"),
        ("column:a", "a, b"),
        ("column:a,b,a", "a, b"),
        ("column:label,a", "a, b"),  # the person's label is no reward
        ("pickscores", "column:NAME_0,NAME_1"),
        ("pickscore", "--allow-download"),  # this source has no images
        ("column:logodds:a,b", "column:raw"),
    ],
)
def test_a_wrong_spec_says_what_there_is(spec: str, says: str) -> None:
    pairs = pairs_with(1, a=[2.0], b=[0.0], words=["no number"])
    with pytest.raises(FifaError, match=says) as caught:
        margin_scores(pairs, spec)
    assert "words" not in str(caught.value)


def test_a_finished_file_is_read_and_other_values_get_another(tmp_path: Path) -> None:
    first = margin_scores(pairs_with(2, a=[1.0, 2.0], b=[0.0, 0.0]), "column:a,b", tmp_path)
    (file,) = tmp_path.glob("margin-*.parquet")
    before = file.read_bytes()
    again = margin_scores(pairs_with(2, a=[1.0, 2.0], b=[0.0, 0.0]), "column:a,b", tmp_path)
    assert again.equals(first)
    assert file.read_bytes() == before
    margin_scores(pairs_with(2, a=[1.0, 3.0], b=[0.0, 0.0]), "column:a,b", tmp_path)
    margin_scores(pairs_with(2, a=[1.0, 2.0], b=[0.0, 0.0]), "column:raw:a,b", tmp_path)
    assert len(list(tmp_path.glob("margin-*.parquet"))) == 3


def naive_committee(rewards: list[tuple[list, list]], label: list[float]) -> list[tuple]:
    """The formulas, pair by pair, in Python's own floats."""
    differences = [
        [float(a) - float(b) for a, b in zip(*scorer, strict=True)] for scorer in rewards
    ]
    spreads = []
    for d in differences:
        finite = [x for x in d if math.isfinite(x)]
        square = sum(x * x for x in finite) / len(finite) if finite else 0.0
        spreads.append(math.sqrt(square) if square > 0 and len(rewards) > 1 else 1.0)
    out = []
    for i, y in enumerate(label):
        own = [d[i] for d in differences]
        if not all(math.isfinite(x) for x in own):
            out.append((math.nan, math.nan, math.nan))
            continue
        d = sum(x / s for x, s in zip(own, spreads, strict=True)) / len(own)
        if y == 0.5:
            out.append((abs(d), math.nan, math.nan))
            continue
        person = 1 if y > 0.5 else -1
        share = sum(0.5 if x == 0 else float(x * person > 0) for x in own) / len(own)
        out.append((abs(d), d * person, share))
    return out


numbers = st.one_of(
    st.floats(-1000, 1000, width=16), st.just(math.nan), st.just(math.inf), st.just(0.0)
)


@settings(deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 12))
def test_a_committee_is_what_the_formulas_say(data: st.DataObject, scorers: int, n: int) -> None:
    column = hnp.arrays(np.float32, n, elements=numbers)
    rewards = [(data.draw(column), data.draw(column)) for _ in range(scorers)]
    label = data.draw(hnp.arrays(np.float32, n, elements=st.sampled_from([0, 0.25, 0.5, 0.75, 1])))
    ours = committee(rewards, label)
    expected = naive_committee([(a.tolist(), b.tolist()) for a, b in rewards], label.tolist())
    got = np.stack([ours.margin, ours.signed_margin, ours.agreement], 1)
    np.testing.assert_allclose(got, np.array(expected), rtol=2e-5, atol=2e-5)
    assert {ours.margin.dtype, ours.signed_margin.dtype, ours.agreement.dtype} == {
        np.dtype(np.float32)
    }


def test_one_scorer_keeps_its_own_scale() -> None:
    ours = committee([(np.float32([3, 1]), np.float32([1, 4]))], np.float32([1, 1]))
    assert ours.margin.tolist() == [2, 3]
    assert ours.signed_margin.tolist() == [2, -3]
    assert ours.agreement.tolist() == [1, 0]


def test_a_committee_does_not_depend_on_its_members_units() -> None:
    rng = np.random.default_rng(0)
    a, b, c, d = rng.standard_normal((4, 1000)).astype(np.float32)
    label = rng.choice(np.float32([0, 1]), 1000)
    plain = committee([(a, b), (c, d)], label)
    scaled = committee([(a, b), (c * 512, d * 512)], label)
    np.testing.assert_allclose(scaled.signed_margin, plain.signed_margin, rtol=1e-5, atol=1e-6)


def test_parts_join_without_a_seam() -> None:
    rng = np.random.default_rng(1)
    n = 2 * CHUNK + 17
    rewards = [tuple(rng.standard_normal((2, n)).astype(np.float32)) for _ in range(3)]
    label = rng.choice(np.float32([0, 0.5, 1]), n)
    ours = committee(rewards, label)
    d = np.mean([(a - b) / np.sqrt(np.mean(np.float64(a - b) ** 2)) for a, b in rewards], 0)
    np.testing.assert_allclose(ours.margin, np.abs(d), rtol=1e-4, atol=1e-6)
    assert np.array_equal(np.isnan(ours.agreement), label == 0.5)


def test_no_scorer_is_an_error() -> None:
    with pytest.raises(FifaError, match="reward model"):
        committee([], np.float32([1]))


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not on this machine")
def test_pickscores_probabilities_agree_with_the_people_as_published_data_says() -> None:
    source = pq.read_table(DATA)
    columns = {name: source[name].to_numpy() for name in ("pickscore_prob_0", "pickscore_prob_1")}
    pairs = pairs_with(source.num_rows, **columns)
    reward_0, reward_1 = rewards(margin_scores(pairs, "column:pickscore_prob_0,pickscore_prob_1"))
    label = source["label_0"].to_numpy()
    ours = committee([(reward_0, reward_1)], label)
    p_0, p_1 = columns.values()
    np.testing.assert_allclose(ours.margin, np.abs(np.log(p_0 / p_1)), rtol=1e-4, atol=1e-5)
    untied = label != 0.5
    agreed = np.mean((p_0 > p_1)[untied] == (label > 0.5)[untied])
    assert np.nanmean(ours.signed_margin[untied] > 0) == pytest.approx(agreed)
    assert agreed == pytest.approx(0.76, abs=0.01)


NAN = math.nan
#             mu_0  mu_1  sigma_0  sigma_1   z
UNSURE = [
    (3.0, 1.0, 0.6, 0.8, 2.0),
    (1.0, 3.0, 0.6, 0.8, -2.0),
    (3.0, 1.0, 3.0, 4.0, 0.4),
    (1.0, 1.0, 0.6, 0.8, 0.0),
    (NAN, 1.0, NAN, 0.8, NAN),
    (1.0, 0.0, 0.0, 0.0, NAN),  # sure of everything: the unit is nothing
]


def unsure() -> tuple[Pairs, pa.Table]:
    pairs = pairs_with(
        len(UNSURE),
        label=pa.array([1.0] * len(UNSURE), pa.float32()),
        prompt_index=pa.array(range(len(UNSURE)), pa.int32()),
        repeat=[False] * len(UNSURE),
    )
    *columns, _ = (pa.array(c, pa.float32()) for c in zip(*UNSURE, strict=True))
    schema = pa.schema([*MARGIN, *SIGMAS])
    return pairs, pa.table([pairs.table["pair_id"], *columns], schema=schema)


def test_in_the_unit_sigma_a_difference_counts_in_standard_deviations() -> None:
    _, table = unsure()
    z = np.subtract(*pair_rewards(table, "sigma"))
    expected = np.array([row[-1] for row in UNSURE], np.float32)
    finite = np.isfinite(expected)
    assert z[finite] == pytest.approx(expected[finite])
    assert not np.isfinite(z[~finite]).any()
    as_they_are = pair_rewards(table.select(MARGIN.names), "sigma")  # nothing says how sure
    for one, other in zip(pair_rewards(table), as_they_are, strict=True):
        assert np.array_equal(one, other, equal_nan=True)


def test_selection_takes_the_margin_in_the_unit_asked_for() -> None:
    pairs, table = unsure()
    z = np.array([row[-1] for row in UNSURE])
    alone = Scores({"hpsv3": table})
    chosen = fifa.select(pairs, alone, keep=3, margin_unit="sigma", margin_window=(0.3, None))
    assert chosen["signed_margin"].to_numpy() == pytest.approx(z, nan_ok=True)
    reasons = chosen["reason"].to_pylist()
    assert reasons == ["selected"] * 3 + ["outside_margin_window"] + ["not_scored"] * 2
    plain = table.select(MARGIN.names)
    both = fifa.select(pairs, Scores({"hpsv3": table, "x": plain}), keep=3, margin_unit="sigma")
    other = pair_rewards(plain)
    label = np.ones(len(z))
    expected = committee([pair_rewards(table, "sigma"), other], label).signed_margin
    assert both["signed_margin"].to_numpy() == pytest.approx(expected, nan_ok=True)
    with pytest.raises(FifaError, match="says how sure it is: x"):
        fifa.select(pairs, Scores({"x": plain}), margin_unit="sigma")
