"""`fifa study`: arms x budgets x label noise x seeds, each cell a training.

A cell is what `fifa select`, `fifa train` and `fifa evaluate` do, in a folder of its own that goes
when its row is kept: one row a cell in a ledger, so that a study that is killed goes on cell by
cell, with the cell at hand from its last saved state. Scores, the cache of latents and prompts and
the base model's images are made once for all cells.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa.config import RECIPE_FILE, Cluster, Compute, Evaluate, Recipe, Study, changed
from fifa.console import echo
from fifa.data.table import Pairs, load_pairs
from fifa.errors import FifaError
from fifa.evaluation.generate import CURVE, generate
from fifa.evaluation.judges import Judge
from fifa.evaluation.measure import CURVE_SUFFIX, Measured, measure
from fifa.evaluation.models import BASE, Model, find_models
from fifa.evaluation.prompts import read_prompts
from fifa.evaluation.sampling import PipelineLoader, settings_for
from fifa.evaluation.study import CELL, FEEDBACK, ROWS, SCORED, STUDY_FILE, Cell, cells_of, told
from fifa.evaluation.win_rates import AT, steps_of
from fifa.models.runtime import release_memory
from fifa.reporting.study import write_study
from fifa.run.evaluation import check_evaluation
from fifa.run.folder import SCORES_INDEX, Run, begin, check_run, start_run
from fifa.run.steps import export_step, read_step, select_step, train
from fifa.scoring import check_score, score
from fifa.scoring.table import Scores, score_files
from fifa.shards.executors import executor_of
from fifa.shards.files import (
    atomic_path,
    check_free,
    check_same,
    digest,
    make_folder,
    read_json,
    write_json,
    write_yaml,
)
from fifa.shards.ledger import Ledger
from fifa.shards.lock import only_writer
from fifa.shards.pool import Shard, run_shards
from fifa.training.loop import DivergedError
from fifa.training.metrics import read_stats

WORK, CACHE = "work", "cache"
LOST = 60  # seconds after which a lost worker is no more
# What may differ between two calls: cells are named by all that they depend on
FREE = frozenset(
    {"arms", "parts", "seeds", "against", "target"}
    | {f"compute.{field.name}" for field in fields(Compute)}
)
Judges = Callable[[], Sequence[Judge]]


def study(
    asked: Study, out: str | Path, *, judges: Judges | None = None, scores: Path | None = None
) -> Path:
    """Run every cell that has not run, in the order of the parts; returns the page.

    Parameters
    ----------
    asked
        What is compared.
    out
        The study's folder: ``study.parquet`` with a row a cell, and ``study.html``, written again
        after each seed of a part. A study that was stopped goes on where it was; arms, parts and
        seeds may be added to one that is there.
    judges
        Makes judges of the images, in each worker: a function that other processes can import.
    scores
        A folder of scores that were made before; they are taken where they fit by their names.

    Raises
    ------
    FifaError
        For whatever a person can mend; what was done until then is kept. A selection that keeps
        nothing and a training that diverges are rows of the table.
    """
    out = Path(out)
    with only_writer(out):
        if (out / STUDY_FILE).is_file():
            there = Study.from_yaml(out / STUDY_FILE, sealed=True)
            check_same("another study", there.differences(asked, but=FREE), out)
        else:
            check_free(out, "study")
        _check(asked, judges)
        make_folder(out)
        write_yaml(out / STUDY_FILE, asked.to_yaml())
        run = start_run(out / FEEDBACK, Recipe(asked.read, asked.score, asked.select))
        pairs = read_step(run)
        for path in sorted(scores.iterdir()) if scores and scores.is_dir() else ():
            if not (run.scores / path.name).exists():
                with atomic_path(run.scores / path.name) as temporary:
                    shutil.copyfile(path, temporary)
        ledger, cells = Ledger(str(out / ROWS)), cells_of(asked)
        make = Make(asked, out.resolve(), judges, _devices())
        page = write_study(out)
        with executor_of(asked.compute) as executor:
            for name, group in _groups(cells, ledger.keys()):
                feeds = {_feed(cell): cell for cell in group if cell.arm != BASE}
                seconds = {
                    name: _scored(run, pairs, cell, asked.compute) for name, cell in feeds.items()
                }
                group = [
                    replace(cell, scoring=seconds[_feed(cell)]) if _reads(cell) else cell
                    for cell in group
                ]
                shards = [Shard(cell.key, 1, cell) for cell in group]
                for _ in run_shards(f"cells of {name}", make, shards, ledger, executor):
                    pass
                page = write_study(out)
        shutil.rmtree(out / WORK, ignore_errors=True)
    return page


def _check(asked: Study, judges: Judges | None) -> None:
    """Raise `FifaError` for what would stop the study after hours."""
    check_run(asked.read.source)
    for section, names in (
        (asked.train, ("source",)),
        (asked.evaluate, ("base", "tuned")),
    ):
        if set_ := [name for name in names if getattr(section, name)]:
            raise FifaError(f"the study itself sets {', '.join(set_)}", do="leave it out")
    for what, value in (
        ("read.source", asked.read.source),
        ("train.model", asked.train.model),
        ("evaluate.prompts", asked.evaluate.prompts),
    ):
        if not value:
            raise FifaError(f"the study has no {what}", do="give it in the recipe")
    read_prompts(asked.evaluate.prompts, limit=asked.evaluate.limit)
    find_models(asked.train.model, {}, asked.evaluate.generate)
    for one in {cell.score for cell in cells_of(asked) if cell.arm != BASE}:
        check_score(one)
    if not judges and asked.evaluate.measure.scorers in ((), ("none",)):
        raise FifaError("nothing judges the images", do="give evaluate.measure.scorers")
    check_evaluation(_evaluation(asked), asked.compute)


def _evaluation(asked: Study) -> Evaluate:
    scorers = asked.evaluate.measure.scorers
    picked = (*asked.evaluate.measure.picked, *asked.score.margin)
    return changed(
        asked.evaluate,
        base=asked.train.model,
        picked=tuple(dict.fromkeys(picked)),
        scorers=() if scorers == ("none",) else scorers,
    )


def _devices() -> tuple[str, ...]:
    """The CUDA devices that workers share out among themselves; none where there is one or none."""
    import torch

    count = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else list(map(str, range(count)))
    return tuple(names) if count > 1 else ()


def _groups(cells: Sequence[Cell], done: frozenset[str]) -> Iterator[tuple[str, list[Cell]]]:
    """What has not run, a seed of a part at a time; the base first of all."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.part, cell.seed), []).append(cell)
    for (part, seed), group in groups.items():
        if missing := [cell for cell in group if cell.key not in done]:
            yield f"{part}, seed {seed}", missing


def _reads(cell: Cell) -> bool:
    """Whether a cell's selection looks at scores."""
    if cell.arm == BASE:
        return False
    return cell.select.strategy != "random" or cell.select.min_agreement is not None


def _feed(cell: Cell) -> str:
    """Names the labels of a cell and the scores made of them."""
    return digest(told(cell.score), cell.noise, cell.seed if cell.noise else None)


def _scored(run: Run, pairs: Pairs, cell: Cell, compute: Compute) -> float:
    """Score what a cell selects from, if it is not scored yet; the seconds that it took.

    A scoring that was killed counts from where it was taken up again. Raises `FifaError` where the
    scores are not those that earlier cells were made of: by another rater or encoder, for a cell
    is named by its knobs alone.
    """
    path, name = run.folder / SCORED, _feed(cell)
    known: dict[str, Any] = read_json(path, "the study's scores", missing={})
    turned, _ = turn_labels(pairs, cell.noise, cell.seed)
    clock = time.perf_counter()
    files = score_files(_scores(run, turned, cell, compute))
    made = {"seconds": round(time.perf_counter() - clock, 1), "files": files}
    if known.setdefault(name, made)["files"] != files:
        raise FifaError(
            "the cells that are there were made of other scores, by another version of a model",
            where=str(path),
            do="another --out, or the version that they were made with",
        )
    write_json(path, known)
    release_memory()
    return float(known[name]["seconds"])


def _scores(run: Run, pairs: Pairs, cell: Cell, compute: Compute) -> Scores:
    """The scores of pairs, which are kept with those of the whole study."""
    download = run.recipe.read.allow_download
    options: dict[str, Any] = {"compute": compute, "allow_download": download}
    return score(pairs, **asdict(cell.score), folder=run.scores, **options)


def turn_labels(pairs: Pairs, noise: float, seed: int) -> tuple[Pairs, np.ndarray]:
    """The pairs with a share of the untied labels turned round, and which: bool [pairs].

    Those of a smaller share are among those of a larger one with the same seed.
    """
    label = pairs.table["label"].to_numpy().copy()
    untied = np.flatnonzero(~np.isnan(label) & (label != 0.5))
    turned = np.zeros(len(label), bool)
    order = np.random.default_rng(seed).permutation(untied)
    turned[order[: round(noise * len(untied))]] = True
    label[turned] = 1 - label[turned]
    place = pairs.table.column_names.index("label")
    table = pairs.table.set_column(place, pairs.table.schema.field("label"), pa.array(label))
    return replace(pairs, table=table), turned


@dataclass(frozen=True)
class Make:
    """Makes what runs cells, in every worker."""

    asked: Study
    out: Path
    judges: Judges | None
    devices: tuple[str, ...]

    def __call__(self) -> Cells:
        """In the worker's own process, where there is one."""
        number = multiprocessing.current_process()._identity
        if self.devices and number:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.devices[number[-1] % len(self.devices)]
        return Cells(self.asked, self.out, list(self.judges()) if self.judges else [])


class Cells:
    """A `fifa.shards.pool.Step` whose shards are cells."""

    def __init__(self, asked: Study, out: Path, judges: list[Judge]) -> None:
        self._out, self._judges = out, judges
        self._is_worker = asked.compute.executor != "local"
        if self._is_worker:  # one that waited for actors of its own would hold what they wait for
            asked = replace(asked, compute=replace(asked.compute, executor="local", store=None))
        self._asked = asked
        self._evaluation = _evaluation(asked)
        self._feeds: dict[str, tuple[Pairs, np.ndarray, Scores]] = {}
        self._loader: PipelineLoader | None = None

    def begin(self, cell: Cell) -> Cell:
        """Nothing runs ahead."""
        return cell

    def finish(self, cell: Cell) -> pa.Table:
        """The row of a cell."""
        place = self._out / WORK / cell.key
        row: dict[str, Any] = {
            name: getattr(cell, name)
            for name in ("part", "arm", "budget", "noise", "seed", "scoring")
        }
        with alone_in(place):
            begin(place)
            row |= self._base(place) if cell.arm == BASE else self._trained(cell, place)
            shutil.rmtree(place, ignore_errors=True)
        release_memory()
        return pa.Table.from_pylist([row], schema=CELL)

    def _base(self, place: Path) -> dict[str, Any]:
        (model, *_) = find_models(self._evaluation.base, {}, self._evaluation.generate)
        return {"status": BASE, **self._judged(place, model)}

    def _trained(self, cell: Cell, place: Path) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            source, facts = self._selected(cell, place)
        except FifaError as error:
            if isinstance(error.__cause__, OSError):
                raise
            echo(f"{cell.name}: {error.what}")
            return {"status": "refused", "reason": error.what[:500]}
        selecting = time.perf_counter() - began
        try:
            knobs = replace(cell.train, cluster=Cluster()) if self._is_worker else cell.train
            checkpoint = train(source, knobs.model, place / "checkpoint", knobs)
        except DivergedError as error:
            echo(f"{cell.name}: {error.what}")
            return {**facts, "selecting": selecting, "status": "diverged", "reason": error.what}
        training = time.perf_counter() - began - selecting
        release_memory()
        lines = read_stats(checkpoint)
        base, model = find_models(
            self._evaluation.base, {"tuned": str(checkpoint)}, self._evaluation.generate
        )
        judged = self._judged(place, model, base)
        steps = {0, *(step for image in judged["images"] if (step := image["step"]))}
        points = [
            {name: line[name] for name in ("step", "pairs", "seconds")}
            for line in lines
            if line["step"] in steps or line is lines[-1]
        ]
        drift = [line["winner_minus_reference"] for line in lines[-len(lines) // 4 :]]
        found = [value for value in drift if value is not None]
        row = {"status": "trained", "steps": lines[-1]["step"], "points": points}
        row |= {"selecting": selecting, "training": training}
        row["winner"] = float(np.mean(found)) if found else None
        for image in judged["images"]:
            image["step"] = image["step"] or row["steps"]
        echo(f"{cell.name}: {time.perf_counter() - began:.0f} s")
        return {**facts, **row, **judged}

    def _selected(self, cell: Cell, place: Path) -> tuple[Path, dict[str, Any]]:
        """A run folder with the pairs of a cell as its subset, and how many they are."""
        recipe = Recipe(self._asked.read, cell.score, cell.select, self._asked.compute)
        run, feedback = Run(place, recipe), Run(self._out / FEEDBACK, recipe)
        name = _feed(cell)
        if name not in self._feeds:
            self._feeds.clear()  # one at a time: cells come seed by seed
            pairs, turned = turn_labels(load_pairs(feedback.folder), cell.noise, cell.seed)
            self._feeds[name] = pairs, turned, _scores(feedback, pairs, cell, recipe.compute)
        pairs, turned, scores = self._feeds[name]
        for link, folder in ((run.scores, feedback.scores), (place / "train", self._out / CACHE)):
            make_folder(folder)
            if not link.is_symlink():
                link.symlink_to(folder, target_is_directory=True)
        write_yaml(place / RECIPE_FILE, recipe.to_yaml())
        write_json(place / SCORES_INDEX, score_files(scores), sealed=True)
        selection = select_step(run, pairs, scores)
        export_step(run, pairs=pairs, scores=scores, selection=selection)
        kept = np.asarray(pc.equal(selection["status"].cast(pa.string()), "selected"))
        return place, {"kept": int(kept.sum()), "turned": int(turned[kept].sum())}

    def _judged(self, place: Path, model: Model, base: Model | None = None) -> dict[str, Any]:
        """The images of a model and of its checkpoints on the way, in numbers."""
        began, asked = time.perf_counter(), self._evaluation
        base, folder = base or model, place / "images"
        prompts, settings = (
            read_prompts(asked.prompts, limit=asked.limit),
            settings_for(asked.generate, base.base),
        )
        self._loader = self._loader or PipelineLoader(base.base, settings, asked.generate.device)
        loader, compute = self._loader, self._asked.compute
        measured: list[Measured] = []
        options: dict[str, Any] = {"compute": compute, "judges": self._judges}
        options["picked"] = asked.measure.picked
        images = generate(asked, [model], prompts, settings, folder, loader=loader)
        measured.append(measure(images, folder, asked.measure, **options))
        last = read_stats(model.training)[-1]["step"] if model.training else None
        steps = [one for one in steps_of(model) if not one.name.endswith(f"{AT}{last}")]
        if asked.curve and steps:
            images = generate(
                asked,
                steps,
                prompts,
                settings,
                folder,
                index=CURVE,
                most=asked.curve,
                loader=loader,
            )
            rewards = replace(asked.measure, rater="none", encoder="none")
            measured.append(measure(images, folder, rewards, **options, suffix=CURVE_SUFFIX))
        scales = [scale for scale in measured[0].scales if scale.type != "colour"]
        rows = [row for one in measured for row in _rows(one, [s.column for s in scales])]
        distances = measured[0].diversity.select(["prompt_id", "distance"]).to_pylist()
        return {
            "scales": json.dumps([asdict(scale) for scale in scales]),
            "images": rows,
            "distances": distances,
            "imaging": time.perf_counter() - began,
        }


@contextmanager
def alone_in(place: Path) -> Iterator[None]:
    """Nobody else is at a cell while the block lasts.

    A worker whose driver or node was killed may go on for a moment: it is waited for.
    """
    with ExitStack() as held:
        for second in range(LOST + 1):
            try:
                held.enter_context(only_writer(place))
                break
            except FifaError:
                if second == LOST:
                    raise
                time.sleep(1)
        yield


def _rows(measured: Measured, columns: list[str]) -> Iterator[dict[str, Any]]:
    """An entry an image, ``step`` 0 for those of the last weights."""
    keys = ("model", "prompt_id", "seed", "category", "unsafe_prompt")
    for row in measured.table.select([*keys, *columns]).to_pylist():
        _, at, step = row.pop("model").rpartition(AT)
        values = [row.pop(column) for column in columns]
        yield {**row, "step": int(step) if at else 0, "values": values}
