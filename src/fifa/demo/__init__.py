"""The main job on a few hundred preference pairs that the package ships."""

from __future__ import annotations

from pathlib import Path

from fifa.console import say
from fifa.pipeline import filter_pairs
from fifa.recipe import Read, Recipe, Score, Select

PAIRS = Path(__file__).with_name("pairs.parquet")


def demo(out: Path) -> Path:
    """Filter the shipped pairs into ``out`` and return the report's path.

    The pairs are drawn by ``scripts/draw_demo.py``: shapes instead of generated images, a
    simulated annotator, and two simulated reward models as score columns.
    """
    say("360 preference pairs in the Pick-a-Pic schema: drawn shapes, a simulated annotator")
    recipe = Recipe(
        read=Read(source=str(PAIRS)),
        score=Score(margin=("column:sim_a_0,sim_a_1", "column:sim_b_0,sim_b_1")),
        select=Select(keep=0.1, per_prompt=3),
    )
    return filter_pairs(recipe, out).folder / "report.html"
