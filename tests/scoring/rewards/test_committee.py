import itertools
from dataclasses import asdict

import numpy as np
import pytest

from fifa.scoring.rewards import metrics
from fifa.scoring.rewards.metrics import measure


def drawn(n=400, members=3, seed=0):
    """People who err in a tenth of the pairs, members who see the truth through noise."""
    draw = np.random.default_rng(seed)
    truth = draw.normal(0, 2, n)
    label = np.where(draw.random(n) < 0.1, truth < 0, truth > 0).astype(float)
    label[::17] = 0.5
    rewards = {
        f"member {m}": ((truth + draw.normal(0, 1, n)) * 10**m, np.zeros(n)) for m in range(members)
    }
    return rewards, label, np.arange(n) // 4


def test_each_member_is_measured_against_the_people():
    rewards, label, prompt = drawn()
    rewards["member 1"][0][5] = np.nan
    report = metrics.committee_report(rewards, label, prompt).to_pylist()
    assert [row["scorer"] for row in report] == list(rewards)
    for row, (first, _) in zip(report, rewards.values(), strict=True):
        alone = measure(first / row["temperature"], label, prompt)
        assert {name: row[name] for name in asdict(alone)} == asdict(alone)
    assert [row["pairs"] for row in report] == [400, 399, 400]
    # a scale of its own is no fault
    assert max(row["ece"] for row in report) < 0.08
    assert report[2]["ece_raw"] > 0.1


def test_dissent_is_counted_as_by_hand():
    rewards, label, _ = drawn()
    table = metrics.dissent(rewards, label).to_pydict()
    signs = [np.sign(first - second) for first, second in rewards.values()]
    counts, wrong, n = [0, 0, 0, 0], [0, 0, 0], 0
    for i, y in enumerate(label):
        if y == 0.5:
            continue
        n += 1
        against = [(s[i] > 0) != (y > 0.5) for s in signs]
        counts[sum(against)] += 1
        wrong = [w + a for w, a in zip(wrong, against, strict=True)]
    assert table["pairs"] == counts
    assert table["share"] == pytest.approx([c / n for c in counts])
    expected = [0.0] * 4
    for errs in itertools.product((0, 1), repeat=3):
        p = np.prod([w / n if e else 1 - w / n for w, e in zip(wrong, errs, strict=True)])
        expected[sum(errs)] += p
    assert table["expected"] == pytest.approx(expected)
    assert table["share"][3] > 5 * table["expected"][3]  # wrong labels, not members


def test_pairs_that_all_contradict_are_the_mislabelled_ones():
    rewards, label, _ = drawn()
    table = metrics.likely_mislabelled(rewards, label).to_pydict()
    signs = np.array([np.sign(first - second) for first, second in rewards.values()])
    person = np.sign(label - 0.5)
    expected = {i for i in range(len(label)) if person[i] and (signs[:, i] == -person[i]).all()}
    assert set(table["row"]) == expected
    assert table["doubt"] == sorted(table["doubt"], reverse=True)
    assert min(table["doubt"]) > 0
    for row, y, p in zip(table["row"], table["label"], table["committee"], strict=True):
        assert y == label[row]
        assert (p > 0.5) != (y > 0.5)


def test_most_of_the_likely_mislabelled_are():
    draw = np.random.default_rng(3)
    truth = draw.normal(0, 2, 2000)
    flipped = draw.random(2000) < 0.05
    label = (np.where(flipped, -truth, truth) > 0).astype(float)
    rewards = {str(m): (truth + draw.normal(0, 0.7, 2000), np.zeros(2000)) for m in range(3)}
    rows = metrics.likely_mislabelled(rewards, label)["row"].to_numpy()
    assert flipped[rows].mean() > 0.7
    assert flipped[rows[:40]].all()


def test_what_cannot_be_judged_is_left_out():
    rewards = {"a": (np.array([1, np.nan, 0, 1, 1.0]), np.zeros(5))}
    label = np.array([0, 0, 0, 0.5, 1.0])
    assert metrics.dissent(rewards, label)["pairs"].to_pylist() == [1, 1]
    assert metrics.likely_mislabelled(rewards, label)["row"].to_pylist() == [0]


def test_no_pairs_and_no_members_give_empty_tables():
    none = np.empty(0)
    assert metrics.likely_mislabelled({"a": (none, none)}, none).num_rows == 0
    assert metrics.likely_mislabelled({}, np.ones(3)).num_rows == 0
    assert metrics.dissent({"a": (none, none)}, none)["pairs"].to_pylist() == [0, 0]
    assert metrics.committee_report({}, np.ones(3), np.arange(3)).num_rows == 0


def test_three_who_err_on_their_own_tell_how_many_labels_are_wrong():
    draw = np.random.default_rng(5)
    n, wrong, inside = 3000, 0.15, 0
    for _ in range(20):
        truth = draw.choice([-1.0, 1.0], n)
        people, *members = (np.where(draw.random(n) < e, -truth, truth) for e in (wrong, 0.2, 0.35))
        rewards = {str(m): (d, 0 * d) for m, d in enumerate(members)}
        prompt = np.arange(n) // 3
        found = metrics.wrong_labels(rewards, (people + 1) / 2, prompt)
        # (1 - 2 e)^2 = c_p1 c_p2 / c_12, from counts
        one, other = members
        c1, c2, both = (np.mean(a) for a in (people * one, people * other, one * other))
        assert found.share == pytest.approx((1 - np.sqrt(c1 * c2 / both)) / 2)
        assert found.pairs == n
        inside += found.low <= wrong <= found.high
    assert inside >= 17
    # turning labels round adds what it should
    turned = np.where(draw.random(n) < 0.2, -people, people)
    more = metrics.wrong_labels(rewards, (turned + 1) / 2, prompt)
    assert more.share == pytest.approx(wrong + 0.2 * (1 - 2 * wrong), abs=0.04)
    # one member, too few pairs, members who know nothing
    guess = {"a": (draw.normal(size=n), np.zeros(n)), "b": (draw.normal(size=n), np.zeros(n))}
    few = {name: (a[:30], b[:30]) for name, (a, b) in rewards.items()}
    assert metrics.wrong_labels({"0": rewards["0"]}, (people + 1) / 2, prompt) is None
    assert metrics.wrong_labels(few, (people[:30] + 1) / 2, prompt[:30]) is None
    assert metrics.wrong_labels({**guess, "c": guess["a"][::-1]}, (people + 1) / 2, prompt) is None
