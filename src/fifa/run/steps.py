"""The run folder: what each step reads, what it writes, and how a killed run goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fifa.config import Recipe
from fifa.console import collect_facts
from fifa.data.table import FILES, Pairs, load_pairs, save_pairs
from fifa.errors import FifaError
from fifa.scoring.table import Scores, score_facts
from fifa.shards.files import cannot_write, check_free, read_json, sweep, write_json, write_text


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


def is_run(folder: str | Path) -> bool:
    """Whether ``folder`` is a run folder."""
    return (Path(folder) / "recipe.yaml").is_file()


def open_run(folder: str | Path) -> Run:
    """The run in ``folder``; `FifaError` if there is none."""
    folder = Path(folder)
    if not is_run(folder):
        raise FifaError("not a run folder", where=str(folder), do="make one with `fifa filter`")
    return Run(folder, Recipe.from_yaml(folder / "recipe.yaml"))


def start_run(folder: str | Path, recipe: Recipe) -> Run:
    """Begin a run in ``folder``, or go on with the one that is there.

    Raises `FifaError` for a folder with other things in it, or with results of another recipe:
    neither is touched. A section whose step has no result yet may change, so a mistyped name can
    be mended and the run goes on.
    """
    folder = Path(folder)
    try:
        if is_run(folder):
            _same_results(folder, recipe)
        else:
            check_free(folder, "run")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    sweep(folder)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    return Run(folder, recipe)


def _same_results(folder: Path, recipe: Recipe) -> None:
    results = {"read": FILES["table"], "score": "scores.json", "select": "selection.parquet"}
    differences = [
        difference
        for difference in Recipe.from_yaml(folder / "recipe.yaml").differences(recipe)
        if (folder / results.get(difference.partition(".")[0], "-")).exists()
    ]
    if differences:
        raise FifaError(
            "the folder holds a run of another recipe (there / asked): " + "; ".join(differences),
            where=str(folder),
            do=f"choose another --out, or re-select from its scores with `fifa select {folder}`",
        )


@contextmanager
def step(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """`log_step` in the run's folder."""
    with log_step(run.folder, name) as facts:
        yield facts


@contextmanager
def log_step(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Time a step and append a line with its facts to ``log.jsonl`` when it ends well."""
    started, clock = datetime.now(UTC), time.perf_counter()
    with collect_facts() as facts:
        yield facts
    seconds = round(time.perf_counter() - clock, 3)
    line = {"step": name, "started": started.isoformat(timespec="seconds"), "seconds": seconds}
    try:
        with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({**line, **facts}, ensure_ascii=False, default=str) + "\n")
    except OSError as error:
        raise cannot_write(folder / "log.jsonl", error) from error


def read_step(run: Run) -> Pairs:
    """The run's pairs: read from the source once, from the run folder afterwards.

    Raises `FifaError` if the source has other pairs or labels than the run has read.
    """
    from fifa.data.read import read_pairs

    knobs = run.recipe.read
    if (run.folder / FILES["table"]).exists():
        known = load_pairs(run.folder)
        if _untouched(known):
            return known
        again = read_pairs(knobs.source, knobs.format, columns=knobs.columns)
        if (again.pairs_digest, again.table["label"]) != (known.pairs_digest, known.table["label"]):
            raise FifaError(
                "the source has changed since this run read it",
                where=knobs.source,
                do="choose another --out",
            )
        save_pairs(again, run.folder)
        return load_pairs(run.folder)
    with step(run, "read") as facts:
        pairs = read_pairs(knobs.source, knobs.format, columns=knobs.columns)
        save_pairs(pairs, run.folder)
        facts.update(
            pairs=len(pairs),
            prompts=pairs.prompts.num_rows,
            rows=pairs.origin.rows,
            merged=pairs.origin.merged,
            rejected=pairs.rejected.num_rows,
        )
    return load_pairs(run.folder)


def _untouched(pairs: Pairs) -> bool:
    from fifa.data.read import source_fingerprint

    try:
        return source_fingerprint(pairs.origin) == pairs.origin.fingerprint
    except FifaError:
        return True  # the source is not at hand, but its pairs are


def score_step(run: Run, pairs: Pairs) -> Scores:
    """Every score the recipe asks for; what is scored already is read, not scored again.

    ``scores.json`` then names the file of each, so that selecting needs no scorer.
    """
    from fifa.scoring import score

    knobs = run.recipe.score
    parts: dict[str, dict[str, Any]] = {
        "margin": {"margin": knobs.margin},
        "diversity": {"diversity": knobs.diversity, "k": knobs.k},
        "quality": {"quality": knobs.quality},
    }
    made = {}
    for name, asked in parts.items():
        with step(run, name):
            made[name] = score(
                pairs,
                **{"quality": "none", "diversity": "none", **asked},
                folder=run.scores,
                compute=run.recipe.compute,
                allow_download=run.recipe.read.allow_download,
            )
    scores = Scores(
        margins=made["margin"].margins,
        quality=made["quality"].quality,
        diversity=made["diversity"].diversity,
        knobs=knobs,
    )

    def file(table: pa.Table | None) -> str | None:
        return None if table is None else str(score_facts(table)["file"])

    index = {
        "margins": {name: file(table) for name, table in scores.margins.items()},
        "quality": file(scores.quality),
        "diversity": file(scores.diversity),
    }
    write_json(run.folder / "scores.json", index)
    return scores


def score_files(folder: Path) -> dict[str, Any]:
    """``margins`` (name -> path), ``quality`` and ``diversity`` (path or None) of a scored run."""
    path = folder / "scores.json"
    if not path.exists():
        raise FifaError("the run has no scores yet", where=str(folder), do="run `fifa score` on it")
    index = read_json(path, "which scores the run has")

    def at(name: str | None) -> Path | None:
        return folder / "scores" / name if name else None

    return {
        "margins": {spec: at(name) for spec, name in index["margins"].items()},
        "quality": at(index["quality"]),
        "diversity": at(index["diversity"]),
    }


def load_scores(folder: Path) -> Scores:
    """The scores of the run in ``folder``."""
    files = score_files(folder)

    def table(path: Path | None) -> pa.Table | None:
        return pq.read_table(path) if path else None

    return Scores(
        margins={name: pq.read_table(path) for name, path in files["margins"].items()},
        quality=table(files["quality"]),
        diversity=table(files["diversity"]),
    )


def revised(run: Run, recipe: Recipe) -> Run:
    """The run with another recipe, for good.

    What the changed step and those after it wrote stays until they are run again. Raises
    `FifaError` for a recipe that reads other pairs.
    """
    if recipe.read != run.recipe.read:
        raise FifaError(
            "the run has read its pairs already",
            where=str(run.folder),
            do="leave out what says how to read them, or begin a new run with --out",
        )
    sweep(run.folder)
    write_text(run.folder / "recipe.yaml", recipe.to_yaml())
    return Run(run.folder, recipe)


def select_step(run: Run) -> pa.Table:
    """Select from the run's scores and write ``selection.parquet``."""
    from fifa.selection.folder import select_folder

    files = score_files(run.folder)

    def embeddings() -> Any:
        from fifa.scoring.encoders import prompt_embeddings

        return prompt_embeddings(load_pairs(run.folder), run.recipe.score.diversity, run.scores)

    with step(run, "select"):
        return select_folder(
            run.folder,
            run.recipe.select,
            margin_paths=files["margins"],
            quality_path=files["quality"],
            diversity_path=files["diversity"],
            embeddings=None if run.recipe.score.diversity == "none" else embeddings,
            unreadable=_unreadable(run, files["margins"].values()),
            allow_download=run.recipe.read.allow_download,
        )


def _unreadable(run: Run, margins: Iterable[Path]) -> list[str]:
    """The ids of pairs with an image that a reward model could not open."""
    from fifa.scoring.rewards.engine import unreadable_path

    listed = [path for path in map(unreadable_path, margins) if path.exists()]
    images = [pq.read_table(path)["image"] for path in listed]
    keys = pa.chunked_array([chunk for column in images for chunk in column.chunks], pa.string())
    if len(keys) == 0:
        return []
    table = pq.read_table(run.folder / FILES["table"], columns=["pair_id", "image_0", "image_1"])
    sides = (pc.is_in(table[name], value_set=keys) for name in ("image_0", "image_1"))
    bad: list[str] = table["pair_id"].filter(pc.or_(*sides)).to_pylist()
    return bad


def export_step(run: Run, out: Path | None = None) -> Path:
    """Write the selected pairs to ``out`` (default: the run's ``subset``) for trainers."""
    from fifa.selection.export import export
    from fifa.selection.folder import SELECTION_FILE
    from fifa.selection.readable import FETCHED

    path, fetched = run.folder / SELECTION_FILE, run.folder / FETCHED
    if not path.exists():
        raise FifaError(
            "nothing is selected yet", where=str(run.folder), do="run `fifa select` on it"
        )
    folder = out or run.subset
    with step(run, "export"):
        export(
            load_pairs(run.folder),
            pq.read_table(path),
            load_scores(run.folder),
            folder,
            recipe=run.recipe,
            allow_download=run.recipe.read.allow_download,
            fetched=fetched,
        )
    shutil.rmtree(fetched, ignore_errors=True)
    return folder


def report_step(run: Run) -> Path:
    """Write the run's report."""
    from fifa.reporting.page import write_report

    return write_report(run.folder)
