"""FiFA: filter human feedback data for aligning text-to-image models.

Three lines do what a command does::

    pairs = fifa.read_pairs("feedback.parquet")
    scores = fifa.score(pairs, margin="column:hpsv2_0,hpsv2_1")
    selection = fifa.select(pairs, scores, keep=0.005)

`export` then writes what trainers read and `push` uploads it to the Hugging Face hub;
`filter_pairs` does all but that in a run folder, `train` trains a model on the kept pairs, and
`evaluate` compares it with its base model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fifa.errors import FifaError as FifaError

if TYPE_CHECKING:
    from fifa.config import Recipe as Recipe
    from fifa.data.read import read_pairs as read_pairs
    from fifa.data.table import Pairs as Pairs
    from fifa.run.evaluation import evaluate as evaluate
    from fifa.run.generation import generate_pairs as generate_pairs
    from fifa.run.loop import loop as loop
    from fifa.run.push import push as push
    from fifa.run.steps import filter_pairs as filter_pairs
    from fifa.run.steps import train as train
    from fifa.scoring import score as score
    from fifa.scoring.table import Scores as Scores
    from fifa.selection.choose import select as select
    from fifa.selection.export import export as export
    from fifa.selection.export import rebuild as rebuild

    __version__: str

DISTRIBUTION = "fifa-align"
# Imported when first used, so that `import fifa` and `fifa --help` are quick.
_HOMES = {
    "Pairs": "fifa.data.table",
    "Recipe": "fifa.config",
    "Scores": "fifa.scoring.table",
    "evaluate": "fifa.run.evaluation",
    "export": "fifa.selection.export",
    "filter_pairs": "fifa.run.steps",
    "generate_pairs": "fifa.run.generation",
    "loop": "fifa.run.loop",
    "push": "fifa.run.push",
    "read_pairs": "fifa.data.read",
    "rebuild": "fifa.selection.export",
    "score": "fifa.scoring",
    "select": "fifa.selection.choose",
    "train": "fifa.run.steps",
}
__all__ = ["FifaError", *_HOMES]


def __getattr__(name: str) -> object:
    """A public name, from its home; the version, which is that of the git tag it was built from."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version(DISTRIBUTION)
        except PackageNotFoundError:  # a folder of the source that is not installed
            return "0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module 'fifa' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """What is public, for completion, before any of it is imported."""
    return sorted([*__all__, "__version__"])
