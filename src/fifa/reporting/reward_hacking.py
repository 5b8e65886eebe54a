"""Signs of reward hacking: what a model that learnt to please a scorer looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fifa.evaluation.models import BASE
from fifa.evaluation.win_rates import Comparison, Level
from fifa.formatting import number, percent, shorten, signed


@dataclass(frozen=True)
class Sign:
    """A sign of reward hacking that was looked for in one checkpoint.

    Parameters
    ----------
    model
        The checkpoint.
    what
        What was looked at.
    found
        In words and numbers.
    warn
        Whether it is there: the interval leaves out "no change".
    """

    model: str
    what: str
    found: str
    warn: bool


def signs(
    tuned: list[str],
    found: Sequence[Comparison],
    diversity: Sequence[Level],
    looks: Mapping[str, Sequence[Level]],
) -> list[Sign]:
    """What reward hacking looks like, looked for in every checkpoint."""
    told = []
    for model in tuned:
        own = [c for c in found if c.ours == model and c.theirs == BASE and c.wins.n]
        picked = [c for c in own if c.scale.picked]
        free = [c for c in own if not c.scale.picked]
        if picked and free:
            high, low = max(c.wins.share for c in picked), min(c.wins.share for c in free)
            lost = [c for c in free if c.wins.high < 0.5]
            worst = min(free, key=lambda c: c.wins.share)
            text = (
                f"{percent(high)} by the scorer that picked the data, {percent(low)} by "
                f"{shorten(worst.scale.name, 40)}"
            )
            told.append(Sign(model, "gain that independent scorers do not see", text, bool(lost)))
        told += [
            Sign(model, "less varied images of one prompt", _change(level), level.shift.high < 0)
            for level in diversity
            if level.model == model and level.shift is not None
        ]
        told += [
            Sign(model, f"shift in {name}", _change(level), not _still(level))
            for name, own_levels in looks.items()
            for level in own_levels
            if level.model == model and level.shift is not None
        ]
    return told


def _still(level: Level) -> bool:
    """Whether the interval of the shift from the base holds 0."""
    return level.shift is None or level.shift.low <= 0 <= level.shift.high


def _change(level: Level) -> str:
    """``+0.031 (+0.021 to +0.042), 0.41 of the base's standard deviation``."""
    shift = level.shift
    assert shift is not None
    text = f"{signed(shift.mean)} ({signed(shift.low)} to {signed(shift.high)})"
    if level.spread > 0:
        text += f", {number(abs(shift.mean) / level.spread)} of the base's standard deviation"
    return text
