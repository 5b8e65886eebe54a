"""Only pairs whose images can be decoded: look at the selected ones, replace what fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fifa.console import echo, note, progress
from fifa.data.images import Door, Images
from fifa.data.prefetch import decode_images
from fifa.shards.files import read_table, write_table
from fifa.shards.sealed import DamagedError

UNREADABLE = pa.schema([("pair_id", pa.string()), ("side", pa.int8()), ("reason", pa.string())])
UNREADABLE_FILE = "unreadable.parquet"
CHECKED_FILE = "checked.parquet"  # verdicts of all images decoded so far; reason null: readable
BATCH = 1024  # pairs looked at between two writes of the verdicts
WAITING = 32  # images in memory at once

Load = Callable[[npt.NDArray[np.int64]], Images]
Choose = Callable[[list[str]], pa.Table]
_BY_ID = [("pair_id", "ascending"), ("side", "ascending")]


def select_readable(
    load: Load, selection: pa.Table, choose: Choose, folder: Path, door: Door
) -> pa.Table:
    """Select, decode the images of what is selected, and select again without what failed.

    Parameters
    ----------
    load
        From rows of the table of pairs (ascending) to their images, two a pair, in that order.
    selection
        ``choose([])``, to begin with.
    choose
        From the ids of unreadable pairs to a selection.
    folder
        Verdicts are kept here (``checked.parquet``), so that no image is decoded twice;
        ``unreadable.parquet`` gets the pairs that this selection had to do without.
    door
        `fifa.data.images.read`, as it is to be called.

    Returns
    -------
    The selection, all of whose pairs are readable. It depends on the images and ``choose``, not
    on what was decoded earlier.
    """
    bad = UNREADABLE.empty_table()
    while True:
        found = _unreadable(load, selection, folder, door)
        if found.num_rows == 0:
            write_table(folder / UNREADABLE_FILE, bad.sort_by(_BY_ID))
            note(unreadable_pairs=len(bad["pair_id"].unique()))
            return selection
        bad = pa.concat_tables([bad, found])
        selection = choose(bad["pair_id"].unique().to_pylist())


def _known(path: Path) -> pa.Table:
    """The verdicts that were kept."""
    try:
        return read_table(path)
    except DamagedError:
        if path.exists():
            echo(f"{path} is damaged: made again")
        return UNREADABLE.empty_table()


def _unreadable(load: Load, selection: pa.Table, folder: Path, door: Door) -> pa.Table:
    """Decode both images of every selected pair: `UNREADABLE`, the sides that failed."""
    rows = np.flatnonzero(pc.equal(selection["status"].cast(pa.string()), "selected"))
    ids = selection["pair_id"].take(rows)
    path = folder / CHECKED_FILE
    known = _known(path)
    fresh = rows[~pc.is_in(ids, value_set=known["pair_id"].combine_chunks()).to_numpy()]
    with progress("decoding the selected images", len(fresh)) as advance:
        for start in range(0, len(fresh), BATCH):
            part = fresh[start : start + BATCH]
            named = selection["pair_id"].take(part).to_pylist()
            decoded = decode_images(door(load(part)), lambda image, row: None, most=WAITING)
            verdicts = [
                {"pair_id": named[row // 2], "side": row % 2, "reason": bad and bad.reason}
                for row, bad in decoded
            ]
            known = pa.concat_tables([known, pa.Table.from_pylist(verdicts, schema=UNREADABLE)])
            known = known.sort_by(_BY_ID)
            write_table(path, known)
            advance(len(part))
    mine = known.filter(pc.is_in(known["pair_id"], value_set=ids.combine_chunks()))
    return mine.filter(mine["reason"].is_valid())
