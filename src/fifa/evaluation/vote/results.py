"""What the votes say: win rates, agreement among voters, and whom not to count."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from fifa.evaluation.stats import WinRate, alpha, by_category, win_rate
from fifa.evaluation.vote.comparisons import CHECK, COMPARE, REPEAT, Comparison
from fifa.evaluation.vote.store import Snapshot, Vote, open_store
from fifa.formatting import number, percent, shorten
from fifa.scoring.rewards.metrics import wilson

PASS = 0.75  # the share of attention checks that a voter has to pass to be counted


@dataclass(frozen=True)
class Voter:
    """One voter.

    Parameters
    ----------
    number, name
        The name is None if none was given.
    votes, ties, left, right
        On comparisons shown for the first time, and what they were.
    checks, passed
        Attention checks, and how often the intact image was chosen.
    repeats, same
        Comparisons shown again, and how often the answer was the same.
    seconds
        The median time between two votes; NaN for fewer than two.
    counted
        False if fewer than `PASS` of the checks were passed: then no vote counts.
    """

    number: int
    name: str | None
    votes: int
    ties: int
    left: int
    right: int
    checks: int
    passed: int
    repeats: int
    same: int
    seconds: float
    counted: bool


@dataclass(frozen=True)
class Verdict:
    """What people say of two models.

    Parameters
    ----------
    ours, theirs
        The models; the rate is that of ours.
    rate
        The win rate over votes, with its bootstrap interval and test over prompts.
    wilson_low, wilson_high
        Wilson's 95 % interval, which takes every vote for independent of the others.
    alpha
        Krippendorff's alpha among the voters on these comparisons.
    compared
        Comparisons with a vote that counts.
    categories
        The win rate of each category; empty without categories.
    """

    ours: str
    theirs: str
    rate: WinRate
    wilson_low: float
    wilson_high: float
    alpha: float
    compared: int
    categories: dict[str, WinRate]


@dataclass(frozen=True)
class Results:
    """What all votes say.

    Parameters
    ----------
    verdicts
        A pair of models each, in the order of the index.
    voters
        Everybody who voted.
    alpha
        Krippendorff's alpha among the voters who count, over all comparisons.
    votes, left_out
        Votes on comparisons that count, and those of voters who do not.
    repeats, same
        Of the voters who count.
    left
        The share of the left image among their votes that are no ties; near 0.5 unless
        somebody clicks without looking.
    """

    verdicts: tuple[Verdict, ...]
    voters: tuple[Voter, ...]
    alpha: float
    votes: int
    left_out: int
    repeats: int
    same: int
    left: float

    @property
    def counted(self) -> int:
        """How many voters count."""
        return sum(voter.counted for voter in self.voters)

    def plain(self) -> dict[str, Any]:
        """As dictionaries and lists, for JSON: NaN becomes None."""
        plain: dict[str, Any] = json.loads(TypeAdapter(Results).dump_json(self))
        return plain


def vote_results(
    run: str | Path, *, everybody: bool = False, database: str | None = None
) -> Results:
    """What the votes of a run say so far.

    Parameters
    ----------
    run
        A run folder that people voted on.
    everybody
        Count voters who failed their attention checks as well.
    database
        As for `open_store`.

    Raises
    ------
    FifaError
        Where nobody has voted yet.
    """
    return count_votes(open_store(run, database).read(), everybody=everybody)


def count_votes(said: Snapshot, *, everybody: bool = False) -> Results:
    """`vote_results` of what a file of votes says."""
    comparisons, votes, names = said.comparisons, said.votes, said.voters
    of_voter = defaultdict[int, list[Vote]](list)
    for vote in votes:
        of_voter[vote.voter].append(vote)
    voters = [_voter(n, names[n], own, everybody) for n, own in sorted(of_voter.items())]
    counted = counted_votes(votes, voters)
    of_models: dict[tuple[str, str], list[Vote]] = {
        (one.ours, one.theirs): [] for one in comparisons.values()
    }
    for vote in counted:
        one = comparisons[vote.trial.comparison]
        of_models[one.ours, one.theirs].append(vote)
    good = [voter for voter in voters if voter.counted]
    left, right = sum(voter.left for voter in good), sum(voter.right for voter in good)
    return Results(
        verdicts=tuple(
            _verdict(*models, own, comparisons) for models, own in of_models.items() if own
        ),
        voters=tuple(voters),
        alpha=_alpha(counted),
        votes=len(counted),
        left_out=sum(voter.votes for voter in voters if not voter.counted),
        repeats=sum(voter.repeats for voter in good),
        same=sum(voter.same for voter in good),
        left=left / (left + right) if left + right else float("nan"),
    )


def counted_votes(votes: Iterable[Vote], voters: Iterable[Voter]) -> list[Vote]:
    """The votes that count: on comparisons shown for the first time, of voters who count."""
    good = {voter.number for voter in voters if voter.counted}
    return [vote for vote in votes if vote.trial.type == COMPARE and vote.voter in good]


def outcome(vote: Vote) -> float:
    """1 where ours was preferred, 0 where theirs was, 0.5 for a tie."""
    return 0.5 if vote.chosen is None else float(vote.chosen == 0)


def _voter(number: int, name: str | None, votes: list[Vote], everybody: bool) -> Voter:
    first = {vote.trial.comparison: vote for vote in votes if vote.trial.type == COMPARE}
    answers = Counter(vote.answer for vote in first.values())
    checks = [vote for vote in votes if vote.trial.type == CHECK]
    passed = sum(vote.chosen == 0 for vote in checks)  # of a check, 0 is the intact image
    repeats = [vote for vote in votes if vote.trial.type == REPEAT]
    same = sum(vote.chosen == first[vote.trial.comparison].chosen for vote in repeats)
    times = [datetime.fromisoformat(vote.at) for vote in votes]
    gaps = [(after - before).total_seconds() for before, after in pairwise(times)]
    return Voter(
        number=number,
        name=name,
        votes=len(first),
        ties=answers["tie"],
        left=answers["left"],
        right=answers["right"],
        checks=len(checks),
        passed=passed,
        repeats=len(repeats),
        same=same,
        seconds=median(gaps) if gaps else float("nan"),
        counted=everybody or passed >= PASS * len(checks),
    )


def _verdict(
    ours: str, theirs: str, votes: list[Vote], comparisons: dict[str, Comparison]
) -> Verdict:
    shown = [comparisons[vote.trial.comparison] for vote in votes]
    outcomes = np.array([outcome(vote) for vote in votes])
    prompts = [one.prompt_id for one in shown]
    categories = [one.category for one in shown]
    known = any(category is not None for category in categories)
    rate = win_rate(outcomes, prompts)
    low, high = wilson(rate.wins + rate.ties / 2, rate.n)
    return Verdict(
        ours=ours,
        theirs=theirs,
        rate=rate,
        wilson_low=low,
        wilson_high=high,
        alpha=_alpha(votes),
        compared=len({one.key for one in shown}),
        categories=by_category(outcomes, categories, prompts) if known else {},
    )


def _alpha(votes: Sequence[Vote]) -> float:
    """Krippendorff's alpha of ours, theirs and tie, a comparison being a unit."""
    units = {key: i for i, key in enumerate({vote.trial.comparison: 0 for vote in votes})}
    people = {voter: i for i, voter in enumerate({vote.voter: 0 for vote in votes})}
    table = np.full((len(people), len(units)), np.nan)
    for vote in votes:
        table[people[vote.voter], units[vote.trial.comparison]] = outcome(vote)
    return alpha(table)


def results_text(results: Results) -> str:
    """The results in a few lines."""
    if not results.voters:
        return "nobody has voted yet"
    lines = [line for verdict in results.verdicts for line in _verdict_lines(verdict)]
    lines.append(
        f"{results.votes:,} votes of {results.counted} voters; agreement among them "
        f"(Krippendorff's alpha) {number(results.alpha)}"
    )
    if results.repeats:
        lines.append(
            f"shown again: {results.same} of {results.repeats} answers were the same "
            f"({percent(results.same / results.repeats)})"
        )
    out = [voter for voter in results.voters if not voter.counted]
    if out:
        lines.append(
            f"not counted: {results.left_out:,} votes of {', '.join(map(voter_name, out))}, who "
            f"passed fewer than {percent(PASS)} of their checks"
        )
    return "\n".join(lines)


def voter_name(voter: Voter) -> str:
    """The voter's name, or number."""
    return shorten(voter.name, 60) if voter.name else f"voter {voter.number}"


def _verdict_lines(verdict: Verdict) -> list[str]:
    rate = verdict.rate
    lines = [
        f"{shorten(verdict.ours)} against {shorten(verdict.theirs)}: preferred in "
        f"{percent(rate.share)} of {rate.n:,} votes ({rate.wins:,} won, {rate.ties:,} ties, "
        f"{rate.losses:,} lost) on {verdict.compared:,} comparisons",
        f"  95 % interval {percent(verdict.wilson_low)} to {percent(verdict.wilson_high)} over "
        f"votes (Wilson), {percent(rate.low)} to {percent(rate.high)} over {rate.prompts:,} "
        f"prompts (bootstrap); p = {number(rate.p)} (exact sign flips of prompts)",
    ]
    if len(verdict.categories) > 1:
        lines += [
            f"  {shorten(name, 40)}: {percent(own.share)} of {own.n:,}"
            for name, own in verdict.categories.items()
        ]
    return lines
