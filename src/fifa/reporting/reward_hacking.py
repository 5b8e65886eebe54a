"""Signs of reward hacking: what a model that learnt to please a scorer looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fifa.evaluation.models import BASE
from fifa.evaluation.win_rates import Comparison, Level
from fifa.formatting import number, percent, shorten, signed


class Symptom(NamedTuple):
    """Something that reward hacking would show as, looked for in one checkpoint."""

    model: str
    name: str
    finding: str  # in words and numbers
    present: bool  # the interval leaves out "no change"


def symptoms(
    tuned: list[str],
    comparisons: Sequence[Comparison],
    diversity: Sequence[Level],
    colours: Mapping[str, Sequence[Level]],
) -> list[Symptom]:
    """What reward hacking looks like, looked for in every checkpoint of ``tuned``."""
    found = []
    for model in tuned:
        own = [c for c in comparisons if c.ours == model and c.theirs == BASE and c.wins.n]
        picked = [c.wins.share for c in own if c.scale.picked]
        independent = [c for c in own if not c.scale.picked]
        if picked and independent:
            worst = min(independent, key=lambda c: c.wins.share)
            text = (
                f"{percent(max(picked))} by the scorer that picked the data, "
                f"{percent(worst.wins.share)} by {shorten(worst.scale.name, 40)}"
            )
            lost = any(c.wins.high < 0.5 for c in independent)
            found.append(Symptom(model, "gain that independent scorers do not see", text, lost))
        named = [("less varied images of one prompt", diversity)]
        named += [(f"shift in {name}", levels) for name, levels in colours.items()]
        for name, levels in named:
            for level in levels:
                if level.model == model and (shift := level.shift) is not None:
                    up = shift.low > 0 and levels is not diversity
                    found.append(Symptom(model, name, _change(level), shift.high < 0 or up))
    return found


def _change(level: Level) -> str:
    """``+0.031 (+0.021 to +0.042), 0.41 of the base's standard deviation``."""
    shift = level.shift
    assert shift is not None
    text = f"{signed(shift.mean)} ({signed(shift.low)} to {signed(shift.high)})"
    if level.spread > 0:
        text += f", {number(abs(shift.mean) / level.spread)} of the base's standard deviation"
    return text
