"""`fifa demo`: the whole road in the built-in small world, from feedback to a verdict."""

from __future__ import annotations

from pathlib import Path

from fifa.config import Demo
from fifa.demo.settings import ARMS

__all__ = ["ARMS", "Demo", "demo"]


def demo(out: str | Path, knobs: Demo | None = None) -> Path:
    """Filter, train, evaluate and report in the small world `fifa.moji`; returns the report.

    Parameters
    ----------
    out
        The run folder. A demo that was stopped goes on where it was.
    knobs
        What is compared, and how much of it; None is the default.

    Raises
    ------
    FifaError
        For an arm that there is not, and a folder with other things in it.
    """
    from fifa.demo.story import tell_story

    return tell_story(Path(out), knobs or Demo())
