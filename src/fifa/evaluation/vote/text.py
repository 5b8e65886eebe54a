"""The results of a vote as text, for the terminal."""

from __future__ import annotations

from fifa.evaluation.vote.results import PASS, Results, Verdict, Voter
from fifa.formatting import number, percent, shorten


def results_text(results: Results) -> str:
    """The results in a few lines."""
    if not results.voters:
        return "nobody has voted yet"
    lines = [line for verdict in results.verdicts for line in _verdict(verdict)]
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


def _verdict(verdict: Verdict) -> list[str]:
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
