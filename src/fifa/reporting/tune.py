"""``tune.html``: the trials of `fifa tune` in a table, and how their held-out loss went."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.formatting import number, percent, shorten, signed, text_table
from fifa.reporting.figures import draw_trials
from fifa.reporting.page import again, render
from fifa.shards.files import read_table, write_text

TRIALS = "trials.parquet"
PAGE = "tune.html"
OWN = (
    *("trial", "rung", "steps", "heldout_loss", "accuracy", "displacement"),
    *("reward", "reward_low", "reward_high", "judged_by", "place"),
)


def write_tune(folder: str | Path) -> Path:
    """Write ``tune.html`` into a search's folder; the same table gives the same bytes."""
    folder = Path(folder)
    trials, heads, rows = _table(folder)
    context = {
        "title": shorten(folder.resolve().name, 80),
        "heads": heads,
        "rows": rows,
        "trials": trials,
        "warning": _warning(trials[0]),
        "figure": draw_trials([_curve(folder, row["trial"]) for row in trials]),
    }
    write_text(folder / PAGE, render("tune.html.j2", context, again(folder)))
    return folder / PAGE


def tune_text(folder: str | Path) -> str:
    """The table of the trials for a terminal, the best first, and who said so."""
    trials, heads, rows = _table(Path(folder))
    lines = text_table([heads, *rows])
    lines += [warning] if (warning := _warning(trials[0])) else []
    return "\n".join([*lines, f"the best one by {trials[0]['judged_by']}"])


def _warning(best: dict[str, Any]) -> str:
    """What is to be known of the best trial where it is no better than the base."""
    if best["heldout_loss"] < log(2):
        return ""
    return (
        f"Its loss on held-out pairs, {best['heldout_loss']:.4f}, is no lower than that of weights "
        f"that have not moved, {log(2):.4f}: take a lower lr or more pairs, or give more budget"
    )


def _table(folder: Path) -> tuple[list[dict[str, Any]], list[str], list[list[str]]]:
    """The last row of every trial, the best first; and these as cells below their heads."""
    table = read_table(folder / TRIALS)
    if missing := [name for name in OWN if name not in table.column_names]:
        raise FifaError(
            f"an earlier version wrote these trials: they have no {', '.join(missing)}",
            where=str(folder / TRIALS),
            do="search again: the same `fifa tune` with another --out",
        )
    found = table.to_pylist()
    trials = sorted((row for row in found if row["place"]), key=lambda row: row["place"])
    knobs = [name for name in trials[0] if name not in OWN]
    judged = [row for row in trials if row["reward"] is not None]
    heads = ["trial", *knobs, "steps", "held-out loss", "accuracy", "displacement"]
    heads += ["gain (95 %)"] if judged else []
    rows = [_cells(row, knobs, bool(judged)) for row in trials]
    return trials, heads, rows


def _cells(row: dict[str, Any], knobs: list[str], judged: bool) -> list[str]:
    values = ["-" if row[name] is None else str(row[name]) for name in knobs]
    cells = [str(row["trial"]), *values, f"{row['steps']:,}"]
    if row["heldout_loss"] is None:
        cells += ["diverged", "-", "-"]
    else:
        cells += [
            f"{row['heldout_loss']:.4f}",
            percent(row["accuracy"]),
            f"{100 * row['displacement']:+.2f} %",
        ]
    if judged and row["reward"] is None:
        cells.append("-")
    elif judged:
        low, high = number(row["reward_low"]), number(row["reward_high"])
        cells.append(f"{signed(row['reward'])} ({low} to {high})")
    return cells


def _curve(folder: Path, trial: int) -> list[tuple[int, float]]:
    """Steps and held-out loss of a trial after each rung."""
    found = read_table(folder / TRIALS, ["trial", "steps", "heldout_loss"]).to_pylist()
    return [
        (row["steps"], row["heldout_loss"])
        for row in found
        if row["trial"] == trial and row["heldout_loss"]
    ]
