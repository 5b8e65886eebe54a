"""Margins from generators' names: known strengths come back, no pair's own vote leaks into them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import fifa
from fifa.config import Select
from fifa.errors import FifaError
from fifa.scoring.arena import fit_strengths, gap_after_choice
from fifa.scoring.margin import margin_scores
from fifa.scoring.table import BLIND, score_facts
from fifa.selection.trusted import check_trust, differences


def votes(strength, prompts, each, seed, ties=0.0, image=0.0):
    """Pairs of different generators' images, by Bradley and Terry's model, and their prompts."""
    rng = np.random.default_rng(seed)
    g, n = len(strength), prompts * each
    zero = rng.integers(0, g, n)
    one = (zero + rng.integers(1, g, n)) % g
    prompt = np.repeat(np.arange(prompts), each)
    own = rng.normal(size=(prompts, g)) * image  # how well this prompt suits a generator
    gap = strength[zero] - strength[one] + own[prompt, zero] - own[prompt, one]
    label = (rng.random(n) < 1 / (1 + np.exp(-gap))).astype(float)
    label[rng.random(n) < ties] = 0.5
    return zero, one, label, prompt


def source(folder, zero, one, label, prompt, names):
    table = pa.table(
        {
            "prompt": [f"a scene of {p}" for p in prompt],
            "image_0": [f"{i}-0.png" for i in range(len(zero))],
            "image_1": [f"{i}-1.png" for i in range(len(zero))],
            "label": label,
            "model_0": [names[g] for g in zero],
            "model_1": [names[g] for g in one],
        }
    )
    path = folder / "votes.parquet"
    pa.parquet.write_table(table, path)
    columns = {name: name for name in ("prompt", "image_0", "image_1", "label")}
    return fifa.read_pairs(path, columns=columns)


@pytest.mark.parametrize(("ties", "image"), [(0.0, 0.0), (0.2, 1.5)])
def test_strengths_come_back_and_their_intervals_cover(ties, image):
    draw = np.random.default_rng(5)
    inside = []
    for world in range(6):
        strength = draw.normal(size=8)
        strength -= strength.mean()
        truth = strength
        if ties or image:  # what infinitely many votes would say is not the strength any more
            truth = fit_strengths(*votes(strength, 8000, 5, 100 + world, ties, image), 8).value
        for seed in range(8):
            found = fit_strengths(*votes(strength, 200, 5, seed, ties, image), 8)
            assert np.corrcoef(found.value, truth)[0, 1] > (0.7 if image else 0.9)
            deviation = np.sqrt(np.diag(found.covariance))
            inside.append(np.abs(found.value - truth) < 1.96 * deviation)
    assert 0.9 < np.mean(inside) < 0.99


def test_what_is_not_known_is_shrunk_and_what_is_not_connected_has_no_gap():
    zero, one = np.array([0] * 60 + [1, 3, 3]), np.array([1] * 60 + [2, 4, 4])
    label = np.array([1.0] * 45 + [0.0] * 15 + [0, 1, 1])
    found = fit_strengths(zero, one, label, np.arange(63), 6)
    assert found.connected.tolist() == [True, True, True, False, False, False]
    assert np.isnan(found.value[3:]).all()
    gaps = found.gaps(np.array([0, 1, 0, 3, 0]), np.array([1, 0, 0, 4, 5]))
    assert gaps[0] == -gaps[1] == pytest.approx(np.log(3), abs=0.35) and gaps[2] == 0
    assert np.isnan(gaps[3:]).all()
    raw = found.value[0] - found.value[2]
    assert 0 < found.gaps(np.array([0]), np.array([2]))[0] < 0.95 * raw  # of one vote


def test_the_gap_after_the_choice_is_the_mean_of_what_the_person_may_have_seen():
    rng = np.random.default_rng(0)
    for gap in (-2.0, 0.0, 1.5):
        seen = rng.logistic(gap, 1, 400_000)
        for label, part in ((1.0, seen[seen > 0]), (0.0, seen[seen < 0])):
            expected = gap_after_choice(np.array([gap]), np.array([label]))
            assert expected == pytest.approx(part.mean(), abs=0.02)
    assert gap_after_choice(np.array([0.0]), np.array([0.5])) == 0
    assert np.isfinite(gap_after_choice(np.array([-1e9, 1e9]), np.array([1.0, 0.0]))).all()


def test_a_margin_by_names_opens_no_image_and_has_not_seen_its_own_vote(tmp_path):
    strength = np.array([1.5, 0.5, 0.0, -0.5, -1.5])
    drawn = votes(strength, 150, 4, 1)
    names = [*"abcde"]
    pairs = source(tmp_path, *drawn, names)
    table = margin_scores(pairs, "arena", tmp_path)
    gap, label = table[BLIND].to_numpy(), pairs.table["label"].to_numpy()
    difference = table["reward_0"].to_numpy() - table["reward_1"].to_numpy()
    assert ((difference > 0) == (label > 0.5)).all()  # it knows who won
    assert difference == pytest.approx(gap_after_choice(gap, label), abs=1e-5)
    truth = strength[drawn[0]] - strength[drawn[1]]
    assert np.corrcoef(gap, truth)[0, 1] > 0.97
    facts = score_facts(table)
    assert list(facts["strengths"]) == names and facts["apart"] == []
    assert [p.name for p in tmp_path.glob("margin-arena-*")] == [facts["file"]]
    # Another vote on one prompt changes nothing about its own pairs' gaps
    turned = np.where(drawn[3] == 0, 1 - drawn[2], drawn[2])
    again = margin_scores(source(tmp_path, *drawn[:2], turned, drawn[3], names), "arena", tmp_path)
    own = drawn[3] == 0
    assert (again[BLIND].to_numpy()[own] == gap[own]).all()
    assert (again[BLIND].to_numpy()[~own] != gap[~own]).any()
    # and trust is measured without the choice, whether the margin has it or not
    named = fifa.score(pairs, ["arena:names"], "none", "none")
    both = [differences(pairs, fifa.score(pairs, spec, "none", "none")) for spec in ("arena",)]
    assert both[0]["arena"] == pytest.approx(differences(pairs, named)["arena:names"], abs=1e-5)
    trust = check_trust(pairs, named, Select(), "here")
    assert trust is not None and 0.6 < trust.accuracy.share < 0.85


def test_pairs_of_votes_without_any_order_are_near_chance(tmp_path):
    pairs = source(tmp_path, *votes(np.zeros(4), 200, 5, 3), [*"abcd"])
    scores = fifa.score(pairs, "arena", "none", "none")
    with pytest.raises(FifaError, match=r"(?s)near chance here.*--anyway"):
        check_trust(pairs, scores, Select(), "RUN")
    assert check_trust(pairs, scores, Select(anyway=True), "RUN") is not None
    assert check_trust(pairs, scores, Select(strategy="random"), "RUN") is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "which generator made"),
        ([f"g{i}" for i in range(600)], "600 names of generators"),
        (["x"], "there is one prompt"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path, names, message):
    n = 600 if names is None else len(names)
    zero = np.arange(n)
    pairs = source(tmp_path, zero, (zero + 1) % n, np.ones(n), zero, names or ["x"] * n)
    if names is None:
        table = pairs.table.drop_columns(["model_0", "model_1"])
        pairs = type(pairs)(table, pairs.prompts, origin=pairs.origin)
    with pytest.raises(FifaError, match=message):
        margin_scores(pairs, "arena")
