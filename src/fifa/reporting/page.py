"""Pages: ``report.html`` of a run, and one page of several runs; the table for a terminal."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa

from fifa import __version__
from fifa.config import RECIPE_FILE, Recipe
from fifa.config.train import STATS, TRAIN_FILE
from fifa.console import LOG_FILE
from fifa.data.table import Pairs, load_pairs
from fifa.evaluation.compare import Compared
from fifa.evaluation.generate import FOLDER
from fifa.evaluation.history import history_of
from fifa.evaluation.results import RESULTS, is_evaluated
from fifa.formatting import (
    count,
    interval,
    number,
    page_templates,
    percent,
    seconds,
    shorten,
    text_table,
)
from fifa.reporting.evaluation import evaluation_context, trainings
from fifa.reporting.figures import draw_learning, draw_wins, role
from fifa.reporting.selection import load_scores, selection_context
from fifa.scoring.table import Scores
from fifa.selection.table import SELECTION_FILE, load_selection
from fifa.shards.files import read_json_lines, write_text
from fifa.shards.lock import only_writer

HERE = Path(__file__).parent
PARTS = {"style": "style.css", "script": "script.js"}
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

    The same run gives the same bytes. The page needs no network, can be read without its script,
    and holds pictures only of prompts that no rater flagged as unsafe.

    Parameters
    ----------
    run_folder
        A run with a selection, an evaluation, or both: then the evaluation comes first. Or the
        folder of a training, finished or at work.
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
    if is_training(folder):  # whose writer may be at work
        return _write_training(folder)
    with only_writer(folder):
        return _write_report(folder, pairs, scores, selection)


def is_training(folder: str | Path) -> bool:
    """Whether a folder is that of a training."""
    return (Path(folder) / TRAIN_FILE).is_file()


def _write_training(folder: Path) -> Path:
    name = shorten(folder.resolve().name, 80)
    history = history_of(name, read_json_lines(folder / STATS)[0])
    context: dict[str, Any] = {"title": name, "steps": (), "evaluation": None, "filtered": False}
    context |= {"history": history, "trainings": trainings([history], {name: "kept"})}
    path = folder / "report.html"
    write_text(path, render("page.html.j2", context, again(folder)))
    return path


def _write_report(
    folder: Path, pairs: Pairs | None, scores: Scores | None, selection: pa.Table | None
) -> Path:
    selected, evaluated = (folder / SELECTION_FILE).is_file(), is_evaluated(folder)
    context: dict[str, Any] = {"history": None, "evaluation": None}
    context["filtered"] = selected or not evaluated
    context["title"] = shorten(folder.resolve().name, 80)
    if context["filtered"]:
        recipe = Recipe.from_yaml(folder / RECIPE_FILE, sealed=True)
        pairs = load_pairs(folder) if pairs is None else pairs
        selection = load_selection(folder) if selection is None else selection
        if scores is None:
            scores = load_scores(folder / "scores", selection, recipe)
        parts = [part for part in (recipe.read.source or pairs.origin.source).split("/") if part]
        context["title"] = shorten("/".join(parts[-2:]) or "pairs in memory", 80)
        context |= selection_context(folder, recipe, pairs, scores, selection)
    if evaluated and (not selected or (folder / FOLDER / RESULTS).is_file()):
        context["evaluation"] = evaluation_context(folder)
    path = folder / "report.html"
    write_text(path, render("page.html.j2", context | _log(folder / LOG_FILE), again(folder)))
    return path


def again(folder: Path) -> str:
    """The command that writes a folder's page again, from where the folder is."""
    return f"fifa report {shlex.quote(shorten(folder.resolve().name))}"


def render(template: str, context: dict[str, Any], command: str) -> str:
    """A page from one of our templates, with the style sheet and the script that they share.

    ``command`` makes the page again.
    """
    parts = {name: (HERE / file).read_text("utf-8") for name, file in PARTS.items()}
    # The policy names both by their hashes: nothing that a prompt could smuggle in runs
    seals = {
        name: base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for name, part in parts.items()
    }
    page = page_templates(HERE / "templates").get_template(template)
    return page.render(**context, **parts, seals=seals, command=command, version=__version__)


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The steps of a run's log in order, and how many lines a kill cut short.

    Lines of the report step itself are left out, so that writing the page again does not
    change it.
    """
    entries, broken = read_json_lines(path, sealed=True)
    timed = [entry for entry in entries if isinstance(entry.get("seconds"), int | float)]
    steps = [entry for entry in timed if entry.get("step") != "report"]
    return steps, broken + len(entries) - len(timed)


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


def write_comparison(compared: Compared, path: str | Path) -> Path:
    """Write a page with one table and one figure of several runs; the same runs, the same bytes."""
    entries = compared.entries
    wins = []
    for i, scale in enumerate(compared.scales):
        picked = any(entry.wins[i].scale.picked for entry in entries)
        rates = [(place, entry.wins[i].wins) for place, entry in enumerate(entries, 1)]
        wins.append((f"{scale.name}{' *' if picked else ''}", rates))
    curves = [(place + 1, curve) for place, curve in compared.curves]
    judged = [entry for entry in entries if entry.wins[0].wins.n]
    context = {
        "title": shorten(", ".join(dict.fromkeys(entry.run for entry in entries)), 80),
        "compared": compared,
        "colours": {entry.label: role(place) for place, entry in enumerate(entries, 1)},
        "best": max(judged, key=lambda entry: entry.wins[0].wins.share, default=None),
        "wins_figure": draw_wins(wins, "wins"),
        "figures": draw_learning(curves, compared.scales[0].name),
    }
    path = Path(path)
    runs = dict.fromkeys(shlex.quote(shorten(entry.run)) for entry in entries)
    command = f"fifa compare {' '.join(runs)} --out {shlex.quote(shorten(path.name))}"
    write_text(path, render("compare.html.j2", context, command))
    return path


def comparison_text(compared: Compared) -> str:
    """The table for a terminal."""
    scorers = [scale.name + (" *" if scale.picked else "") for scale in compared.scales]
    rows = [["checkpoint", *scorers, "diversity", "selecting", "training", "acc. hours"]]
    for entry in compared.entries:
        wins = [f"{percent(c.wins.share)} ({interval(c.wins)})" for c in entry.wins]
        diversity = number(entry.diversity.mean.mean) if entry.diversity else ""
        cost = entry.cost
        times = [seconds(cost.selecting or float("nan")), seconds(cost.training)]
        rows.append([entry.label, *wins, diversity, *times, number(cost.hours)])
    return "\n".join(text_table(rows))
