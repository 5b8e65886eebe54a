"""Raters: what grades prompts by the rubric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa


class Rater(Protocol):
    """Anything that grades prompts."""

    @property
    def name(self) -> str:
        """A short name for people and file names."""

    @property
    def identity(self) -> dict[str, object]:
        """JSON that changes whenever the ratings could: part of every fingerprint."""

    def rate(self, prompts: Sequence[str]) -> pa.Table:
        """`fifa.scoring.rubric.RATINGS`, row by row with ``prompts``."""
