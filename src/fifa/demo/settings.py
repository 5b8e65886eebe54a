"""Every constant of the demo."""

from __future__ import annotations

from typing import Any

from fifa.config import Demo, Read, Recipe, Score, Select
from fifa.moji.family import CLIP, FEEDBACK

NO_GATES: dict[str, Any] = {
    "unsafe_flags": (),
    "drop_nonsense": False,
    "drop_duplicates": False,
    "min_agreement": None,
}
# What each arm of `fifa.config.Demo` keeps: the recipe's selection with these knobs changed. Only
# `fifa` looks at scores; the others take feedback as it comes, ties aside.
ARMS: dict[str, dict[str, Any]] = {
    "fifa": {},
    "margin": {"alpha": 0.0, "gamma": 0.0},
    "random": {"strategy": "random", **NO_GATES},
    "full": {"strategy": "random", "keep": 1.0, "per_prompt": None, **NO_GATES},
}


def recipe_of(knobs: Demo) -> Recipe:
    """How the feedback is filtered: the default, but no choice that the proxy contradicts."""
    return Recipe(
        read=Read(source=str(FEEDBACK)),
        score=Score(margin=(f"proxy@clip:{CLIP}",)),
        select=Select(
            keep=knobs.keep, per_prompt=knobs.per_prompt, min_agreement=1.0, seed=knobs.seed
        ),
    )
