"""The files of a subset: Parquet shards with the columns that Diffusion-DPO trainers read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from fifa.console import progress
from fifa.data.decode import BadImage
from fifa.data.images import Door, Found, pair_images
from fifa.data.records import tar_ref
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.selection.table import SELECTION
from fifa.shards.files import content_digest, digest

Integers = npt.NDArray[np.int64]

SHARD_BYTES = 256 << 20  # of images in a file
GROUP_BYTES = 32 << 20  # of images in a row group: what is in memory at once
GROUP_ROWS = 1024

IMAGES = ("jpg_0", "jpg_1")
FROM_SELECTION = [name for name in SELECTION.names if name not in ("pair_id", "status", "reason")]
COLUMNS = pa.schema(
    [
        ("jpg_0", pa.binary()),  # the original bytes, whatever the image format
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),  # 1: image 0 is the winner; 0: image 1
        ("label_1", pa.float64()),
        ("caption", pa.string()),
        ("are_different", pa.bool_()),  # Pick-a-Pic's; always true
        ("has_label", pa.bool_()),  # Pick-a-Pic's; always true
        ("image_0_uid", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_0_url", pa.string()),  # URL or path in the source, if it names one
        ("image_1_url", pa.string()),
        ("pair_id", pa.string()),
        ("prompt_id", pa.string()),
        ("label", pa.float32()),  # the people's label, which may lie between 0 and 1
        ("votes", pa.int32()),
        *(SELECTION.field(name) for name in FROM_SELECTION),
    ]
)


@dataclass(frozen=True)
class Written:
    """Shards that were written.

    Parameters
    ----------
    files
        ``name`` below the folder, ``bytes`` and ``xxh3_128`` of each.
    content
        uint64 [pairs]: XXH3-64 of what the source gave of every pair, its images included.
    """

    files: list[dict[str, Any]]
    content: npt.NDArray[np.uint64]


def subset_rows(pairs: Pairs, rows: Integers, columns: dict[str, pa.Array]) -> pa.Table:
    """`COLUMNS` without the images, for some rows of the pairs.

    Parameters
    ----------
    pairs
        The pairs, whole.
    rows
        int64 [subset], rows of ``pairs.table`` in the subset's order.
    columns
        `FROM_SELECTION`, [subset] each.
    """
    chosen = pairs.table.take(rows)
    label = chosen["label"].to_numpy()
    first_wins = (label > 0.5).astype(np.float64)  # no ties here: one side is above a half
    yes = pa.array(np.ones(len(rows), bool))
    made: dict[str, pa.Array | pa.ChunkedArray] = {
        "label_0": pa.array(first_wins),
        "label_1": pa.array(1 - first_wins),
        "caption": chosen["prompt"].cast(pa.string()),
        "are_different": yes,
        "has_label": yes,
        "image_0_uid": chosen["image_0"],
        "image_1_uid": chosen["image_1"],
        "image_0_url": _named(chosen["image_0_ref"]),
        "image_1_url": _named(chosen["image_1_ref"]),
        "pair_id": chosen["pair_id"],
        "prompt_id": chosen["prompt_id"].cast(pa.string()),
        "label": chosen["label"],
        "votes": chosen["votes"],
        **columns,
    }
    schema = pa.schema([field for field in COLUMNS if field.name not in IMAGES])
    return pa.table([made[name] for name in schema.names], schema=schema).combine_chunks()


def _named(refs: pa.ChunkedArray) -> pa.Array:
    # where a cell or a tar member lies is the source's business; a URL or a path is a name
    def name(ref: str | None) -> str | None:
        return None if ref is None or ref.startswith("cell:") or tar_ref(ref) else ref

    return pa.array(map(name, refs.to_pylist()), pa.string())


def write_shards(
    folder: Path,
    pairs: Pairs,
    rows: Integers,
    table: pa.Table,
    door: Door | None,
) -> Written:
    """Write ``data/train-00000-of-0000N-<digest>.parquet`` and so on, in the order of ``rows``.

    The digest of its content is in a file's name, as `datasets` caches what it reads by name.

    Parameters
    ----------
    folder
        An empty folder.
    pairs, rows
        Where the images are.
    table
        `subset_rows` of them.
    door
        `fifa.data.images.read`, as it is to be called; None writes no image columns, and the
        subset has references only.

    Returns
    -------
    Written

    Raises
    ------
    FifaError
        If an image cannot be read.
    """
    (folder / "data").mkdir()
    with tempfile.TemporaryFile(dir=folder) as spool:
        # The source is read in its own order, once; the subset is written in rank order.
        places = np.zeros((len(rows), 2, 2), np.int64)  # offset and size of every image
        if door is not None:
            slots = np.stack([2 * rows, 2 * rows + 1], axis=1).reshape(-1)
            images = pair_images(pairs.table, pairs.origin, slots)
            _fill(spool, places, table["pair_id"], door(images))
        shards = plan_shards(places[..., 1].sum(axis=1))
        content = np.zeros(len(rows), np.uint64)
        files = []
        for number, groups in enumerate(shards):
            name = f"train-{number:05d}-of-{len(shards):05d}"
            schema = COLUMNS if door is not None else table.schema
            with pq.ParquetWriter(folder / "data" / name, schema, **_settings(schema)) as writer:
                for start, end in groups:
                    part = table.slice(start, end - start)
                    cells = [_read_both(spool, place) for place in places[start:end]]
                    content[start:end] = _content(part, cells)
                    if door is not None:
                        part = _with_images(part, cells)
                    writer.write_table(part, row_group_size=GROUP_ROWS)
            files.append(_file(folder, name))
    return Written(files, content)


def plan_shards(sizes: Sequence[int] | Integers) -> list[list[tuple[int, int]]]:
    """Cut rows of given sizes in bytes into shards of row groups, ``(start, end)`` each."""
    shards: list[list[tuple[int, int]]] = [[]]
    start = group = shard = 0
    for row, size in enumerate(int(size) for size in sizes):
        full = row - start >= GROUP_ROWS or group + size > GROUP_BYTES
        if row > start and full:
            shards[-1].append((start, row))
            shard += group
            start, group = row, 0
            if shard + size > SHARD_BYTES:
                shards.append([])
                shard = 0
        group += size
    shards[-1].append((start, len(sizes)))
    return shards


def _file(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "data" / name
    content = content_digest(path)
    path = path.rename(path.with_name(f"{name}-{content[:16]}.parquet"))
    return {"name": f"data/{path.name}", "bytes": path.stat().st_size, "xxh3_128": content}


def _settings(schema: pa.Schema) -> dict[str, object]:
    others = [name for name in schema.names if name not in IMAGES]
    return {
        "compression": {
            name: "none" if name in IMAGES else "zstd" for name in schema.names
        },  # images are compressed already
        "use_dictionary": others,
        "write_statistics": others,
    }


def _fill(
    spool: IO[bytes],
    places: Integers,
    pair_id: pa.ChunkedArray,
    found: Iterable[Found],
) -> None:
    """Image ``side`` of pair i, number 2 i + side of what was found, at ``places[i, side]``."""
    bad: list[tuple[int, BadImage]] = []
    with progress("reading images", 2 * len(places)) as advance:
        for image, data in found:
            advance(1)
            if isinstance(data, BadImage):
                bad.append((image, data))
                continue
            places[image // 2, image % 2] = spool.tell(), len(data)
            spool.write(data)
    if bad:
        image, error = min(bad, key=lambda found: found[0])
        raise FifaError(
            f"{len(bad):,} images of the selected pairs cannot be read; the first: {error}",
            where=f"pair {pair_id[image // 2]}, image {image % 2}",
            do="select again: pairs with unreadable images are then replaced",
        )


def _read_both(spool: IO[bytes], place: Integers) -> tuple[bytes, bytes]:
    found = []
    for offset, size in place.tolist():
        spool.seek(offset)
        found.append(spool.read(size))
    return found[0], found[1]


def _content(part: pa.Table, cells: list[tuple[bytes, bytes]]) -> list[int]:
    names = ["caption", "label", "votes", "image_0_uid", "image_1_uid"]
    known = zip(*(part[name].to_pylist() for name in names), strict=True)
    return [
        xxhash.xxh3_64_intdigest(digest(list(facts), *images).encode())
        for facts, images in zip(known, cells, strict=True)
    ]


def _with_images(part: pa.Table, cells: list[tuple[bytes, bytes]]) -> pa.Table:
    columns = [pa.array([cell[side] for cell in cells], pa.binary()) for side in (0, 1)]
    return pa.Table.from_arrays([*columns, *part.columns], schema=COLUMNS)
