"""The run folder: what it holds, how a run begins and goes on, and which folders are refused."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fifa.config import RECIPE_FILE, Recipe
from fifa.console import LOG_FILE, collect_facts, detail, step_ended
from fifa.data.table import FILES
from fifa.errors import FifaError
from fifa.selection.table import SELECTION_FILE
from fifa.shards.files import (
    cannot_write,
    check_free,
    check_same,
    read_json,
    sealed_line,
    sweep,
    write_json,
    write_yaml,
)
from fifa.shards.mapped import give_back
from fifa.shards.mirror import local

STAMP = "run.json"  # says that a folder is a run, and in which format
FORMAT = 3  # 1 had no stamp, 2 no digests
SCORES_INDEX = "scores.json"  # which files of scores the recipe asked for
# What a section's step leaves last; until then the section may change
RESULTS = {"read": FILES["table"], "score": SCORES_INDEX, "select": SELECTION_FILE}


@dataclass(frozen=True)
class Run:
    """A run folder and the recipe it follows."""

    folder: Path
    recipe: Recipe

    @property
    def scores(self) -> Path:
        """The folder of score tables."""
        return self.folder / "scores"

    @property
    def subset(self) -> Path:
        """The folder that trainers read."""
        return self.folder / "subset"


def check_run(folder: str | Path) -> None:
    """Raise `FifaError` for a run folder of another version of fifa; any other folder passes."""
    from fifa.evaluation.results import is_evaluated

    folder = local(folder)
    stamp = read_json(folder / STAMP, "the run's format", missing={"format": 1})
    ours = (folder / RECIPE_FILE).exists() or is_evaluated(folder) or (folder / STAMP).exists()
    if ours and stamp != {"format": FORMAT}:
        raise FifaError(
            f"the run was made by another version of fifa, or its {STAMP} is damaged",
            where=str(folder),
            do="run the command again, into another folder",
        )


def begin(folder: str | Path) -> Path:
    """Make a run folder, or take up the one that is there.

    Raises `FifaError` for a folder with other things in it, and for a run of another version of
    fifa: neither is touched.
    """
    folder = Path(folder)
    try:
        check_run(folder)
        if not (folder / STAMP).exists():
            check_free(folder, "run")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    sweep(folder)
    write_json(folder / STAMP, {"format": FORMAT}, sealed=True)
    return folder


def open_run(folder: str | Path) -> Run:
    """The run in ``folder``; `FifaError` if there is none."""
    folder = Path(folder)
    check_run(folder)
    if not (folder / RECIPE_FILE).is_file():
        raise FifaError("not a run folder", where=str(folder), do="make one with `fifa filter`")
    return Run(folder, Recipe.from_yaml(folder / RECIPE_FILE, sealed=True))


def start_run(folder: str | Path, recipe: Recipe) -> Run:
    """Begin a run in ``folder``, or go on with the one that is there.

    Raises `FifaError` as `begin`, and for a folder with results of another recipe. A section
    whose step has no result yet may change, so a mistyped name can be mended and the run goes on.
    """
    folder = Path(folder)
    check_run(folder)
    begun = any((folder / name).exists() for name in (RECIPE_FILE, FILES["table"]))
    there = Recipe.from_yaml(folder / RECIPE_FILE, sealed=True) if begun else recipe
    differences = [
        difference
        for difference in there.differences(recipe)
        if (folder / RESULTS.get(difference.partition(".")[0], "-")).exists()
    ]
    do = f"choose another --out, or re-select from its scores with `fifa select {folder}`"
    check_same("a run of another recipe", differences, folder, do)
    return revised(Run(folder, there), recipe)


def revised(run: Run, recipe: Recipe) -> Run:
    """The run with another recipe, for good.

    What the changed step and those after it wrote goes before the recipe is written: a command
    that is killed then leaves no selection under a recipe that it does not follow. Raises
    `FifaError` for a recipe that reads other pairs.
    """
    there = run.recipe
    if recipe.read != there.read and (run.folder / FILES["table"]).exists():
        raise FifaError(
            "the run has read its pairs already",
            where=str(run.folder),
            do="leave out the options for reading, or start a new run with --out",
        )
    begin(run.folder)
    if recipe.score != there.score:
        (run.folder / SCORES_INDEX).unlink(missing_ok=True)
    if (recipe.score, recipe.select) != (there.score, there.select):
        (run.folder / SELECTION_FILE).unlink(missing_ok=True)
    write_yaml(run.folder / RECIPE_FILE, recipe.to_yaml())
    return Run(run.folder, recipe)


@contextmanager
def unless_refused(folder: Path) -> Iterator[None]:
    """Where the block raises `FifaError`, the run's recipe and its selection are as before."""
    before = {folder / name: folder / f".{name}.before" for name in (RECIPE_FILE, SELECTION_FILE)}
    for path, link in before.items():
        link.unlink(missing_ok=True)
        with suppress(OSError):
            os.link(path, link)
    try:
        yield
    except FifaError:
        (folder / SELECTION_FILE).unlink(missing_ok=True)  # never one under another recipe
        for path, link in before.items():
            if link.exists():
                link.replace(path)
        raise
    finally:
        for link in before.values():
            link.unlink(missing_ok=True)


@contextmanager
def log_step(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Time a step and append a line with its facts to ``log.jsonl`` when it ends well."""
    started, clock = datetime.now(UTC), time.perf_counter()
    detail(f"{name} begins")
    with collect_facts() as facts:
        yield facts
    give_back()
    seconds = round(time.perf_counter() - clock, 3)
    line = {"step": name, "started": started.isoformat(timespec="seconds"), "seconds": seconds}
    try:
        with (folder / LOG_FILE).open("a", encoding="utf-8") as log:
            log.write(sealed_line({**line, **facts}))
    except OSError as error:
        raise cannot_write(folder / LOG_FILE, error) from error
    step_ended({**line, **facts})
