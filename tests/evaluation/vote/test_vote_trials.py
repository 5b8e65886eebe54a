"""What a voter is asked."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from vote_worlds import make_run

from fifa.evaluation.vote.ballot import Ballot
from fifa.evaluation.vote.comparisons import CHECK, COMPARE, GAP, REPEAT, draw_trials

SHARES = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 1.0])


@given(st.integers(1, 60), SHARES, SHARES, st.integers(0, 10**6))
def test_every_comparison_once_and_the_promised_repeats_and_checks(
    n: int, repeats: float, checks: float, seed: int
) -> None:
    keys = [f"k{i}" for i in range(n)]
    trials = draw_trials(keys, np.random.default_rng(seed), repeats=repeats, checks=checks)
    types = Counter(trial.type for trial in trials)
    assert sorted(trial.comparison for trial in trials if trial.type == COMPARE) == sorted(keys)
    assert abs(types[CHECK] - checks * n) < 1
    assert types[REPEAT] <= repeats * n + 1
    assert types[REPEAT] > repeats * n - 1 - GAP  # those of the last few trials have no room
    first = {
        trial.comparison: (i, trial) for i, trial in enumerate(trials) if trial.type == COMPARE
    }
    again = [trial.comparison for trial in trials if trial.type == REPEAT]
    assert len(set(again)) == len(again)
    for i, trial in enumerate(trials):
        if trial.type == REPEAT:
            at, shown = first[trial.comparison]
            assert i - at >= min(GAP, max(1, n // 2))
            assert trial.left == 1 - shown.left


def test_order_and_sides_are_each_voters_own() -> None:
    keys = [f"k{i}" for i in range(400)]
    orders = [draw_trials(keys, np.random.default_rng([0, voter])) for voter in (1, 2)]
    assert orders[0] == draw_trials(keys, np.random.default_rng([0, 1]))
    assert [c.comparison for c in orders[0]] != [c.comparison for c in orders[1]]
    sides = [{trial.comparison: trial.left for trial in order} for order in orders]
    assert 0.4 < np.mean(list(sides[0].values())) < 0.6
    assert 0.4 < np.mean([sides[0][key] == sides[1][key] for key in keys]) < 0.6
    assert (
        0.4
        < np.mean(
            [
                trial.left
                for trial in draw_trials(keys, np.random.default_rng(3), checks=1.0)
                if trial.type == CHECK
            ]
        )
        < 0.6
    )


def test_repeats_and_checks_come_early_as_well_as_late() -> None:
    trials = draw_trials(
        [f"k{i}" for i in range(200)], np.random.default_rng(0), repeats=0.1, checks=0.1
    )
    for part in (trials[:60], trials[-60:]):
        types = Counter(trial.type for trial in part)
        assert types[REPEAT] >= 4
        assert types[CHECK] >= 4


def deck(ballot: Ballot, voter: str) -> list[tuple[str, int]]:
    """What a new voter of this ballot is dealt."""
    ballot.register(voter, None)
    place = ballot.store.place(voter)
    trials = []
    while place.trials:
        trials.append((place.trials[0].comparison, place.trials[0].left))
        assert ballot.store.vote(voter, place.position, "tie")
        place = ballot.store.place(voter)
    return trials


def test_the_deck_is_a_secret_of_the_run_and_a_restart_deals_the_same(tmp_path) -> None:
    run = make_run(tmp_path / "run", prompts=8, seeds=2, size=16)
    fresh = shutil.copytree(run, tmp_path / "fresh")
    first = deck(Ballot(run), "one")
    again = shutil.copytree(run, tmp_path / "again")  # with its votes
    dealt = deck(Ballot(run), "two")
    assert dealt == deck(Ballot(again), "two")
    assert dealt != first
    deck(Ballot(fresh), "one")
    assert dealt != deck(Ballot(fresh), "two")
    keys = Ballot(run).asked
    for voter in range(400):  # what an earlier version dealt, by a seed and a number
        trials = draw_trials(keys, np.random.default_rng([0, voter]))
        guess = [(trial.comparison, trial.left) for trial in trials]
        assert guess not in (first, dealt)
