"""Only pairs whose images can be decoded: look at the selected ones, replace what fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fifa.console import note, progress
from fifa.data.decode import BadImage, check_image
from fifa.data.images import read_images
from fifa.data.table import Pairs
from fifa.shards.files import write_table

UNREADABLE = pa.schema([("pair_id", pa.string()), ("side", pa.int8()), ("reason", pa.string())])
UNREADABLE_FILE = "unreadable.parquet"
CHECKED_FILE = "checked.parquet"  # verdicts of all images decoded so far; reason null: readable
BATCH = 1024  # pairs looked at between two writes of the verdicts
FETCHED = "fetched"  # the folder of what was downloaded to be looked at, until it is exported
WAITING = 32  # images in memory at once

Load = Callable[[npt.NDArray[np.int64]], Pairs]
Choose = Callable[[list[str]], pa.Table]


def select_readable(
    load: Load,
    selection: pa.Table,
    choose: Choose,
    folder: Path,
    *,
    allow_download: bool = False,
) -> pa.Table:
    """Select, decode the images of what is selected, and select again without what failed.

    Parameters
    ----------
    load
        From rows of the table (ascending) to whole pairs in that order.
    selection
        ``choose([])``, to begin with.
    choose
        From the ids of unreadable pairs to a selection.
    folder
        Verdicts are kept here (``checked.parquet``), so that no image is decoded twice;
        ``unreadable.parquet`` gets the pairs that this selection had to do without, and
        ``fetched`` the images that were downloaded, so that none is fetched twice.
    allow_download
        Fetch images that the source only names by URL.

    Returns
    -------
    The selection, all of whose pairs are readable. It depends on the images and ``choose``, not
    on what was decoded earlier.
    """
    bad = UNREADABLE.empty_table()
    while True:
        found = check_selected(load, selection, folder, allow_download=allow_download)
        if found.num_rows == 0:
            write_table(folder / UNREADABLE_FILE, bad.sort_by(_BY_ID))
            note(unreadable_pairs=len(bad["pair_id"].unique()))
            return selection
        bad = pa.concat_tables([bad, found])
        selection = choose(bad["pair_id"].unique().to_pylist())


def check_selected(
    load: Load, selection: pa.Table, folder: Path | None = None, *, allow_download: bool = False
) -> pa.Table:
    """Decode both images of every selected pair: `UNREADABLE`, the sides that failed."""
    rows = np.flatnonzero(pc.equal(selection["status"].cast(pa.string()), "selected"))
    ids = selection["pair_id"].take(rows)
    known = _load_verdicts(folder)
    fresh = rows[~pc.is_in(ids, value_set=known["pair_id"].combine_chunks()).to_numpy()]
    with progress("decoding the selected images", len(fresh)) as advance:
        for start in range(0, len(fresh), BATCH):
            batch = load(fresh[start : start + BATCH])
            verdicts = _verdicts(batch, folder, allow_download=allow_download)
            known = pa.concat_tables([known, verdicts]).sort_by(_BY_ID)
            if folder is not None:
                write_table(folder / CHECKED_FILE, known)
            advance(len(batch))
    mine = known.filter(pc.is_in(known["pair_id"], value_set=ids.combine_chunks()))
    return mine.filter(mine["reason"].is_valid())


_BY_ID = [("pair_id", "ascending"), ("side", "ascending")]


def _load_verdicts(folder: Path | None) -> pa.Table:
    if folder is None or not (folder / CHECKED_FILE).exists():
        return UNREADABLE.empty_table()
    return pq.read_table(folder / CHECKED_FILE)


def _verdicts(pairs: Pairs, folder: Path | None, *, allow_download: bool) -> pa.Table:
    ids = pairs.table["pair_id"].to_pylist()
    found = [
        {"pair_id": ids[row], "side": side, "reason": reason}
        for row, side, reason in _decoded(pairs, folder, allow_download=allow_download)
    ]
    return pa.Table.from_pylist(found, schema=UNREADABLE)


def _decoded(
    pairs: Pairs, folder: Path | None, *, allow_download: bool
) -> Iterator[tuple[int, int, str | None]]:
    fetched = folder / FETCHED if folder else None
    rows = range(len(pairs))
    images = read_images(pairs, rows, allow_download=allow_download, fetched=fetched)
    with ThreadPoolExecutor() as pool:  # decoders let other threads run
        while wave := list(islice(images, WAITING)):
            jobs: list[tuple[int, int, Future[Any]]] = [
                (row, side, pool.submit(_reason, data)) for row, side, data in wave
            ]
            for row, side, job in jobs:
                yield row, side, job.result()


def _reason(data: bytes | BadImage) -> str | None:
    if isinstance(data, BadImage):
        return str(data)
    try:
        check_image(data)
    except BadImage as error:
        return str(error)
    return None
