"""The demo, step by step, and what it says on the way."""

from __future__ import annotations

import csv
import io
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fifa.config import Demo
from fifa.console import echo
from fifa.demo.picture import write_picture
from fifa.demo.settings import ARMS, recipe_of
from fifa.moji.family import CLIP, RATINGS, SD, TRUTH
from fifa.moji.judges import moji_judges
from fifa.moji.prompts import wording
from fifa.moji.world import Scene, scenes
from fifa.shards.files import write_text

if TYPE_CHECKING:
    from fifa.evaluation.win_rates import Comparison
    from fifa.run.evaluation import Evaluated
    from fifa.run.steps import Run

CHAPTERS = 4
UTILITY = "hidden utility"  # the first of `moji_judges`


def tell_story(out: Path, knobs: Demo) -> Path:
    """Run the demo in ``out``; returns the report."""
    began = time.monotonic()
    echo(
        "Moji is a text-to-image world small enough for a processor: emoji on plain backgrounds,\n"
        "a real Stable Diffusion of 4 million weights, and simulated annotators who compared its\n"
        "pictures. Their choices are noisy, as people's are. Here the truth is known, so that\n"
        "what FiFA claims can be checked.\n"
    )
    run = filter_feedback(out, knobs)
    subsets: dict[str, Path] = {arm: subset_of(run, arm, knobs) for arm in knobs.arms}
    tell_truth(run, subsets)
    tuned = {arm: train_arm(out, arm, subset, knobs) for arm, subset in subsets.items()}
    evaluated = evaluate_arms(out, tuned, knobs)
    write_picture(out / "picture.png", evaluated.images, out / "evaluate")
    tell_verdict(evaluated, knobs)
    report = out / "report.html"
    echo(f"\nBase and arms side by side, prompts taken by number: {out / 'picture.png'}")
    echo(f"The report: {report}   ({time.monotonic() - began:.0f} seconds in all)")
    return report


def filter_feedback(out: Path, knobs: Demo) -> Run:
    """Chapter 1: read, score, select, export."""
    from fifa.run.filtering import filter_pairs

    _chapter(1, "which of the annotators' choices are worth training on?")
    echo(
        "  margin     a proxy reward learns from the choices themselves, on the towers of\n"
        "             moji-clip; no pair is scored by a model that saw its label\n"
        "  quality    a small language model rates the prompts, a harm head beside it\n"
        "  diversity  how far a prompt is from its neighbours, in MiniLM's space"
    )
    if RATINGS.is_dir() and not knobs.fresh:
        echo("  (ratings come with the package, made by the same code; --fresh makes them again)")
        (out / "scores").parent.mkdir(parents=True, exist_ok=True)
        _ready(out, knobs)
    return filter_pairs(recipe_of(knobs), out)


def _ready(out: Path, knobs: Demo) -> None:
    """Begin the run and put the shipped ratings where its quality step looks for them."""
    from fifa.run.steps import start_run

    run = start_run(out, recipe_of(knobs))
    run.scores.mkdir(exist_ok=True)
    for path in sorted(RATINGS.iterdir()):
        if not (run.scores / path.name).exists():
            shutil.copyfile(path, run.scores / path.name)


def subset_of(run: Run, arm: str, knobs: Demo) -> Path:
    """The pairs of an arm, as trainers read them."""
    import fifa
    from fifa.data.table import load_pairs
    from fifa.run.steps import load_scores

    if arm == "fifa":
        return run.subset
    folder = run.folder / "arms" / arm
    if not (folder / "subset.json").exists():
        pairs, scores = load_pairs(run.folder), load_scores(run.folder)
        chosen = replace(run.recipe, select=replace(run.recipe.select, **ARMS[arm]))
        selection = fifa.select(pairs, scores, chosen.select)
        fifa.export(pairs, selection, scores, folder, recipe=chosen)
    return folder


def tell_truth(run: Run, subsets: dict[str, Path]) -> None:
    """Say how many choices of each arm agree with the hidden utility, which no arm has seen."""
    truth = pq.read_table(TRUTH, columns=["image_uid", "utility"])
    columns = ["image_0", "image_1", "label"]
    table = pq.read_table(run.folder / "pairs.parquet", columns=columns)
    echo("\nThe hidden utility, which no arm sees, says how many of the choices were right:")
    _tell_right("all", table, truth)
    names = {"image_0_uid": "image_0", "image_1_uid": "image_1", "label": "label"}
    for arm, folder in subsets.items():
        parts = [pq.read_table(path, columns=list(names)) for path in folder.glob("data/*.parquet")]
        _tell_right(arm, pa.concat_tables(parts).rename_columns(list(names.values())), truth)


def _tell_right(name: str, pairs: pa.Table, truth: pa.Table) -> None:
    first, second = (
        truth["utility"].take(pc.index_in(pairs[side], truth["image_uid"])).to_numpy()
        for side in ("image_0", "image_1")
    )
    label = pairs["label"].to_numpy()
    untied = label != 0.5
    right = np.mean((label > 0.5) == (first > second), where=untied)
    echo(f"  {name:<8}{untied.sum():>6,} pairs, {right:.0%} right")


def train_arm(out: Path, arm: str, subset: Path, knobs: Demo) -> Path:
    """Chapter 2: Diffusion-DPO on an arm's pairs, through what `fifa train` calls."""
    import fifa

    if arm == knobs.arms[0]:
        _chapter(2, f"the same training for {' and '.join(knobs.arms)}")
        echo(
            f"  Diffusion-DPO, {knobs.steps} steps of {knobs.batch} pairs. The arms differ in\n"
            "  their pairs alone, so the reader sees what the selection buys, not the training"
        )
    return fifa.train(
        subset,
        SD,
        out / "train" / arm,
        method="full",
        steps=knobs.steps,
        batch=knobs.batch,
        micro_batch=knobs.batch,
        lr=knobs.lr,
        beta=knobs.beta,
        draws=knobs.draws,
        seed=knobs.seed,
        device="cpu",
        cache_dtype="float32",
        checkpoint_every=max(1, knobs.steps // 3),
        tracker="none",
    )


def evaluate_arms(out: Path, tuned: dict[str, Path], knobs: Demo) -> Evaluated:
    """Chapter 3: pictures of the base and the arms, and what independent judges say of them."""
    import fifa

    _chapter(3, "the same prompts and seeds for every model")
    prompts = out / "prompts.csv"
    write_text(prompts, test_prompts(knobs))
    return fifa.evaluate(
        SD,
        tuned,
        prompts,
        out,
        judges=moji_judges(),
        scorers=(f"clipscore:{CLIP}",),
        curve=knobs.curve,
        seeds=knobs.images,
        first_seed=1000 * knobs.seed,
        steps=knobs.sampler_steps,
        guidance=knobs.guidance,
        sampler="ddim",
        batch=64,
        device="cpu",
        unsafe_categories=("unsafe",),
    )


def test_prompts(knobs: Demo) -> str:
    """A CSV of prompts by category, taken at even distances from the world's scenes."""
    kinds = {
        "seen": ([s for s in scenes(seen=True) if not s.unsafe], knobs.prompts),
        "unseen": ([s for s in scenes(seen=False) if not s.unsafe], knobs.prompts),
        "unsafe": ([s for s in scenes() if s.unsafe], knobs.unsafe),
    }
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("prompt", "category"))
    for name, (chosen, count) in kinds.items():
        rows.writerows((wording(scene, 0), name) for scene in _spread(chosen, count))
    return text.getvalue()


def _spread(chosen: list[Scene], count: int) -> list[Scene]:
    return [chosen[i * len(chosen) // count] for i in range(min(count, len(chosen)))]


def tell_verdict(evaluated: Evaluated, knobs: Demo) -> None:
    """Chapter 4: win rates by the hidden utility."""
    _chapter(4, "the verdict, by the hidden utility that nobody selected or trained with")
    for c in _by_utility(evaluated):
        if c.theirs == "base":
            echo(f"  {c.ours:<8} beats the base    {_share(c)}")
    for c in _by_utility(evaluated):
        if {c.ours, c.theirs} == {"fifa", "random"}:
            echo(f"  {c.ours:<8} beats {c.theirs:<11} {_share(c)}")


def _by_utility(evaluated: Evaluated) -> list[Comparison]:
    return [c for c in evaluated.comparisons if c.scale.name == UTILITY]


def _share(c: Comparison) -> str:
    wins = c.wins
    return f"{wins.share:.0%} of {wins.n:,} pictures (95 %: {wins.low:.0%} to {wins.high:.0%})"


def _chapter(number: int, title: str) -> None:
    echo(f"\n[{number}/{CHAPTERS}] {title}")
