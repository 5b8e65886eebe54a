"""Which images of the pairs are the same, and how large each is: a pass over bytes and headers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from fifa.console import progress
from fifa.data.decode import BadImage, image_size
from fifa.shards.files import digest, write_table
from fifa.training.pairs import TrainingPairs

PROBE = pa.schema(
    [
        ("content", pa.string()),  # XXH3-128 of the bytes
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)


def probe(pairs: TrainingPairs, folder: Path) -> pa.Table:
    """`PROBE`, row 2 i + side for image ``side`` (0 is the winner) of pair i; kept in ``folder``.

    Raises `FifaError` if an image is missing or its header is no JPEG's, PNG's or WEBP's: before
    anything has been computed.
    """
    path = folder / f"images-{digest(pairs.digest, pairs.fingerprint)}.parquet"
    if path.exists():
        return pq.read_table(path)
    found = list(_look(pairs))
    bad = [(slot, one) for slot, one in enumerate(found) if isinstance(one, BadImage)]
    if bad:
        slot, error = bad[0]
        raise pairs.unreadable(slot // 2, slot % 2, error, len(bad))
    columns = zip(*found, strict=True) if found else ([], [], [])
    table = pa.table(
        [pa.array(list(c), f.type) for c, f in zip(columns, PROBE, strict=True)], PROBE
    )
    write_table(path, table)
    return table


def _look(pairs: TrainingPairs) -> Iterator[tuple[str, int, int] | BadImage]:
    order = ((i, side) for i in range(len(pairs)) for side in (0, 1))
    with progress("looking at images", 2 * len(pairs)) as advance:
        for data in pairs.read(order):
            advance(1)
            if isinstance(data, BadImage):
                yield data
                continue
            try:
                size = image_size(data)
            except BadImage as error:
                yield error
                continue
            yield xxhash.xxh3_128_hexdigest(data), *size


def sizes(table: pa.Table) -> np.ndarray:
    """Height and width, int64 [pairs, 2, 2]."""
    both = np.stack([table["height"].to_numpy(), table["width"].to_numpy()], axis=1)
    return both.astype(np.int64).reshape(-1, 2, 2)
