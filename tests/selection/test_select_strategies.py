from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import make_embeddings, make_pairs, make_scores, permuted

from fifa.config import STRATEGIES, Select
from fifa.errors import FifaError
from fifa.scoring.table import Scores
from fifa.selection import strategies
from fifa.selection.choose import select
from fifa.selection.table import REASONS, SELECTION, reason_counts

ELIGIBLE = {"selected", "below_cutoff", "prompt_cap"}


def choose(pairs, scores, **knobs):
    return select(pairs, scores, Select(**knobs), embeddings=make_embeddings(pairs))


def rows_of(selection):
    return [{**row, "row": i} for i, row in enumerate(selection.to_pylist())]


def ranked(selection):
    """Rows of the eligible pairs, by rank."""
    eligible = [row for row in rows_of(selection) if row["rank"] is not None]
    return [row["row"] for row in sorted(eligible, key=lambda row: row["rank"])]


def naive_facility(vectors, count):
    similarity = np.maximum(vectors @ vectors.T, 0).astype(np.float64)
    covered, picks = np.zeros(len(vectors)), []
    for _ in range(count):
        gain = np.round(np.maximum(similarity - covered, 0).sum(axis=1), 4)
        gain[picks] = -1
        picks.append(int(np.argmax(gain)))
        covered = np.maximum(covered, similarity[picks[-1]])
    return picks


def naive_farthest(vectors, count):
    picks = [0]
    while len(picks) < count:
        nearest = np.round(vectors @ vectors[picks].T, 4).max(axis=1)
        nearest[picks] = np.inf
        picks.append(int(np.argmin(nearest)))
    return picks


def slow_order(strategy, pairs, selection, vectors):
    """The order of the eligible pairs by loops, from the selection's own components."""
    rows = [row for row in rows_of(selection) if row["reason"] in ELIGIBLE]
    by_importance = sorted(rows, key=lambda r: (-r["importance"], r["pair_id"]))
    if strategy in ("fifa", "consensus", "weights"):
        return [r["row"] for r in by_importance]
    if strategy in ("low", "high"):
        sign = 1 if strategy == "low" else -1
        return [r["row"] for r in sorted(rows, key=lambda r: (sign * r["margin"], r["pair_id"]))]
    if strategy == "middle":
        middle = np.float32(np.median([np.float32(r["margin"]) for r in rows]))
        far = {r["row"]: abs(np.float32(r["margin"]) - middle) for r in rows}
        return [r["row"] for r in sorted(rows, key=lambda r: (far[r["row"]], r["pair_id"]))]
    prompt = pairs.table["prompt_index"].to_pylist()
    distinct = list(dict.fromkeys(prompt[r["row"]] for r in by_importance))
    greedy = naive_facility if strategy == "facility" else naive_farthest
    picks = greedy(vectors[distinct], len(distinct))
    place = {distinct[pick]: position for position, pick in enumerate(picks)}
    turns, seen = [], Counter()
    for r in by_importance:
        p = prompt[r["row"]]
        turns.append((seen[p], place[p], r["row"]))
        seen[p] += 1
    return [row for _, _, row in sorted(turns)]


def test_every_name_has_its_function_and_its_line_in_the_docs():
    assert list(strategies.STRATEGIES) == list(STRATEGIES)
    page = Path(__file__).parents[2] / "docs" / "select.md"
    for name, line in STRATEGIES.items():
        assert f"| `{name}` | {line} |" in page.read_text("utf-8")


@pytest.mark.parametrize("coarse", [False, True], ids=["fine", "many ties"])
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "random"])
def test_pairs_are_taken_in_the_strategys_order(strategy, coarse):
    for seed in range(4):
        pairs = make_pairs(120, 15, seed)
        scores = make_scores(pairs, seed=seed, coarse=coarse)
        selection = choose(pairs, scores, strategy=strategy, keep=40)
        expected = slow_order(strategy, pairs, selection, make_embeddings(pairs))
        assert ranked(selection) == expected
        kept = [r["row"] for r in rows_of(selection) if r["status"] == "selected"]
        everything = strategy == "weights"
        assert sorted(kept) == sorted(expected if everything else expected[:40])


def test_consensus_keeps_only_pairs_on_which_all_scorers_agree_with_the_person():
    pairs = make_pairs(300, 40)
    selection = choose(pairs, make_scores(pairs, scorers=3), strategy="consensus", keep=1.0)
    kept = [r for r in rows_of(selection) if r["status"] == "selected"]
    assert kept and all(r["agreement"] == 1 for r in kept)
    assert reason_counts(selection)["contradicts_label"] > 0


def test_a_random_choice_depends_on_the_seed_and_takes_all_pairs_alike():
    pairs = make_pairs(400, 300)
    bare = Scores()
    taken = np.zeros(400)
    for seed in range(60):
        selection = choose(pairs, bare, strategy="random", keep=100, seed=seed)
        taken += np.array([s == "selected" for s in selection["status"].to_pylist()])
    eligible = sum(r["reason"] in ELIGIBLE for r in rows_of(selection))
    shares = taken[taken > 0] / 60
    assert len(shares) == eligible  # all had their turn
    assert abs(shares.mean() - 100 / eligible) < 1e-9 and shares.max() < 3 * shares.mean()


def test_soft_weights_keep_every_eligible_pair_and_have_mean_one():
    pairs = make_pairs(200, 30)
    selection = choose(pairs, make_scores(pairs), strategy="weights", keep=5)
    rows = [r for r in rows_of(selection) if r["importance"] is not None]
    assert {r["status"] for r in rows} == {"selected"}
    logistic = np.array([1 / (1 + np.exp(-r["importance"])) for r in rows])
    weight = np.array([r["weight"] for r in rows])
    np.testing.assert_allclose(weight, logistic / logistic.mean(), rtol=1e-5)
    dropped = [r["weight"] for r in rows_of(selection) if r["status"] == "dropped"]
    assert dropped and not any(dropped)


def test_a_cap_lets_the_next_prompts_in_and_names_itself_as_the_reason():
    pairs = make_pairs(300, 10)
    scores = make_scores(pairs)
    capped = choose(pairs, scores, keep=20, per_prompt=2)
    free = choose(pairs, scores, keep=20)
    prompt = pairs.table["prompt_index"].to_pylist()
    seen = Counter()
    expected = {}
    for row in ranked(free):
        expected[row] = seen[prompt[row]] >= 2
        seen[prompt[row]] += 1
    reasons = capped["reason"].to_pylist()
    assert {row for row, over in expected.items() if over} == {
        i for i, reason in enumerate(reasons) if reason == "prompt_cap"
    }
    kept = [row for row in ranked(free) if not expected[row]][:20]
    assert kept == [row for row in ranked(capped) if reasons[row] == "selected"]


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(list(STRATEGIES)),
    st.integers(0, 10_000),
    st.sampled_from(["none", "z", "rank", "robust"]),
    st.booleans(),
    st.sampled_from([None, 1, 3]),
)
def test_a_selection_does_not_depend_on_the_order_of_rows(strategy, seed, how, coarse, cap):
    pairs = make_pairs(80, 12, seed)
    scores = make_scores(pairs, scorers=1, seed=seed, coarse=coarse)
    vectors = make_embeddings(pairs)
    knobs = Select(strategy=strategy, normalize=how, keep=0.2, per_prompt=cap, seed=seed)
    try:
        one = select(pairs, scores, knobs, embeddings=vectors)
    except FifaError as error:  # a world may have no eligible pair
        assert "no pair is eligible" in error.what
        return
    assert one.schema == SELECTION and one.num_rows == len(pairs)
    assert sum(reason_counts(one).values()) == len(pairs)
    other_pairs, other_scores, other_vectors = permuted(pairs, scores, seed, vectors)
    other = select(other_pairs, other_scores, knobs, embeddings=other_vectors)
    by_id = [("pair_id", "ascending")]
    assert decoded(one).sort_by(by_id).equals(decoded(other).sort_by(by_id))


def decoded(selection):
    names = [f.with_type(pa.string()) if pa.types.is_dictionary(f.type) else f for f in SELECTION]
    return selection.cast(pa.schema(names))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_larger_keep_only_adds_pairs(strategy):
    pairs = make_pairs(150, 20)
    scores = make_scores(pairs)
    before: set[str] = set()
    for keep in (1, 7, 20, 45, 0.9, 1.0):
        selection = choose(pairs, scores, strategy=strategy, keep=keep, per_prompt=6)
        kept = {r["pair_id"] for r in rows_of(selection) if r["status"] == "selected"}
        assert before <= kept
        before = kept


def test_keep_is_a_count_or_a_share_of_all_pairs():
    pairs = make_pairs(200, 40)
    scores = make_scores(pairs)

    def kept(keep):
        return reason_counts(choose(pairs, scores, keep=keep))["selected"]

    assert [kept(1), kept(7), kept(0.1), kept(1e-9)] == [1, 7, 20, 1]


def test_a_keep_beyond_the_eligible_keeps_them_all_and_says_so(capsys):
    pairs = make_pairs(50, 10)
    selection = choose(pairs, make_scores(pairs), keep=5000)
    counts = reason_counts(selection)
    assert "below_cutoff" not in counts
    assert f"only {counts['selected']} are eligible" in capsys.readouterr().err


def test_facility_location_over_many_prompts_equals_the_naive_greedy():
    from fifa.selection.strategies import facility_location

    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(700, 8)) + 2 * rng.normal(size=(7, 8))[rng.integers(0, 7, 700)]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    assert facility_location(vectors, 60).tolist() == naive_facility(vectors, 60)


def test_prompts_that_are_all_alike_are_still_all_ordered():
    from fifa.selection.strategies import facility_location, farthest_point

    alike = np.tile(np.float32([[1, 0]]), (9, 1))
    assert sorted(facility_location(alike, 9)) == list(range(9))
    assert sorted(farthest_point(alike, 9)) == list(range(9))


@pytest.mark.parametrize("strategy", ["facility", "farthest"])
def test_greedy_strategies_say_what_they_lack(strategy, monkeypatch):
    pairs = make_pairs()
    with pytest.raises(FifaError, match="name an encoder with --diversity"):
        select(pairs, Scores(), Select(strategy=strategy))
    with pytest.raises(FifaError, match="one vector per prompt"):
        select(pairs, Scores(), Select(strategy=strategy), embeddings=np.ones((3, 2)))
    monkeypatch.setattr(strategies, "MAX_PROMPTS", 5)
    with pytest.raises(FifaError, match="too many for a greedy strategy"):
        choose(pairs, Scores(), strategy=strategy)


@pytest.mark.parametrize(
    "knobs",
    [
        {"strategy": "fifa"},
        {"strategy": "weights"},
        {"strategy": "high"},
        {"strategy": "consensus"},
        {"strategy": "random", "min_agreement": 0.5},
        {"strategy": "random", "margin_window": (0.1, None)},
    ],
    ids=str,
)
def test_what_needs_a_margin_scorer_says_so_without_one(knobs):
    with pytest.raises(FifaError, match="no margin scorer"):
        choose(make_pairs(), Scores(), **knobs)


def test_quality_and_diversity_alone_are_enough_for_an_importance():
    pairs = make_pairs()
    scores = make_scores(pairs, scorers=0)
    selection = choose(pairs, scores, keep=3, alpha=1, gamma=0, normalize="none")
    rows = [r for r in rows_of(selection) if r["importance"] is not None]
    assert all(r["importance"] == r["quality"] and r["margin"] is None for r in rows)


def test_no_eligible_pair_is_an_error_that_counts_the_reasons():
    pairs = make_pairs(20, 5)
    at = pairs.table.schema.get_field_index("label")
    ties = pairs.table.set_column(at, "label", pa.array([0.5] * 20, pa.float32()))
    with pytest.raises(FifaError, match="tie: 20"):
        select(type(pairs)(table=ties, prompts=pairs.prompts), make_scores(pairs))
    with pytest.raises(FifaError, match="no pairs to select from"):
        select(type(pairs)(table=ties[:0], prompts=pairs.prompts), Scores())


def test_score_tables_in_another_order_or_of_more_pairs_are_aligned_by_id():
    pairs = make_pairs(80, 12)
    scores = make_scores(pairs)
    expected = choose(pairs, scores, keep=10)
    _, shuffled, _ = permuted(pairs, scores, seed=3)
    assert choose(pairs, shuffled, keep=10).equals(expected)
    fewer = Scores(
        margins={name: table.slice(1) for name, table in scores.margins.items()},
        quality=scores.quality,
        diversity=scores.diversity,
    )
    gone = choose(pairs, fewer, keep=10)
    assert gone["margin"][0].as_py() is None
    assert gone["reason"][0].as_py() in (*REASONS[3:8], "not_scored")
