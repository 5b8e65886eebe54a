"""Parquet files from outside: what is unpacked is a stated multiple of what is in the file.

A few kilobytes may stand for gigabytes, four times over: pages unpack, values are repeated by
their number in a dictionary, one run says a million times the same, and a footer may claim any
number of rows. So a file has at most `ROWS` rows and one more a byte, and of the columns that are
read no more than `SPARE` bytes and `TIMES` those of the file come into memory, by its footer before
anything is unpacked, and by what is there before repeated values are written out.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fifa.data.decode import MAX_BYTES
from fifa.errors import FifaError

SPARE = 256 << 20  # bytes
TIMES = 100
ROWS = 1_000_000
BATCH = 32  # rows of cells in memory at a time

Source = str | os.PathLike[str] | IO[bytes] | io.RawIOBase | io.BytesIO


def check_rows(source: Source, metadata: pq.FileMetaData, where: str) -> None:
    """`FifaError` for more rows than a file of this size can have if each row says something."""
    size = _size(source)
    if metadata.num_rows > ROWS + size:
        raise FifaError(
            f"{metadata.num_rows:,} rows in {size:,} bytes",
            where=where,
            do="write the file again without its empty rows, if it is yours",
        )


def read_columns(
    source: Source,
    columns: Iterable[str],
    where: str,
    *,
    metadata: pq.FileMetaData | None = None,
    as_dictionary: str | None = None,
) -> pa.Table:
    """Columns of a file, within the bounds of this module.

    Parameters
    ----------
    source
        The file's path, or the file opened.
    columns
        Their names; a dot goes into a struct.
    where
        The file's name, for the message.
    metadata
        Its footer, where that is known.
    as_dictionary
        The column of strings that may stay dictionary-encoded; every other one is written out.

    Raises `FifaError` for a file that unpacks to more.
    """
    names = sorted(set(columns))
    with pq.ParquetFile(source, metadata=metadata, pre_buffer=False) as opened:
        metadata, schema = opened.metadata, opened.schema_arrow
    check_rows(source, metadata, where)
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    leaves = [(i, path) for i, path in enumerate(paths) if _is_below(path, set(names))]
    most = SPARE + TIMES * _size(source)
    unpacked, largest = 0, 1
    coded: set[str] = {as_dictionary} if as_dictionary else set()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        repeated = 1
        for i, path in leaves:
            column = group.column(i)
            whole = max(0, column.total_uncompressed_size)
            unpacked += whole + 8 * max(0, column.num_values)
            if column.has_dictionary_page and column.physical_type == "BYTE_ARRAY":
                if path in schema.names and not pa.types.is_nested(schema.field(path).type):
                    coded.add(path)
                else:  # no more than so many bytes repeat
                    repeated += whole
        largest = max(largest, repeated)
    _check(unpacked, most, where)
    far = not isinstance(source, str | os.PathLike)  # few requests where each one costs
    with pq.ParquetFile(
        source, metadata=metadata, read_dictionary=sorted(coded), pre_buffer=far
    ) as opened:
        if largest == 1:
            table = opened.read(columns=names)
        else:
            table = _in_batches(
                opened, names, max(1, min(1 << 16, SPARE // 8 // largest)), most, where
            )
    for i, field in enumerate(table.schema):
        if not pa.types.is_dictionary(field.type) or field.name == as_dictionary:
            continue
        unpacked += sum(_written_out(chunk) for chunk in table[i].chunks)
        _check(unpacked, most, where)
        kind = schema.field(field.name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        plain = pa.chunked_array(map(_plain, table[i].chunks), field.type.value_type)
        table = table.set_column(i, field.name, plain.cast(kind))
    return table


def rows_at_once(group: pq.RowGroupMetaData, leaves: Sequence[str]) -> int:
    """Rows of images' cells to be read at a time, `BATCH` or as many as `SPARE` holds for certain.

    A value of a column's dictionary may be that of every row. It has no more bytes than the
    dictionary's page and what is unpacked from the column. Raises `ValueError` for cells that
    unpack to `TIMES` their bytes and more than an image may have.
    """
    largest = 1
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema not in leaves:
            continue
        packed, whole = column.total_compressed_size, column.total_uncompressed_size
        if whole > max(MAX_BYTES, TIMES * packed):
            raise ValueError(f"its cells unpack from {packed:,} to {whole:,} bytes")
        if column.has_dictionary_page:
            page = column.data_page_offset - column.dictionary_page_offset
            largest += max(0, page) + max(0, whole - packed)
    return max(1, min(BATCH, SPARE // largest))


def _in_batches(
    opened: pq.ParquetFile, names: list[str], rows: int, most: int, where: str
) -> pa.Table:
    batches, held = [], 0
    for batch in opened.iter_batches(rows, columns=names):
        held += batch.nbytes
        _check(held, most, where)
        batches.append(batch)
    if batches:
        return pa.Table.from_batches(batches)
    return opened.read_row_groups([], columns=names)


def _written_out(chunk: pa.DictionaryArray) -> int:
    """Bytes of the values, each as often as it is there; at most twice what they are."""
    kind = chunk.type.value_type
    if pa.types.is_primitive(kind):
        return len(chunk) * 8
    lengths = np.asarray(pc.fill_null(pc.binary_length(chunk.dictionary), 0))
    most = len(chunk) * int(lengths.max(initial=0))
    if most <= 2 * int(lengths.sum()):
        return most  # ids: all of a length, and few of them twice
    return int(lengths[np.asarray(chunk.indices.drop_null())].sum())


def _plain(chunk: pa.DictionaryArray) -> pa.Array:
    """The values, each as often as it is there; nothing is copied where each is there once."""
    if len(chunk) == len(chunk.dictionary) and not chunk.null_count:
        indices = np.asarray(chunk.indices)
        if np.array_equal(indices, np.arange(len(indices))):
            return chunk.dictionary
    return chunk.dictionary_decode()


def _is_below(path: str, names: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:n]) in names for n in range(1, len(parts) + 1))


def _check(unpacked: int, most: int, where: str) -> None:
    if unpacked > most:
        raise FifaError(
            f"its columns unpack to {unpacked:,} bytes or more, over {TIMES} times the file",
            where=where,
            do="see who made it: such a file fills memory and says little",
        )


def _size(source: Source) -> int:
    if isinstance(source, str | os.PathLike):
        return os.stat(source).st_size  # noqa: PTH116
    at = source.tell()
    size = source.seek(0, os.SEEK_END)
    source.seek(at)
    return size
