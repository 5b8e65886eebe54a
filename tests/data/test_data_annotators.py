"""Annotators' reliability: against a second implementation, and from votes in a file to labels."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from fifa.data.annotators import SMOOTHING, dawid_skene
from fifa.data.read import read_pairs
from fifa.data.table import load_pairs, save_pairs
from fifa.errors import FifaError


def by_hand(votes: list[tuple[int, int, float]]) -> dict[int, float]:
    """Dawid and Skene by loops over (pair, annotator, vote), with products of probabilities."""
    pairs = sorted({pair for pair, _, _ in votes})
    own = {pair: [(k, v) for i, k, v in votes if i == pair] for pair in pairs}
    q = {pair: sum(v for _, v in own[pair]) / len(own[pair]) for pair in pairs}
    for _ in range(2000):
        confusion = {}  # annotator -> P(says 0 | 0 is better), P(says 0 | 1 is better)
        for k in {k for _, k, _ in votes}:
            cast = [(q[i], v) for i, who, v in votes if who == k]
            weight = sum(p for p, _ in cast), sum(1 - p for p, _ in cast)
            said = sum(p * v for p, v in cast), sum((1 - p) * v for p, v in cast)
            confusion[k] = [
                (s + SMOOTHING) / (w + 2 * SMOOTHING) for s, w in zip(said, weight, strict=True)
            ]
        prior = sum(q.values()) / len(q)
        for pair in pairs:
            odds = [prior, 1 - prior]
            for k, v in own[pair]:
                for side in (0, 1):
                    p = confusion[k][side]
                    odds[side] *= p**v * (1 - p) ** (1 - v)
            q[pair] = odds[0] / sum(odds)
    return q


def drawn(seed: int, pairs: int, right: list[float], share: float):
    """(pair, annotator, vote) of annotators who are right so often, and what is true."""
    rng = np.random.default_rng(seed)
    truth = rng.random(pairs) < 0.5
    votes = [
        (i, k, float(truth[i] == (rng.random() < p)))
        for i in range(pairs)
        for k, p in enumerate(right)
        if rng.random() < share
    ]
    return votes, truth


def test_it_is_the_model_that_loops_give() -> None:
    votes, _ = drawn(3, 40, [0.9, 0.8, 0.55, 0.3], 0.6)
    votes += [(0, 4, 0.5), (1, 4, 0.5)]  # an annotator of two ties
    number = {pair: i for i, pair in enumerate(sorted({pair for pair, _, _ in votes}))}
    pair, annotator, vote = (np.array(column) for column in zip(*votes, strict=True))
    found = dawid_skene(np.array([number[p] for p in pair]), annotator, vote.astype(float))
    expected = by_hand(votes)
    assert len(expected) == len(found.label)
    for key, i in number.items():
        assert math.isclose(found.label[i], expected[key], abs_tol=1e-4)


def test_weighed_labels_are_better_than_counted_ones_and_the_worst_are_known() -> None:
    right = [0.95, 0.9, 0.55, 0.5, 0.5]
    votes, truth = drawn(0, 600, right, 1.0)
    pair, annotator, vote = (np.array(column) for column in zip(*votes, strict=True))
    found = dawid_skene(pair, annotator, vote)
    counted = np.bincount(pair, vote) / 5
    assert ((found.label > 0.5) == truth).mean() > ((counted > 0.5) == truth).mean() + 0.05
    assert found.right == pytest.approx(right, abs=0.06)


def written(path: Path, votes: list[tuple[int, int, float]]) -> Path:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "image_0", "image_1", "label", "annotator"])
        for pair, k, vote in votes:
            sides = [f"{pair}a.png", f"{pair}b.png"]
            if k % 2:  # some see the sides the other way round
                sides, vote = sides[::-1], 1 - vote
            rows.writerow([f"a scene {pair}", *sides, vote, f"person {k}" if k < 4 else ""])
    return path


def test_a_source_of_votes_is_weighed_and_says_so(tmp_path: Path) -> None:
    votes, truth = drawn(1, 200, [0.97, 0.9, 0.5, 0.5, 0.5], 0.8)
    path = written(tmp_path / "votes.csv", votes)
    names = {n: n for n in ("prompt", "image_0", "image_1", "label", "annotator")}
    counted = read_pairs(path, columns=names)
    weighed = read_pairs(path, columns=names, annotators="weigh")
    assert weighed.origin.fingerprint != counted.origin.fingerprint
    assert weighed.table.drop_columns("label").equals(counted.table.drop_columns("label"))
    right = []
    for pairs in (counted, weighed):
        label = pairs.table["label"].to_numpy()
        number = [int(key.removesuffix(".png")[:-1]) for key in pairs.table["image_0"].to_pylist()]
        first = [key.endswith("a.png") for key in pairs.table["image_0"].to_pylist()]
        right.append(np.mean((label > 0.5) == (truth[number] == first)))
    assert right[1] > right[0] + 0.05
    known = weighed.origin.reliability
    assert (known["annotators"], known["votes"]) == (
        5,
        len(votes),
    ) and not counted.origin.reliability
    assert {name for name, *_ in known["worst"][:3]} == {"person 2", "person 3", "(no name)"}
    save_pairs(weighed, tmp_path)
    assert load_pairs(tmp_path).origin.reliability == known


@pytest.mark.parametrize(
    ("votes", "names", "message"),
    [
        ([(0, 0, 1.0), (1, 1, 0.0), (1, 1, 1.0)], ("annotator",), "judged by two annotators"),
        ([(0, 0, 1.0), (0, 1, 0.0)], (), None),
    ],
)
def test_what_cannot_be_weighed_is_refused(tmp_path: Path, votes, names, message) -> None:
    path = written(tmp_path / "votes.csv", votes)
    columns = {n: n for n in ("prompt", "image_0", "image_1", "label", *names)}
    if message is None:
        assert len(read_pairs(path, columns=columns, annotators="weigh")) == 1
        path.write_text(path.read_text().replace("annotator", "elsewhere"))
        message = "does not say who judged"
    with pytest.raises(FifaError, match=message):
        read_pairs(path, columns=columns, annotators="weigh")
