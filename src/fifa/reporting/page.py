"""REPORT: ``report.html`` of a run, from what the command has in memory or the run's files."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from fifa import __version__
from fifa.config import RECIPE_FILE, Recipe
from fifa.console import LOG_FILE
from fifa.data.table import Origin, Pairs, load_pairs
from fifa.evaluation.generate import FOLDER
from fifa.evaluation.results import RESULTS, is_evaluated
from fifa.formatting import count, page_templates, shorten
from fifa.reporting.evaluation import evaluation_context
from fifa.reporting.selection import load_scores, load_selection, selection_context
from fifa.scoring.table import Scores
from fifa.selection.table import SELECTION_FILE
from fifa.shards.files import read_json_lines, write_text

HERE = Path(__file__).parent
STEPS_SHOWN = 30
SUMMED = ("seconds", "tokens_in", "tokens_out", "requests", "unrated")


def write_report(
    run_folder: str | Path,
    *,
    pairs: Pairs | None = None,
    scores: Scores | None = None,
    selection: pa.Table | None = None,
) -> Path:
    """Write ``report.html`` into a run folder.

    The same run gives the same bytes. The page needs no network and no script, and holds
    thumbnails only of prompts that no rater flagged as unsafe.

    Parameters
    ----------
    run_folder
        A run with a selection, an evaluation, or both: then the evaluation comes first.
    pairs, scores, selection
        The run's, where they are in memory; otherwise its files are read.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    FifaError
        If the folder is no run, or nothing is selected or evaluated in it yet.
    """
    folder = Path(run_folder)
    selected, evaluated = (folder / SELECTION_FILE).is_file(), is_evaluated(folder)
    context: dict[str, Any] = {"evaluation": None, "filtered": selected or not evaluated}
    context["title"] = shorten(folder.resolve().name, 80)
    if context["filtered"]:
        recipe = Recipe.from_yaml(folder / RECIPE_FILE)
        pairs = load_pairs(folder) if pairs is None else pairs
        selection = load_selection(folder) if selection is None else selection
        if scores is None:
            scores = load_scores(folder / "scores", selection, recipe)
        context["title"] = _title(recipe, pairs.origin)
        context |= selection_context(folder, recipe, pairs, scores, selection)
    if evaluated and (not selected or (folder / FOLDER / RESULTS).is_file()):
        context["evaluation"] = evaluation_context(folder)
    path = folder / "report.html"
    write_text(path, render("page.html.j2", context | _log(folder / LOG_FILE)))
    return path


def render(template: str, context: dict[str, Any]) -> str:
    """A page from one of our templates, with the style sheet that they share."""
    style = (HERE / "style.css").read_text("utf-8")
    # The policy names the one style sheet by its hash: nothing that a prompt could smuggle in runs
    seal = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    templates = page_templates(HERE / "templates")
    templates.add_extension("jinja2.ext.do")
    page = templates.get_template(template)
    return page.render(**context, style=style, style_hash=seal, version=__version__)


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The steps of a run's log in order, and how many lines a kill cut short.

    Lines of the report step itself are left out, so that writing the page again does not
    change it.
    """
    entries, broken = read_json_lines(path)
    timed = [entry for entry in entries if isinstance(entry.get("seconds"), int | float)]
    steps = [entry for entry in timed if entry.get("step") != "report"]
    return steps, broken + len(entries) - len(timed)


def _title(recipe: Recipe, origin: Origin) -> str:
    parts = [part for part in (recipe.read.source or origin.source).split("/") if part]
    return shorten("/".join(parts[-2:]) or "pairs in memory", 80)


def _log(path: Path) -> dict[str, Any]:
    """What the template of the log reads: the last steps, and the sums over all of them."""
    steps, broken = read_log(path)
    sums = {}
    for name in SUMMED:
        values = [entry[name] for entry in steps if isinstance(entry.get(name), int | float)]
        if values:
            sums[name] = sum(values)
    shown = [_step(entry) for entry in steps[-STEPS_SHOWN:]]
    return {"steps": shown, "sums": sums, "all_steps": len(steps), "broken": broken}


def _step(entry: dict[str, Any]) -> dict[str, Any]:
    started = shorten(str(entry.get("started", "")), 40)
    return {
        "name": shorten(str(entry.get("step", "?")), 40),
        "started": started.replace("T", " ").replace("+00:00", " UTC"),
        "seconds": float(entry["seconds"]),
        "facts": {
            shorten(str(name), 40).replace("_", " "): _fact(value)
            for name, value in entry.items()
            if name not in ("step", "started", "seconds")
        },
    }


def _fact(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return count(value) if isinstance(value, int) else f"{value:,.4g}"
    plain = isinstance(value, str)
    text = str(value) if plain else json.dumps(value, ensure_ascii=False, default=str)
    return shorten(text, 160)
