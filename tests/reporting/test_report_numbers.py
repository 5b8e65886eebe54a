import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from report_runs import make_run
from sklearn.decomposition import PCA

from fifa.data.table import load_pairs
from fifa.errors import FifaError
from fifa.reporting import numbers
from fifa.reporting.page import read_log, write_report
from fifa.scoring.rewards.metrics import agreement
from fifa.selection.table import load_selection
from fifa.shards.files import sealed_line, take_rows, write_table

MARGINS = hnp.arrays(
    np.float32,
    st.integers(0, 300),
    elements=st.one_of(st.floats(-4, 4, width=32), st.sampled_from([0.0, float("nan")])),
)


@given(MARGINS)
def test_the_curve_is_the_agreement_among_the_largest_margins(signed):
    curve = numbers.agreement_curve(signed)
    known = sorted((float(m) for m in signed if math.isfinite(m)), key=abs, reverse=True)
    if len(known) < numbers.LEAST:
        assert curve is None
        return
    assert curve["n"][0].as_py() == numbers.LEAST
    assert curve["n"][-1].as_py() == len(known)
    for row in curve.to_pylist():
        n = row["n"]
        # equal margins may stand in any order: only a cut between different ones is determined
        if n < len(known) and abs(known[n - 1]) == abs(known[n]):
            continue
        expected = agreement(np.array(known[:n]))
        assert (row["share"], row["low"], row["high"]) == pytest.approx(expected[:3])
        assert row["fraction"] == n / len(known)


@given(MARGINS, st.integers(0, 2**32 - 1))
def test_a_histogram_counts_every_finite_value(values, seed):
    kept = np.random.default_rng(seed).random(len(values)) < 0.5
    found = numbers.histogram(values, kept)
    known = np.isfinite(values)
    if not known.any():
        assert found is None
        return
    assert found.before.sum() == pytest.approx(1)
    assert found.after.sum() == pytest.approx(float((known & kept).any()))
    assert found.median_before == pytest.approx(float(np.median(values[known])))


def test_values_beyond_the_edges_are_in_the_outer_bins():
    values = np.concatenate([np.linspace(0, 1, 5000), [1e6, -1e6]])
    found = numbers.histogram(values, np.ones(len(values), bool))
    assert found.edges[0] >= -1
    assert found.edges[-1] <= 2
    assert found.before.sum() == pytest.approx(1)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(-5, 5) | st.just(float("nan"))), max_size=60),
    st.integers(1, 5),
)
def test_first_by_takes_the_smallest_key_of_each_prompt(pairs, n):
    prompt = np.array([p for p, _ in pairs], np.int32)
    key = np.array([k for _, k in pairs], np.float32)
    rows = numbers.first_by(np.arange(len(pairs)), key, prompt, n)
    order = sorted(range(len(pairs)), key=lambda i: (math.isnan(key[i]), key[i], i))
    expected = {}
    for i in order:
        expected.setdefault(prompt[i], i)
    assert rows == list(expected.values())[:n]


def test_first_by_looks_at_few_of_many_rows():
    key = np.random.default_rng(0).permutation(100_000).astype(np.int32)
    rows = numbers.first_by(np.arange(100_000), key, np.arange(100_000), 3)
    assert key[rows].tolist() == [0, 1, 2]


@given(st.lists(st.integers(0, 99), max_size=20))
def test_rows_are_taken_in_the_order_asked_across_row_groups(rows):
    import io

    words = pa.array([f"w{i}" for i in range(100)]).dictionary_encode()
    sink = io.BytesIO()
    table = pa.table({"n": np.arange(100), "word": words})
    pq.write_table(table, sink, row_group_size=7)
    taken = take_rows(sink, rows)
    assert taken["n"].to_pylist() == rows
    assert taken["word"].to_pylist() == [f"w{i}" for i in rows]
    assert take_rows(sink, rows, ["n"]).column_names == ["n"]


def test_the_map_is_that_of_principal_components():
    rng = np.random.default_rng(3)
    z = rng.normal(size=(300, 12)) * np.linspace(3, 0.5, 12) + 1
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    prompt_map = numbers.prompt_map(z, z[:50])
    pca = PCA(2).fit(z.astype(np.float64))
    theirs = pca.transform(z)
    for i in (0, 1):
        assert abs(np.corrcoef(prompt_map.before[:, i], theirs[:, i])[0, 1]) == pytest.approx(
            1, abs=1e-4
        )
    assert prompt_map.explained == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-4)
    distances = 1 - z[:50] @ z[:50].T
    assert prompt_map.distance_after == pytest.approx(
        distances[~np.eye(50, dtype=bool)].mean(), abs=1e-5
    )


def test_too_few_prompts_have_no_map():
    assert numbers.prompt_map(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)) is None


def test_rows_are_drawn_alike_every_time():
    assert numbers.draw_rows(5, 10).tolist() == [0, 1, 2, 3, 4]
    drawn = numbers.draw_rows(10_000, 50)
    assert drawn.tolist() == numbers.draw_rows(10_000, 50).tolist()
    assert len(set(drawn)) == 50
    assert (np.diff(drawn) > 0).all()


def test_rejected_rows_are_counted_by_reason_with_the_first_of_them():
    table = pa.table(
        {"file": ["a", "b", "a", "a"], "row": [3, 1, 4, 9], "reason": ["x", "y", "x", "x"]}
    )
    assert numbers.count_rejected(table, examples=2) == [
        numbers.Rejected("x", 3, ("a, row 3", "a, row 4")),
        numbers.Rejected("y", 1, ("b, row 1",)),
    ]
    assert [entry.reason for entry in numbers.count_rejected(table, most=1)] == ["x"]


def test_kinds_of_harm_are_counted_a_pair_of_two_for_both():
    flags = pa.chunked_array([["weapons", "drugs,weapons", "drugs,nonsense", None, "weapons"]])
    found = numbers.count_harm(flags, ("weapons", "drugs", "hate"))
    assert [(entry.reason, entry.number) for entry in found] == [
        ("unsafe: weapons", 3),
        ("unsafe: drugs", 2),
    ]


def test_the_log_counts_the_lines_it_cannot_read_and_leaves_the_report_out(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{"step": "read", "seconds": 1.5}, {"step": "report", "seconds": 2}]
    text = "".join(sealed_line(line) for line in lines)
    path.write_text(
        text + text.replace("1.5", "2.5").partition("\n")[0] + '\n["odd"]\n{"step": "sel'
    )
    steps, broken = read_log(path)
    assert [entry["step"] for entry in steps] == ["read"]
    assert broken == 3  # one was changed, one is no object, one was cut short


def test_a_run_without_a_selection_is_refused(tmp_path):
    with pytest.raises(FifaError, match="nothing has been selected"):
        load_selection(tmp_path)


def test_the_columns_are_those_of_the_tables(tmp_path):
    codes = make_run(tmp_path, pairs=60, keep=10)
    columns = numbers.columns_of(load_pairs(tmp_path).table, load_selection(tmp_path))
    assert len(columns.reason) == 60
    assert columns.kept.sum() == 10
    np.testing.assert_array_equal(columns.kept, codes == 0)
    np.testing.assert_array_equal(columns.because("selected"), columns.kept)
    assert (columns.rank[columns.kept] > 0).all()


def test_a_selection_of_other_pairs_is_refused(tmp_path):
    make_run(tmp_path, pairs=60, keep=10)
    path = tmp_path / "selection.parquet"
    write_table(path, pq.read_table(path)[:-1])
    with pytest.raises(FifaError, match="59"):
        write_report(tmp_path)


NAMES = st.sampled_from(["a", "b", "c", None])
ROWS = st.lists(
    st.tuples(NAMES, NAMES, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.booleans(), NAMES),
    min_size=1,
    max_size=30,
)


def named(rows, signed_margin):
    """A table of pairs by these generators and categories, and the page's columns of it."""
    zero, one, label, kept, category = zip(*rows, strict=True)
    names = {"model_0": zero, "model_1": one, "category": category}
    kind = pa.dictionary(pa.int32(), pa.string())
    pairs = pa.table({name: pa.array(values).cast(kind) for name, values in names.items()})
    nothing = np.full(len(rows), np.nan, np.float32)
    whole = np.zeros(len(rows), np.int32)
    label, kept = np.array(label, np.float32), np.array(kept)
    margins = {"margin": nothing, "signed_margin": signed_margin, "quality": nothing}
    more = {"diversity": nothing, "importance": nothing, "rank": whole, "reason": whole}
    return pairs, numbers.Columns(
        **margins, **more, reasons=("selected",), kept=kept, label=label, prompt=whole
    )


@given(ROWS, st.integers(0, 9))
def test_each_generators_pairs_are_counted_as_by_hand(rows, seed):
    margin = np.random.default_rng(seed).choice([-1, 0, 2, np.nan], len(rows)).astype(np.float32)
    pairs, columns = named(rows, margin)
    single, double = numbers.by_generator(pairs, columns)
    assert sorted(group.name for group in single) == sorted({n for r in rows for n in r[:2] if n})
    for group in [*single, *double]:
        among = [
            i
            for i, row in enumerate(rows)
            if ({group.name, group.other} == set(row[:2]) if group.other else group.name in row[:2])
        ]
        assert (group.pairs, group.kept) == (len(among), sum(rows[i][3] for i in among))
        assert group.agrees == pytest.approx(agreement(margin[among]), nan_ok=True)
        won = []
        for zero, one, label, *_ in (rows[i] for i in among):
            if zero and one and zero != one:
                first = (label > 0.5) + 0.5 * (label == 0.5)
                won.append(first if zero == group.name else 1 - first)
        assert group.wins.n == len(won)
        if won:
            assert group.wins.share == pytest.approx(sum(won) / len(won))
            assert group.wins.low - 1e-9 <= group.wins.share <= group.wins.high + 1e-9
    assert sum(group.pairs for group in double) == sum(1 for row in rows if row[0] and row[1])
    categories = numbers.by_category(pairs, columns)
    assert sum(group.pairs for group in categories) == sum(1 for row in rows if row[4])


def test_aspects_are_measured_against_the_label_and_the_margin():
    rows = [("a", "b", label, True, None) for label in (1.0, 1.0, 0.0, 0.5)]
    pairs, columns = named(rows, np.array([2, -1, -3, np.nan], np.float32))
    labels = pa.array([0.9, 0.2, 0.0, 1.0], pa.float32())
    (aspect,) = numbers.by_aspects(pairs.append_column("label_taste", labels), columns)
    assert (aspect.name, aspect.labels) == ("taste", 4)
    assert (aspect.same.share, aspect.same.n) == (pytest.approx(2 / 3), 3)
    # the margin prefers images 0, 1 and 0; the aspect 0, 1 and 1
    assert (aspect.agrees.share, aspect.agrees.n) == (pytest.approx(2 / 3), 3)


def test_nothing_is_grouped_where_the_source_has_no_names():
    pairs, columns = named([("a", "b", 1.0, True, "x")], np.ones(1, np.float32))
    pairs = pairs.select([])
    assert numbers.by_generator(pairs, columns) == ([], [])
    assert numbers.by_category(pairs, columns) == numbers.by_aspects(pairs, columns) == []
