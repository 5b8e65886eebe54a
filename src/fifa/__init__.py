"""FiFA: filter human feedback data for aligning text-to-image models.

Three lines do what a command does::

    pairs = fifa.read_pairs("feedback.parquet")
    scores = fifa.score(pairs, margin="column:hpsv2_0,hpsv2_1")
    selection = fifa.select(pairs, scores, keep=0.005)

`export` then writes what trainers read, `filter_pairs` does all of it in a run folder, `train`
aligns a model with what was kept, and `evaluate` compares it with what it came from.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fifa.errors import FifaError
from fifa.evaluate import evaluate
from fifa.score import score  # these packages share their function's name: bound here,
from fifa.select import select  # before anything else could bind the package itself
from fifa.train import train

if TYPE_CHECKING:
    from fifa.pairs.read import read_pairs
    from fifa.pairs.table import Pairs
    from fifa.pipeline import filter_pairs
    from fifa.recipe import Recipe
    from fifa.score.table import Scores
    from fifa.select.export import export, rebuild

__version__ = "0.1.0"
__all__ = [
    "FifaError",
    "Pairs",
    "Recipe",
    "Scores",
    "evaluate",
    "export",
    "filter_pairs",
    "read_pairs",
    "rebuild",
    "score",
    "select",
    "train",
]

# Imported when first used, so that `import fifa` and `fifa --help` are quick.
_HOMES = {
    "Pairs": "fifa.pairs.table",
    "Recipe": "fifa.recipe",
    "Scores": "fifa.score.table",
    "export": "fifa.select.export",
    "filter_pairs": "fifa.pipeline",
    "read_pairs": "fifa.pairs.read",
    "rebuild": "fifa.select.export",
}


def __getattr__(name: str) -> object:
    """A public name, from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fifa' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
