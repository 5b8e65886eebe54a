"""REPORT: ``report.html`` of a run, from the files of its folder alone."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fifa import __version__
from fifa.config import Recipe
from fifa.data.table import Origin, load_origin
from fifa.errors import FifaError
from fifa.evaluation.generate import FOLDER
from fifa.evaluation.results import RESULTS, is_evaluated
from fifa.formatting import count, page_templates, shorten
from fifa.reporting import data
from fifa.reporting.evaluation import evaluation_context
from fifa.reporting.filtering import filter_context
from fifa.shards.files import write_text

HERE = Path(__file__).parent
STEPS_SHOWN = 30


def write_report(run_folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder, from the other files there.

    The same files give the same bytes. The page needs no network and no script, and holds
    thumbnails only of prompts that no rater flagged as unsafe.

    Parameters
    ----------
    run_folder
        A run with a selection, an evaluation, or both: then the evaluation comes first.

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
    path = folder / "report.html"
    write_text(path, render("page.html.j2", _context(folder)))
    return path


def _context(folder: Path) -> dict[str, Any]:
    """What the templates read: `evaluation` and `filtered` say which parts there are."""
    selected, evaluated = (folder / "selection.parquet").is_file(), is_evaluated(folder)
    measured = evaluated and (folder / FOLDER / RESULTS).is_file()
    title = shorten(folder.resolve().name, 80)
    parts: dict[str, Any] = {}
    if selected or not evaluated:
        recipe = Recipe.from_yaml(folder / "recipe.yaml")
        origin = load_origin(folder)
        if origin is None:
            raise FifaError(
                "no pairs here", where=str(folder), do="run `fifa read SOURCE --out RUN`"
            )
        parts, title = filter_context(folder, recipe, origin), _title(recipe, origin)
    if measured or not parts:
        parts["evaluation"] = evaluation_context(folder)
    log = data.read_log(folder / "log.jsonl")
    return {
        "evaluation": None,
        **parts,
        "filtered": bool(selected or not evaluated),
        "title": title,
        "log": log,
        "steps": [_step(entry) for entry in log.steps[-STEPS_SHOWN:]],
        "totals": _totals(log.steps),
    }


def render(template: str, context: dict[str, Any]) -> str:
    """A page from one of our templates, with the style sheet and the words that they share."""
    style = (HERE / "style.css").read_text("utf-8")
    # The policy names the one style sheet by its hash: nothing that a prompt could smuggle in runs
    seal = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = page_templates(HERE / "templates").get_template(template)
    return page.render(**context, style=style, style_hash=seal, version=__version__)


def _title(recipe: Recipe, origin: Origin) -> str:
    parts = [part for part in (recipe.read.source or origin.source).split("/") if part]
    return shorten("/".join(parts[-2:]) or "pairs in memory", 80)


def _step(entry: dict[str, Any]) -> dict[str, Any]:
    facts = [
        (shorten(str(name), 40).replace("_", " "), _fact(value))
        for name, value in entry.items()
        if name not in ("step", "started", "seconds")
    ]
    return {
        "name": shorten(str(entry.get("step", "?")), 40),
        "started": shorten(str(entry.get("started", "")), 40)
        .replace("T", " ")
        .replace("+00:00", " UTC"),
        "seconds": float(entry["seconds"]),
        "facts": facts,
    }


def _fact(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )
        return shorten(text, 160)
    return count(value) if isinstance(value, int) else f"{value:,.4g}"


def _totals(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {"seconds": sum(float(entry["seconds"]) for entry in steps)}
    for name in ("tokens_in", "tokens_out", "requests", "unrated"):
        told = [entry[name] for entry in steps if isinstance(entry.get(name), int | float)]
        if told:
            found[name] = sum(told)
    return found
