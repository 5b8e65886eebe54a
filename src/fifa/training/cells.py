"""Images in the cells of Parquet files, read row group by row group, never all at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fifa.data.decode import MAX_BYTES, BadImage
from fifa.errors import FifaError

IMAGES = ("jpg_0", "jpg_1")
BATCH = 16  # rows of images in memory at a time

Cell = tuple[int, int, int]  # file, row in it, column: 0 is jpg_0


@dataclass(frozen=True)
class Cells:
    """The image columns of some Parquet files.

    Parameters
    ----------
    files
        With the columns ``jpg_0`` and ``jpg_1``: binary, or a struct with the field ``bytes``.
    """

    files: tuple[Path, ...]

    def read(self, cells: Iterable[Cell]) -> Iterator[bytes | BadImage]:
        """The bytes of ``cells``, in their order.

        Cells in the order of files and rows are read in one pass; memory holds `BATCH` rows.
        """
        opened: tuple[int, pq.ParquetFile] | None = None
        for (file, _), run in groupby(_runs(cells), key=lambda item: item[0]):
            wanted = [cell for _, cell in run]
            if opened is None or opened[0] != file:
                opened = file, open_parquet(self.files[file])
            try:
                yield from _column_bytes(opened[1], wanted)
            except (OSError, pa.ArrowException) as error:
                raise cannot_read(self.files[file], error) from error


def open_parquet(path: Path) -> pq.ParquetFile:
    """The opened file; `FifaError` where it is none."""
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, pa.ArrowException) as error:
        raise cannot_read(path, error) from error


def cannot_read(path: Path, error: Exception) -> FifaError:
    """The message for a damaged or missing Parquet file."""
    brief = str(error).partition("\n")[0][:150]
    return FifaError(f"cannot read the Parquet file: {brief}", where=str(path))


def _runs(cells: Iterable[Cell]) -> Iterator[tuple[tuple[int, int], Cell]]:
    """Every cell with (file, number of the run), a run being rows that do not go back."""
    number, last = 0, (0, 0)
    for cell in cells:
        place = cell[:2]
        if place < last:
            number += 1
        last = place
        yield (cell[0], number), cell


def _column_bytes(file: pq.ParquetFile, cells: list[Cell]) -> Iterator[bytes | BadImage]:
    """The bytes of cells of one file whose rows ascend."""
    names = {IMAGES[column] for *_, column in cells}
    schema = file.schema_arrow
    leaves = [
        f"{name}.bytes" if pa.types.is_struct(schema.field(name).type) else name
        for name in sorted(names)
    ]
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    of_group = np.searchsorted(starts, [row for _, row, _ in cells], side="right") - 1
    place = 0
    for group in np.unique(of_group).tolist():
        first = int(starts[group])
        batches = file.iter_batches(batch_size=BATCH, row_groups=[group], columns=leaves)
        for batch in batches:
            end = first + batch.num_rows
            while place < len(cells) and cells[place][1] < end:
                _, row, column = cells[place]
                yield _bytes(batch.column(IMAGES[column])[row - first].as_py())
                place += 1
            first = end
            if place == len(cells) or of_group[place] != group:
                break


def _bytes(value: Any) -> bytes | BadImage:
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes) or not value:
        return BadImage("the cell is empty")
    return value if len(value) <= MAX_BYTES else BadImage(f"more than {MAX_BYTES:,} bytes")
