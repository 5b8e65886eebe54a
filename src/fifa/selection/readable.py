"""Only pairs of two images that can be decoded: look at the selected ones, replace what fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from PIL import Image

from fifa.console import echo, note, progress
from fifa.data.decode import BadImage
from fifa.data.images import Door, Images
from fifa.data.prefetch import decode_images
from fifa.errors import FifaError
from fifa.shards.files import read_table, write_table
from fifa.shards.sealed import DamagedError

UNREADABLE = pa.schema([("pair_id", pa.string()), ("side", pa.int8()), ("reason", pa.string())])
UNREADABLE_FILE = "unreadable.parquet"
CHECKED_FILE = "checked.parquet"  # verdicts of all images decoded so far; reason null: readable
BATCH = 1024  # pairs looked at between two writes of the verdicts
WAITING = 32  # images in memory at once

Load = Callable[[npt.NDArray[np.int64]], Images]
Choose = Callable[[list[str], list[str]], pa.Table]
SAME = "both images of the pair have the same pixels"
_BY_ID = [("pair_id", "ascending"), ("side", "ascending")]


def select_readable(
    load: Load, selection: pa.Table, choose: Choose, folder: Path, door: Door, *, drop_same: bool
) -> pa.Table:
    """Select, decode the images of what is selected, and select again without what failed.

    Parameters
    ----------
    load
        From rows of the table of pairs (ascending) to their images, two a pair, in that order.
    selection
        ``choose([], [])``, to begin with.
    choose
        From the ids of unreadable pairs, and of pairs of an image with itself, to a selection.
    folder
        Verdicts are kept here (``checked.parquet``), so that no image is decoded twice;
        ``unreadable.parquet`` gets the pairs that this selection had to do without.
    door
        `fifa.data.images.read`, as it is to be called.
    drop_same
        Whether to do without pairs of an image with itself, in whatever formats.

    Returns
    -------
    The selection, all of whose pairs are readable. It depends on the images and ``choose``, not
    on what was decoded earlier.
    """
    bad = UNREADABLE.empty_table()
    while True:
        found = _failed(load, selection, folder, door)
        if not drop_same:
            found = found.filter(pc.not_equal(found["reason"], SAME))
        bad = pa.concat_tables([bad, found])
        same = pc.equal(bad["reason"], SAME)
        unreadable = bad.filter(pc.invert(same))
        if found.num_rows == 0:
            write_table(folder / UNREADABLE_FILE, unreadable.sort_by(_BY_ID))
            note(unreadable_pairs=len(unreadable["pair_id"].unique()))
            return selection
        ids = (table["pair_id"].unique().to_pylist() for table in (unreadable, bad.filter(same)))
        try:
            selection = choose(*ids)
        except FifaError as error:
            if not len(unreadable):
                raise
            first = f"{unreadable['reason'][0]} (pair {unreadable['pair_id'][0]})"
            what = f"{error.what}: {len(unreadable):,} images cannot be read; the first: {first}"
            do = "check where the images are, and relax a gate if other pairs are to take part"
            raise FifaError(what, where=error.where, do=do) from error


def _known(path: Path) -> pa.Table:
    """The verdicts that were kept."""
    try:
        return read_table(path)
    except DamagedError:
        if path.exists():
            echo(f"{path} is damaged: made again")
        return UNREADABLE.empty_table()


def _failed(load: Load, selection: pa.Table, folder: Path, door: Door) -> pa.Table:
    """Decode both images of every selected pair: `UNREADABLE`, the sides that failed.

    Of a pair of an image with itself, that is the second.
    """
    rows = np.flatnonzero(pc.equal(selection["status"].cast(pa.string()), "selected"))
    ids = selection["pair_id"].take(rows)
    path = folder / CHECKED_FILE
    known = _known(path)
    fresh = rows[~pc.is_in(ids, value_set=known["pair_id"].combine_chunks()).to_numpy()]
    with progress("decoding the selected images", len(fresh)) as advance:
        for start in range(0, len(fresh), BATCH):
            part = fresh[start : start + BATCH]
            named = selection["pair_id"].take(part).to_pylist()
            found = dict(decode_images(door(load(part)), _digest, most=WAITING))
            verdicts = [
                {"pair_id": named[row // 2], "side": row % 2, "reason": _reason(found, row)}
                for row in sorted(found)
            ]
            known = pa.concat_tables([known, pa.Table.from_pylist(verdicts, schema=UNREADABLE)])
            known = known.sort_by(_BY_ID)
            write_table(path, known)
            advance(len(part))
    mine = known.filter(pc.is_in(known["pair_id"], value_set=ids.combine_chunks()))
    return mine.filter(mine["reason"].is_valid())


def _digest(image: Image.Image, row: int) -> bytes:
    return xxhash.xxh3_128_digest(f"{image.size} {image.mode} ".encode() + image.tobytes())


def _reason(found: dict[int, bytes | BadImage], row: int) -> str | None:
    """What is wrong with one side of a pair."""
    one = found[row]
    if isinstance(one, BadImage):
        return one.reason
    return SAME if row % 2 and one == found.get(row - 1) else None
