"""Selecting in a run folder: read what is needed, select, write ``selection.parquet``."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fifa.config import Select
from fifa.console import note
from fifa.data.images import has_pixels
from fifa.data.table import FILES, PAIRS, Pairs, load_origin
from fifa.errors import FifaError
from fifa.scoring.table import DIVERSITY, MARGIN, QUALITY, Scores
from fifa.selection.choose import Embeddings, select
from fifa.selection.readable import select_readable
from fifa.selection.table import reason_counts
from fifa.shards.files import write_table

SELECTION_FILE = "selection.parquet"
NEEDED = ["pair_id", "prompt_index", "label", "repeat"]
IMAGE_COLUMNS = [
    name for name in PAIRS.names if name.startswith(("pair_id", "image", "file", "row", "swap"))
]


def select_folder(
    folder: Path,
    knobs: Select,
    *,
    margin_paths: dict[str, Path],
    quality_path: Path | None = None,
    diversity_path: Path | None = None,
    embeddings: Embeddings | None = None,
    unreadable: Collection[str] = (),
    allow_download: bool = False,
) -> pa.Table:
    """Select from a scored run and write ``selection.parquet``.

    Parameters
    ----------
    folder
        The run folder, with the pairs.
    knobs
        What is kept.
    margin_paths, quality_path, diversity_path
        The score files, `fifa.scoring.table.MARGIN` by scorer, `QUALITY` and `DIVERSITY`.
    embeddings
        As `fifa.select` takes them.
    unreadable
        Ids of pairs that a reward model could not open.
    allow_download
        Look at images that have to be fetched, too.

    Returns
    -------
    The selection. Where the source has images, those of every selected pair were decoded; a
    pair with an unreadable one is dropped and the next in rank takes its place
    (``unreadable.parquet``; `fifa.selection.readable`).
    """
    origin = load_origin(folder)
    if origin is None:
        raise FifaError("no pairs here", where=str(folder), do="run `fifa read SOURCE --out RUN`")
    table, prompts = folder / FILES["table"], folder / FILES["prompts"]
    with ThreadPoolExecutor() as pool:
        narrow = pool.submit(_read, table, NEEDED)
        named = pool.submit(_read, prompts, ["prompt_id"])
        scores = Scores(
            margins={name: _scores(path, MARGIN, table) for name, path in margin_paths.items()},
            quality=_scores(quality_path, QUALITY, prompts) if quality_path else None,
            diversity=_scores(diversity_path, DIVERSITY, prompts) if diversity_path else None,
        )
        pairs = Pairs(table=narrow.result(), prompts=named.result(), origin=origin)

    def choose(found: list[str]) -> pa.Table:
        bad = {*unreadable, *found}
        return select(pairs, scores, knobs, unreadable=bad, embeddings=embeddings)

    selection = choose([])
    some = np.flatnonzero(selection["rank"].combine_chunks().is_valid())[:1]
    first = load_rows(folder, some)
    if allow_download or has_pixels(first.table, first.origin):
        selection = select_readable(
            lambda rows: load_rows(folder, rows),
            selection,
            choose,
            folder,
            allow_download=allow_download,
        )
    used = {
        "select": asdict(knobs),
        "margin": {name: path.name for name, path in margin_paths.items()},
        "quality": quality_path.name if quality_path else None,
        "diversity": diversity_path.name if diversity_path else None,
    }
    write_selection(folder, selection, used)
    note(**reason_counts(selection))
    return selection


def write_selection(folder: Path, selection: pa.Table, used: dict[str, Any]) -> None:
    """Write ``selection.parquet``; ``used`` (JSON) goes into its metadata as ``fifa.select``."""
    metadata = {"fifa.select": json.dumps(used, sort_keys=True)}
    # Random ids and floats hardly compress, and a dictionary helps the names only: 52 bytes a pair.
    write_table(
        folder / SELECTION_FILE,
        selection.replace_schema_metadata(metadata),
        compression="none",
        use_dictionary=["status", "reason"],
        write_statistics=["rank", "importance"],
        row_group_size=1 << 20,
    )


def load_rows(folder: Path, rows: npt.NDArray[np.integer[Any]]) -> Pairs:
    """Some pairs of a run folder, with what opening their images takes, and no others.

    Parameters
    ----------
    folder
        The run folder.
    rows
        Rows of the table, ascending; the result has them in this order.
    """
    origin = load_origin(folder)
    assert origin is not None  # the pairs were loaded before
    parts = []
    with pq.ParquetFile(folder / FILES["table"]) as file:
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            mine = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)]
            if len(mine):
                parts.append(file.read_row_group(group, IMAGE_COLUMNS).take(mine - start))
            start = end
        table = pa.concat_tables(parts) if parts else PAIRS.empty_table().select(IMAGE_COLUMNS)
    prompts = pq.read_table(folder / FILES["prompts"], columns=["prompt_id"])
    return Pairs(table=table.unify_dictionaries(), prompts=prompts, origin=origin)


def _scores(path: Path, schema: pa.Schema, base: Path) -> pa.Table:
    """A score table; without its ids where they are those of ``base``, row by row."""
    key, *columns = schema.names
    with _named_errors(path):
        known = _same_rows(path, base, key)
    return _read(path, columns if known else [key, *columns])


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


def _read(path: Path, columns: list[str]) -> pa.Table:
    # The whole file at once, in one chunk a column: neither here nor later are ids copied.
    with _named_errors(path), pq.ParquetFile(path, pre_buffer=False) as file:
        known = set(file.schema_arrow.names)
        return file.read([name for name in columns if name in known])


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise FifaError(
            f"cannot read a table: {error}", where=str(path), do="score again with `fifa score`"
        ) from error
