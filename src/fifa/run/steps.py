"""What each command does to a run folder: read, score, select, export; and `fifa.train`.

Within one command a step hands its result on in memory. What it writes is for the next command,
and for a run that is stopped and goes on.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fifa.config import Export, Recipe, Train, changed
from fifa.console import echo, note
from fifa.data.images import Door, Images, has_pixels, kept, pair_images, read
from fifa.data.names import NAMES, labels_by_aspect
from fifa.data.read import read_source, source_fingerprint
from fifa.data.table import FILES, PAIRS, Origin, Pairs, load_origin, load_pairs, save_pairs
from fifa.errors import FifaError
from fifa.run.folder import SCORES_INDEX, Run, check_run, log_step, start_run
from fifa.scoring import check_specs, score
from fifa.scoring.table import BLIND, DIVERSITY, MARGIN, QUALITY, SIGMAS, Scores, score_files
from fifa.selection.choose import columns_needed, select
from fifa.selection.readable import select_readable
from fifa.selection.table import load_selection, reason_counts, write_selection
from fifa.selection.trusted import check_trust
from fifa.shards.files import read_json, read_table, take_rows, write_json
from fifa.shards.lock import only_writer
from fifa.shards.mapped import take
from fifa.shards.sealed import DamagedError, check_whole

FETCHED = "fetched"  # a folder of the run
Integers = npt.NDArray[np.integer[Any]]

NEEDED = ["pair_id", "prompt_index", "label", "repeat"]  # by the choice of pairs
IMAGE_COLUMNS = [
    name for name in PAIRS.names if name.startswith(("pair_id", "image", "file", "row", "swap"))
]


def filter_pairs(recipe: Recipe, out: str | Path) -> Run:
    """Filter a feedback data set: everything from the source to the report.

    Parameters
    ----------
    recipe
        Where the pairs are, what scores them, what is kept.
    out
        The run folder. A run that was stopped goes on where it was; a finished one is checked
        and its report written again.

    Returns
    -------
    Run
        The run: ``run.subset`` is what trainers read, ``run.folder / "report.html"`` the page.

    Raises
    ------
    FifaError
        For whatever a person can mend; what was done until then is kept.
    """
    from fifa.reporting.page import write_report

    check_specs(recipe.score)
    with only_writer(out):
        run = start_run(out, recipe)
        pairs = read_step(run)
        echo_read(pairs)
        scores = score_step(run, pairs)
        # an image that was looked at is exported from it
        with TemporaryFile(dir=run.folder, buffering=0) as file:
            door = kept(_door(run), file)
            selection = select_step(run, pairs, scores, door)
            results: dict[str, Any] = {"pairs": pairs, "scores": scores, "selection": selection}
            echo(f"subset: {export_step(run, **results, door=door)}")
        echo(f"report: {write_report(run.folder, **results)}")
        return run


def train(
    source: str | Path,
    model: str | Path,
    out: str | Path,
    knobs: Train | None = None,
    **changes: Any,
) -> Path:
    """Train a diffusion model on preference pairs, with Diffusion-DPO.

    Parameters
    ----------
    source
        A run folder, a subset that `fifa.export` wrote, or Parquet files in the diffusers schema.
    model
        A model folder in diffusers layout, or a hub id.
    out
        The checkpoint's folder. A training that was stopped goes on where it was, and ends with
        the weights of one that was not; a finished one is left alone.
    knobs
        `fifa.config.Train`, or a preset of `fifa.config.PRESETS`; None: the
        default.
    **changes
        Knobs to change: ``loss="ipo"``, ``steps=200``, ``draws=8``.

    Returns
    -------
    pathlib.Path
        ``out``, which then holds ``pytorch_lora_weights.safetensors`` (for ``load_lora_weights``)
        or ``unet`` / ``transformer`` (for ``from_pretrained``), the model card, ``train.json``,
        ``train.yaml`` and ``stats.jsonl``.

    Raises
    ------
    FifaError
        For pairs, a model or knobs that do not fit together, too little memory, and a loss that
        is not finite; what was done until then is kept.
    """
    from fifa.training.job import run_training

    given = {**changes, "source": str(source), "model": str(model)}
    check_run(source)
    return run_training(changed(knobs or Train(), **given), out)


def plan(recipe: Recipe) -> str:
    """What `filter_pairs` would do, without doing it: the recipe, the pairs, the work ahead."""
    pairs = read_source(recipe.read)
    echo_read(pairs)
    prompts, score, keep = pairs.prompts.num_rows, recipe.score, recipe.select.keep
    count = keep if isinstance(keep, int) else max(1, round(keep * len(pairs)))
    work = [
        f"# margin: {', '.join(score.margin) or 'none'} on {len(pairs):,} pairs",
        f"# quality: {score.quality} on {prompts:,} prompts",
        f"# diversity: {score.diversity}, k = {score.k}, on {prompts:,} prompts",
        f"# keep: {count:,} of {len(pairs):,} pairs by {recipe.select.strategy!r}",
    ]
    return recipe.to_yaml() + "\n".join(work)


def read_step(run: Run) -> Pairs:
    """The run's pairs: read from the source once, from the run folder afterwards.

    Raises `FifaError` if the source has other pairs or labels than the run has read.
    """
    known = _known_pairs(run.folder)
    if known is None:
        with log_step(run.folder, "read") as facts:
            pairs = read_source(run.recipe.read, spill=run.folder)
            save_pairs(pairs, run.folder)
            facts |= read_facts(pairs)
    elif source_is_same(known.origin):
        pairs = known
    else:
        pairs = read_source(run.recipe.read, spill=run.folder)
        if (pairs.pairs_digest, pairs.table["label"]) != (known.pairs_digest, known.table["label"]):
            raise FifaError(
                "the source has changed since this run read it",
                where=run.recipe.read.source,
                do="choose another --out",
            )
        save_pairs(pairs, run.folder)
    return pairs


def _known_pairs(folder: Path) -> Pairs | None:
    """The pairs that were read; None where there are none yet, or they are damaged."""
    if not (folder / FILES["table"]).exists():
        return None
    try:
        return load_pairs(folder)
    except DamagedError as error:
        echo(f"{error.where} is damaged: the source is read again")
        return None


def source_is_same(origin: Origin) -> bool:
    """Whether the files of a source are as they were when they were read."""
    try:
        return source_fingerprint(origin) == origin.fingerprint
    except FifaError:
        return True  # the source is not at hand, but its pairs are


def read_facts(pairs: Pairs) -> dict[str, Any]:
    """How many rows were read, merged and rejected, for the log."""
    return {
        "pairs": len(pairs),
        "prompts": pairs.prompts.num_rows,
        "rows": pairs.origin.rows,
        "merged": pairs.origin.merged,
        "rejected": pairs.rejected.num_rows,
    }


def echo_read(pairs: Pairs) -> None:
    """Print how many rows were read, merged and rejected."""
    origin, there = pairs.origin, pairs.table.column_names
    echo(
        f"read {origin.rows:,} rows as {origin.format}: {len(pairs):,} pairs, "
        f"{pairs.prompts.num_rows:,} prompts"
    )
    if beside := [name for name in (*NAMES, *labels_by_aspect(pairs.table)) if name in there]:
        echo(f"  kept beside the labels: {', '.join(beside)}")
    if known := origin.reliability:
        worst = ", ".join(f"{name} ({right:.0%} of {n:,})" for name, n, right in known["worst"][:3])
        echo(f"  {known['annotators']:,} annotators weighed; right least often: {worst}")
    if origin.merged:
        echo(f"  merged   {origin.merged:>10,}  repeated pairs, labels averaged")
    for reason, count in origin.not_made.items():
        echo(f"  not made {count:>10,}  {reason}")
    reasons = Counter(pairs.rejected["reason"].to_pylist())
    for reason, count in reasons.most_common(10):
        echo(f"  rejected {count:>10,}  {reason}")
    if len(reasons) > 10:
        echo(f"  rejected {sum(reasons.values()):>10,}  in all; see rejected.parquet")


def score_step(run: Run, pairs: Pairs) -> Scores:
    """Every score the recipe asks for; what is scored already is read, not scored again.

    ``scores.json`` then names the file of each, so that selecting needs no scorer.
    """
    scores = score(
        pairs,
        **asdict(run.recipe.score),
        folder=run.scores,
        compute=run.recipe.compute,
        allow_download=run.recipe.read.allow_download,
        step=partial(log_step, run.folder),
    )

    write_json(run.folder / SCORES_INDEX, score_files(scores), sealed=True)
    return scores


def load_scores(run: Run) -> Scores:
    """The scores of a run; tables that lie row by row with the pairs come without their ids."""
    index = _scores_index(run)
    margin = pa.schema([*MARGIN, *SIGMAS, (BLIND, pa.float32())])

    def table(name: str | None, schema: pa.Schema, base: str) -> pa.Table | None:
        if name is None:
            return None
        return _scores(run.scores / name, schema, run.folder / FILES[base], _again(run))

    return Scores(
        margins={spec: table(name, margin, "table") for spec, name in index["margins"].items()},
        quality=table(index["quality"], QUALITY, "prompts"),
        diversity=table(index["diversity"], DIVERSITY, "prompts"),
    )


def _scores_index(run: Run) -> dict[str, Any]:
    """The files in ``scores/``: ``margins`` by their specs, ``quality`` and ``diversity``."""
    path = run.folder / SCORES_INDEX
    if not path.exists():
        raise FifaError(
            "the run has no scores yet", where=str(run.folder), do="run `fifa score` on it"
        )
    check_whole(path, _again(run))
    index: dict[str, Any] = read_json(path, "the list of scores", sealed=True)
    return index


def _again(run: Run) -> str:
    return f"run `fifa score {run.folder}`: it makes again what is missing"


def select_step(
    run: Run, pairs: Pairs | None = None, scores: Scores | None = None, door: Door | None = None
) -> pa.Table:
    """Select from the run's scores and write ``selection.parquet``.

    Parameters
    ----------
    run
        The run.
    pairs, scores
        The run's, where they are in memory; otherwise what is needed of its files is read.
    door
        `fifa.data.images.read` as it is to be called; None calls it as the recipe says.

    Returns
    -------
    The selection. Where the source has images, those of every selected pair were decoded; a
    pair with an unreadable one is dropped and the next in rank takes its place
    (``unreadable.parquet``; `fifa.selection.readable`).
    """
    index, knobs = _scores_index(run), run.recipe.select
    with log_step(run.folder, "select"):
        columns, vectors = partial(_columns, run, pairs), partial(_embeddings, run, pairs)
        if pairs is None or scores is None:
            pairs, scores = _load_for_choice(run)
        check_trust(pairs, scores, knobs, str(run.folder))
        origin = pairs.origin
        unreadable = _unreadable(run, columns, index["margins"].values())
        embedded = None if run.recipe.score.diversity == "none" else vectors
        chosen = partial(select, pairs, scores, knobs, embeddings=embedded)

        def choose(found: list[str], same: list[str]) -> pa.Table:
            return chosen(unreadable={*unreadable, *found}, same=same)

        def load(rows: Integers) -> Images:
            return pair_images(columns(IMAGE_COLUMNS, rows), origin)

        selection = choose([], [])
        some = np.flatnonzero(selection["rank"].combine_chunks().is_valid())[:1]
        if run.recipe.read.allow_download or has_pixels(columns(IMAGE_COLUMNS, some), origin):
            door = door or _door(run)
            selection = select_readable(
                load, selection, choose, run.folder, door, drop_same=knobs.drop_duplicates
            )
        made_of = {"select": asdict(knobs), "margin": index.pop("margins"), **index}
        selection = write_selection(run.folder, selection, made_of)
        counts = reason_counts(selection)
        note(**counts)
    kept = counts.pop("selected", 0)
    echo(f"kept {kept:,} of {len(selection):,} pairs ({kept / len(selection):.1%})")
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        echo(f"  dropped  {count:>10,}  {reason}")
    return selection


def export_step(
    run: Run,
    out: Path | None = None,
    *,
    pairs: Pairs | None = None,
    scores: Scores | None = None,
    selection: pa.Table | None = None,
    door: Door | None = None,
    to: str | None = None,
    allow_download: bool = False,
) -> Path:
    """Write the selected pairs to ``out`` for a trainer.

    Parameters
    ----------
    run
        The run.
    out
        Where to write; None: the run's ``subset``, or ``subset-TO`` for another trainer than the
        default one.
    pairs, scores, selection
        The run's, where they are in memory.
    door
        As for `select_step`.
    to
        The trainer, as for `fifa.export`.
    allow_download
        Fetch images that are only known by URL even if the run's recipe does not say so.

    Returns
    -------
    The folder.
    """
    from fifa.selection.export import export

    selection = load_selection(run.folder) if selection is None else selection
    other = to not in (None, Export().to)
    folder = out or (run.folder / f"{run.subset.name}-{to}" if other else run.subset)
    allow_download = allow_download or run.recipe.read.allow_download
    with log_step(run.folder, "export"):
        export(
            load_pairs(run.folder) if pairs is None else pairs,
            selection,
            load_scores(run) if scores is None else scores,
            folder,
            recipe=run.recipe,
            allow_download=allow_download,
            door=door or _door(run, allow_download),
            to=to,
        )
    shutil.rmtree(run.folder / FETCHED, ignore_errors=True)
    return folder


def _door(run: Run, allow_download: bool = False) -> Door:
    """What is downloaded to be looked at is kept in the run until it is exported."""
    download = allow_download or run.recipe.read.allow_download
    cache_gb = run.recipe.compute.cache_gb
    return partial(read, allow_download=download, fetched=run.folder / FETCHED, cache_gb=cache_gb)


def _load_for_choice(run: Run) -> tuple[Pairs, Scores]:
    """What choosing pairs reads of a run: ten million pairs are selected in seconds."""
    origin, path = load_origin(run.folder), run.folder / FILES["table"]
    there = pq.read_schema(path).names
    needed = [*NEEDED, *columns_needed(run.recipe.select, there)]
    with ThreadPoolExecutor() as pool:
        table = pool.submit(_read_columns, path, needed, _again(run))
        prompts = pool.submit(
            _read_columns, run.folder / FILES["prompts"], ["prompt_id"], _again(run)
        )
        scores = load_scores(run)
        return Pairs(table=table.result(), prompts=prompts.result(), origin=origin), scores


def _embeddings(run: Run, pairs: Pairs | None) -> npt.NDArray[np.float32]:
    from fifa.scoring.encoders import prompt_embeddings

    pairs = load_pairs(run.folder) if pairs is None else pairs
    return prompt_embeddings(pairs, run.recipe.score.diversity, run.scores)


def _unreadable(
    run: Run, columns: Callable[[list[str]], pa.Table], margins: Iterable[str]
) -> list[str]:
    """The ids of pairs with an image that a reward model could not open."""
    from fifa.scoring.rewards.engine import unreadable_path

    listed = [path for name in margins if (path := unreadable_path(run.scores / name)).exists()]
    images = [read_table(path, ["image"], do=_again(run))["image"] for path in listed]
    keys = pa.chunked_array([chunk for column in images for chunk in column.chunks], pa.string())
    if len(keys) == 0:
        return []
    table = columns(["pair_id", "image_0", "image_1"])
    sides = (pc.is_in(table[name], value_set=keys) for name in ("image_0", "image_1"))
    bad: list[str] = table["pair_id"].filter(pc.or_(*sides)).to_pylist()
    return bad


def _columns(
    run: Run, pairs: Pairs | None, names: list[str], rows: Integers | None = None
) -> pa.Table:
    """Columns of the table of pairs, from memory or its file; of some rows (ascending) or all."""
    path = run.folder / FILES["table"]
    if pairs is not None:
        table = pairs.table.select(names)
        return table if rows is None else take(table, rows)
    return _read_columns(path, names, _again(run)) if rows is None else take_rows(path, rows, names)


def _scores(path: Path, schema: pa.Schema, base: Path, do: str) -> pa.Table:
    """A score table; without its ids where they are those of ``base``, row by row."""
    key, *columns = schema.names
    for file in (path, base):
        check_whole(file, do)
    known = _same_rows(path, base, key)
    return _read_columns(path, columns if known else [key, *columns], do)


def _same_rows(first: Path, second: Path, column: str) -> bool:
    # Row groups of one length, with the same smallest and largest random id each, and the same
    # ids throughout the first: reading ten million ids twice to compare them would cost more
    # than the selection.
    with pq.ParquetFile(first) as one, pq.ParquetFile(second) as other:
        bounds = _bounds(one, column)
        if bounds is None or bounds != _bounds(other, column):
            return False
        if one.num_row_groups == 0:
            return True
        ids = (file.read_row_group(0, [column])[column] for file in (one, other))
        return bool(next(ids).equals(next(ids)))


def _bounds(file: pq.ParquetFile, column: str) -> list[tuple[int, Any, Any]] | None:
    if column not in file.schema_arrow.names:
        return None
    place = file.schema_arrow.names.index(column)
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    found = [(group.num_rows, group.column(place).statistics) for group in groups]
    if any(known is None or not known.has_min_max for _, known in found):
        return None
    return [(rows, known.min, known.max) for rows, known in found]


def _read_columns(path: Path, columns: list[str], do: str) -> pa.Table:
    # The whole file at once, in one chunk a column: neither here nor later are ids copied.
    check_whole(path, do)
    with pq.ParquetFile(path, pre_buffer=False) as file:
        known = set(file.schema_arrow.names)
        return file.read([name for name in columns if name in known])
