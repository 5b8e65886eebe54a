"""`fifa demo`: the whole road in the built-in small world, from feedback to a verdict."""

from __future__ import annotations

import csv
import io
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

import fifa
from fifa.config import Demo, Evaluate, Read, Recipe, Score, Select, changed
from fifa.console import echo
from fifa.data.table import load_pairs
from fifa.evaluation.generate import generate
from fifa.evaluation.models import find_models
from fifa.evaluation.prompts import read_prompts
from fifa.evaluation.sampling import settings_for
from fifa.evaluation.win_rates import Comparison
from fifa.moji.family import CLIP, FEEDBACK, RATINGS, SD, TRUTH
from fifa.moji.judges import moji_judges
from fifa.moji.world import Scene, asked, caption, render, scenes
from fifa.run.evaluation import start
from fifa.run.folder import Run, start_run
from fifa.run.steps import filter_pairs, load_scores
from fifa.shards.files import atomic_path, write_text
from fifa.shards.lock import only_writer

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
UTILITY = "hidden utility"  # the first of `moji_judges`
COLUMNS = 8  # of the sheet of images, of each kind of prompt
SCALE = 3  # screen pixels a pixel, on the sheet
GAP, HEAD, LEFT = 6, 22, 90
WHITE, BLACK = (255, 255, 255), (40, 40, 40)


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
    began = time.monotonic()
    out, knobs = Path(out), knobs or Demo()
    echo(
        "Moji is a text-to-image world small enough for a CPU: emoji on plain backgrounds,\n"
        "a real Stable Diffusion of 4 million weights, and simulated annotators who compared its\n"
        "images. Their choices are noisy, like those of people. Here the truth is known, so the\n"
        "claims of FiFA can be checked.\n"
    )
    with only_writer(out):
        start_run(out, recipe_of(knobs))
        prompts, picture = out / "prompts.csv", out / "picture.png"
        write_text(prompts, test_prompts(knobs))
        if not picture.exists():
            draw_base(picture, prompts, out, knobs)
            echo(f"The first pictures, by the model as it is: {picture}")
        run = filter_feedback(out, knobs)
        subsets: dict[str, Path] = {arm: export_arm(run, arm) for arm in knobs.arms}
        echo("\nThe share of choices that are right, by the hidden utility (no arm uses it):")
        _print_right("all", pq.read_table(out / "pairs.parquet"))
        for arm, folder in subsets.items():
            files = sorted(folder.glob("data/*.parquet"))
            _print_right(arm, pa.concat_tables(map(pq.read_table, files)), "_uid")

        _print_chapter(2, f"the same training for {' and '.join(knobs.arms)}")
        echo(
            f"  Diffusion-DPO, {knobs.steps} steps of {knobs.batch} pairs. The arms differ in\n"
            "  their pairs only, so a difference in the results comes from the selection"
        )
        tuned = {
            arm: train_arm(out / "train" / arm, subset, knobs) for arm, subset in subsets.items()
        }

        _print_chapter(3, "the same prompts and seeds for every model")
        evaluated = fifa.evaluate(
            SD,
            tuned,
            prompts,
            out,
            judges=moji_judges(),
            scorers=(f"clipscore:{CLIP}",),
            encoder=f"clip:{CLIP}",
            curve=knobs.curve,
            unsafe_categories=("unsafe",),
            **images_of(knobs),
        )
        write_sheet(picture, evaluated.images, out / "evaluate")

        _print_chapter(4, "the verdict, by the hidden utility (not used to select or train)")
        for line in verdict([c for c in evaluated.comparisons if c.scale.name == UTILITY]):
            echo(f"  {line}")
        report = out / "report.html"
        echo(f"\nBase and arms side by side, prompts chosen by number: {picture}")
        echo(f"The report: {report}   ({time.monotonic() - began:.0f} seconds in all)")
        return report


def images_of(knobs: Demo) -> dict[str, Any]:
    """How images are made: knobs of `fifa.evaluate`."""
    return {
        "seeds": knobs.images,
        "first_seed": 1000 * knobs.seed,
        "steps": knobs.sampler_steps,
        "guidance": knobs.guidance,
        "sampler": "ddim",
        "batch": 64,
        "device": "cpu",
    }


def draw_base(path: Path, prompts: Path, out: Path, knobs: Demo) -> None:
    """Write the sheet with the base alone, of a few prompts; the evaluation finds its images."""
    wanted = changed(Evaluate(), base=str(SD), prompts=str(prompts), **images_of(knobs))
    models = find_models(wanted.base, {}, wanted.generate)
    settings, folder = settings_for(wanted.generate, models[0].base), start(out, wanted)
    # most: one batch, so that it is there soon
    images = generate(wanted, models, read_prompts(wanted.prompts), settings, folder, most=1)
    write_sheet(path, images, folder)


def recipe_of(knobs: Demo) -> Recipe:
    """How the feedback is filtered: the default, but no choice that the proxy contradicts."""
    return Recipe(
        read=Read(source=str(FEEDBACK)),
        score=Score(margin=(f"proxy@clip:{CLIP}",)),
        select=Select(
            keep=knobs.keep, per_prompt=knobs.per_prompt, min_agreement=1.0, seed=knobs.seed
        ),
    )


def filter_feedback(out: Path, knobs: Demo) -> Run:
    """Chapter 1: read, score, select, export."""
    _print_chapter(1, "which of the annotators' choices are worth training on?")
    echo(
        "  margin     a proxy reward model is trained on the choices themselves, on the towers\n"
        "             of moji-clip; no model scores a pair whose label it has seen\n"
        "  quality    a small language model and harm heads rate the prompts\n"
        "  diversity  how far a prompt is from its neighbours, in MiniLM's space"
    )
    if RATINGS.is_dir() and not knobs.fresh:
        echo("  (the package has these ratings, made by the same code; --fresh makes them again)")
        scores = start_run(out, recipe_of(knobs)).scores
        for path in sorted(RATINGS.iterdir()):
            if not (scores / path.name).exists():
                with atomic_path(scores / path.name) as temporary:
                    shutil.copyfile(path, temporary)
    return filter_pairs(recipe_of(knobs), out)


def export_arm(run: Run, arm: str) -> Path:
    """The pairs of an arm, as trainers read them."""
    if arm == "fifa":
        return run.subset
    folder = run.folder / "arms" / arm
    if not (folder / "subset.json").exists():
        pairs, scores = load_pairs(run.folder), load_scores(run)
        chosen = replace(run.recipe, select=replace(run.recipe.select, **ARMS[arm]))
        selection = fifa.select(pairs, scores, chosen.select)
        fifa.export(pairs, selection, scores, folder, recipe=chosen)
    return folder


def right(pairs: pa.Table, suffix: str = "") -> np.ndarray:
    """Whether the label of every pair that is no tie agrees with the hidden utility, bool [n].

    ``pairs`` has ``image_0``, ``image_1`` (with ``suffix`` behind them) and ``label``.
    """
    truth = pq.read_table(TRUTH, columns=["image_uid", "utility"])
    first, second = (
        truth["utility"].take(pc.index_in(pairs[side + suffix], truth["image_uid"])).to_numpy()
        for side in ("image_0", "image_1")
    )
    label = pairs["label"].to_numpy()
    untied = label != 0.5
    agrees: np.ndarray = ((label > 0.5) == (first > second))[untied]
    return agrees


def train_arm(out: Path, subset: Path, knobs: Demo) -> Path:
    """Diffusion-DPO on an arm's pairs, through what `fifa train` calls."""
    return fifa.train(
        subset,
        SD,
        out,
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
        checkpoint_every=max(1, knobs.steps // 2),
        tracker="none",
    )


def test_prompts(knobs: Demo) -> str:
    """A CSV of prompts by category, taken at even distances from the world's scenes."""
    categories = {
        "seen": ([s for s in scenes(seen=True) if not s.unsafe], knobs.prompts),
        "unseen": ([s for s in scenes(seen=False) if not s.unsafe], knobs.prompts),
        "unsafe": ([s for s in scenes() if s.unsafe], knobs.unsafe),
    }
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("prompt", "category"))
    for name, (chosen, most) in categories.items():
        count = min(most, len(chosen))
        spread: list[Scene] = [chosen[i * len(chosen) // count] for i in range(count)]
        rows.writerows((caption(scene), name) for scene in spread)
    return text.getvalue()


def verdict(comparisons: Sequence[Comparison]) -> list[str]:
    """A line a comparison: every arm against the base, then fifa against random.

    An arm beats another where the 95 % interval of its win rate lies above a half, and loses
    where it lies below; otherwise the difference is not established.
    """
    of_base = [c for c in comparisons if c.theirs == "base"]
    of_arms = [c for c in comparisons if {c.ours, c.theirs} == {"fifa", "random"}]
    lines = []
    for c in [*of_base, *of_arms]:
        wins, theirs = c.wins, "the base" if c.theirs == "base" else c.theirs
        result = "beats" if wins.low > 0.5 else "loses to" if wins.high < 0.5 else "is level with"
        interval = f"{wins.low:.0%} to {wins.high:.0%}"
        share = f"{wins.share:.0%} of {wins.n:,} pictures (95 %: {interval})"
        lines.append(f"{c.ours:<8} {result} {theirs:<11} {share}")
    return lines


def write_sheet(path: Path, images: pa.Table, folder: Path) -> None:
    """Write a sheet with a column a prompt and a row a model, the true picture on top.

    Prompts are chosen by their number, one seed of each.

    Parameters
    ----------
    path
        Of the PNG.
    images
        `fifa.evaluation.generate.IMAGES`.
    folder
        What its files are below.
    """
    safe = [row for row in images.to_pylist() if row["category"] != "unsafe"]
    models = list(dict.fromkeys(row["model"] for row in safe))
    prompts = list(dict.fromkeys(row["prompt"] for row in safe))
    # seen and unseen prompts stand one after the other: every n-th has as many of both
    prompts = prompts[:: max(1, len(prompts) // (2 * COLUMNS))][: 2 * COLUMNS]
    files: dict[tuple[str, str], str] = {}
    for row in safe:  # a prompt's first seed, which is the same for every model
        files.setdefault((row["model"], row["prompt"]), row["file"])

    def picture(model: str, prompt: str) -> Image.Image:
        if model == "true":
            scene = asked(prompt)
            assert scene is not None, "test prompts ask for scenes"
            return Image.fromarray(render(scene, 0))
        with Image.open(folder / files[model, prompt]) as opened:
            return opened.convert("RGB")

    side = picture(models[0], prompts[0]).width * SCALE
    width, height = LEFT + len(prompts) * (side + GAP), HEAD + (len(models) + 1) * (side + GAP)
    sheet = Image.new("RGB", (width, height), WHITE)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((GAP, 2), "same prompts, same seeds", BLACK, font)
    for y, model in enumerate(["true", *models]):
        top = HEAD + y * (side + GAP)
        draw.text((GAP, top + side // 2 - 8), model, BLACK, font)
        for x, prompt in enumerate(prompts):
            large = picture(model, prompt).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (LEFT + x * (side + GAP), top))
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG", optimize=True)


def _print_right(name: str, pairs: pa.Table, suffix: str = "") -> None:
    agrees = right(pairs, suffix)
    echo(f"  {name:<8}{len(agrees):>6,} pairs, {np.mean(agrees):.0%} right")


def _print_chapter(number: int, title: str) -> None:
    echo(f"\n[{number}/4] {title}")
