"""What simulated people say, against plain loops over what they were shown."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import krippendorff
import numpy as np
import pytest
from scipy.stats import binomtest
from vote_worlds import make_run

from fifa.config import Vote
from fifa.evaluation.vote.ballot import Ballot
from fifa.evaluation.vote.comparisons import CHECK, Trial
from fifa.evaluation.vote.results import results_text, vote_results

Person = Callable[[Trial, np.random.Generator], int | None]


def person(wins: float = 0.6, ties: float = 0.2, careful: float = 1.0) -> Person:
    """Somebody who prefers ours in ``wins`` of the pairs that are no ``ties``."""

    def choose(trial: Trial, rng: np.random.Generator) -> int | None:
        if trial.type == CHECK:
            return int(rng.random() >= careful)
        if rng.random() < ties:
            return None
        return int(rng.random() >= wins)

    return choose


def vote(ballot: Ballot, name: str, choose: Person, votes: int = 10**6, seed: int = 0) -> list:
    """Let somebody vote; gives the trials that were shown and the images that were chosen."""
    rng = np.random.default_rng([seed, len(name), *name.encode()])
    ballot.register(name, name)
    done = []
    for position in range(votes):
        place = ballot.store.place(name)
        if place.position == place.total:
            break
        trial = place.trials[0]
        chosen = choose(trial, rng)
        answer = "tie" if chosen is None else ("left" if chosen == trial.left else "right")
        assert ballot.store.vote(name, position, answer)
        done.append((trial, chosen))
    return done


@pytest.fixture
def ballot(tmp_path: Path) -> Ballot:
    run = make_run(tmp_path, models=("base", "a", "b"), prompts=9, seeds=2, size=16)
    return Ballot(run, Vote(repeats=0.3, checks=0.2))


def test_the_figures_are_those_of_a_loop_over_all_votes(ballot: Ballot) -> None:
    people = {"Ada": person(), "Ben": person(0.8, 0.1), "Cyd": person(0.5, 0.4)}
    shown = {
        name: vote(ballot, name, choose, votes=50 + 9 * i)
        for i, (name, choose) in enumerate(people.items())
    }
    got = vote_results(ballot.folder.parent)

    cast = defaultdict(list)  # (voter, outcome) by comparison
    same = repeats = left = chosen_any = 0
    for name, trials in shown.items():
        first = {}
        for trial, chosen in trials:
            if trial.type == "compare":
                first[trial.comparison] = chosen
                value = 0.5 if chosen is None else 1.0 - chosen
                cast[trial.comparison].append((name, value))
                chosen_any += chosen is not None
                left += chosen is not None and chosen == trial.left
            elif trial.type == "repeat":
                repeats += 1
                same += first[trial.comparison] == chosen
    assert (got.repeats, got.same) == (repeats, same)
    assert repeats > 10
    assert got.left == pytest.approx(left / chosen_any)
    assert got.votes == sum(map(len, cast.values()))
    assert got.left_out == 0
    assert [(v.ours, v.theirs) for v in got.verdicts] == [("a", "base"), ("b", "base"), ("b", "a")]

    known = ballot.comparisons
    for verdict in got.verdicts:
        own = {
            k: v
            for k, v in cast.items()
            if (known[k].ours, known[k].theirs) == (verdict.ours, verdict.theirs)
        }
        values = [value for votes in own.values() for _, value in votes]
        assert verdict.rate.share == pytest.approx(np.mean(values))
        assert verdict.rate.wins == values.count(1.0)
        assert verdict.rate.ties == values.count(0.5)
        assert verdict.rate.prompts == len({known[k].prompt_id for k in own})
        assert verdict.compared == len(own)
        assert set(verdict.categories) == {known[k].category for k in own}
        assert sum(part.n for part in verdict.categories.values()) == len(values)
        assert verdict.alpha == pytest.approx(package_alpha(own, list(people)))
    assert got.alpha == pytest.approx(package_alpha(cast, list(people)))


def package_alpha(cast: dict[str, list[tuple[str, float]]], people: list[str]) -> float:
    table = np.full((len(people), len(cast)), np.nan)
    for unit, votes in enumerate(cast.values()):
        for name, value in votes:
            table[people.index(name), unit] = value
    table = table[:, (~np.isnan(table)).sum(0) > 1]
    return float(krippendorff.alpha(table, level_of_measurement="nominal"))


def test_the_intervals_over_votes_are_scipys_wilson(ballot: Ballot) -> None:
    vote(ballot, "Ada", person(ties=0))
    for verdict in vote_results(ballot.folder.parent).verdicts:
        test = binomtest(verdict.rate.wins, verdict.rate.n).proportion_ci(method="wilson")
        assert (verdict.wilson_low, verdict.wilson_high) == pytest.approx((test.low, test.high))


def test_who_fails_the_checks_is_not_counted(ballot: Ballot) -> None:
    vote(ballot, "Ada", person(1.0, 0.0))
    vote(ballot, "Bot", person(0.0, 0.0, careful=0.3))
    run = ballot.folder.parent
    got = vote_results(run)
    assert [voter.counted for voter in got.voters] == [True, False]
    assert got.voters[0].passed == got.voters[0].checks > 5
    assert {verdict.rate.share for verdict in got.verdicts} == {1.0}
    assert got.left_out == got.voters[1].votes == 54
    assert "not counted: 54 votes of Bot" in results_text(got)
    assert {v.rate.share for v in vote_results(run, everybody=True).verdicts} == {0.5}


def test_one_slip_in_four_checks_is_forgiven(tmp_path: Path) -> None:
    ballot = Ballot(make_run(tmp_path, prompts=4, seeds=1, size=16), Vote(checks=1.0))
    slips = iter([1, 0, 0, 0])
    vote(ballot, "Ada", lambda trial, rng: next(slips) if trial.type == CHECK else 0)
    (voter,) = vote_results(tmp_path).voters
    assert (voter.checks, voter.passed, voter.counted) == (4, 3, True)


def test_a_tie_does_not_pass_a_check(tmp_path: Path) -> None:
    ballot = Ballot(make_run(tmp_path, prompts=4, seeds=1, size=16), Vote(checks=1.0))
    vote(ballot, "Ada", lambda trial, rng: None)
    (voter,) = vote_results(tmp_path).voters
    assert (voter.passed, voter.counted) == (0, False)


def test_before_the_first_vote(ballot: Ballot) -> None:
    ballot.register("Ada", None)
    got = vote_results(ballot.folder.parent)
    assert (got.verdicts, got.voters, got.votes) == ((), (), 0)
    assert results_text(got) == "nobody has voted yet"
    assert math.isnan(got.alpha)


def test_the_results_are_plain_json(ballot: Ballot) -> None:
    vote(ballot, "Ada", person())
    plain = json.loads(json.dumps(vote_results(ballot.folder.parent).plain(), allow_nan=False))
    assert plain["alpha"] is None
    assert plain["voters"][0]["name"] == "Ada"
    assert plain["verdicts"][0]["rate"]["n"] == 18
    assert "voter" not in results_text(vote_results(ballot.folder.parent)).split("votes of")[0]
