"""The image table: a row an image, where its bytes are, and the one door through which they come.

Whatever has images (pairs, the cells of Parquet files, files in a folder) becomes `Images` first;
`read` gives their bytes. `fifa.data.prefetch` decodes them in threads.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from fifa.data.archive import split
from fifa.data.columns import bytes_leaves, inner, only
from fifa.data.decode import MAX_BYTES, BadImage, image_size, turn_of
from fifa.data.parquet import BATCH, rows_at_once
from fifa.data.records import WRITTEN_OUT, Place, out_of_file, outside, tar_ref
from fifa.data.refs import file_bytes, named_bytes, remote_bytes, tar_bytes, text_bytes, url_bytes
from fifa.data.remote import Range, RemoteFile, below
from fifa.data.source import BLOCK, Root, has_file
from fifa.data.table import Origin, Pairs
from fifa.shards.files import column_digest, digest

Integers = npt.NDArray[np.int64]
Rows = Sequence[int] | range | Integers
Found = tuple[int, "bytes | BadImage"]  # the image's row in its table, and what came of it
Door = Callable[["Images"], Iterable[Found]]  # `read`, as it is to be called
Opened = str | RemoteFile | io.BytesIO  # a Parquet file
Cell = tuple[int, int, str]  # row in the file, row in the table of images, column

IMAGES = pa.schema(
    [
        ("key", pa.large_string()),  # the image's name in the source
        ("file", pa.dictionary(pa.int32(), pa.string())),  # the source file, below the root
        ("row", pa.int64()),  # the row in it
        ("column", pa.dictionary(pa.int32(), pa.string())),  # of the cell with the bytes; or null
        ("ref", pa.large_string()),  # without a cell: path, URL or tar:OFFSET+SIZE:NAME; or null
    ]
)
FACTS = pa.schema(
    [
        # XXH3-128 of the bytes, and -2 to -8 where Exif turns the picture; null: cannot be read
        ("content", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("reason", pa.string()),  # why the image does not come in, as far as its header tells
    ]
)
KEYED = frozenset({"pickapic"})  # formats whose image keys are ids of the images
WRITTEN_BYTES = tuple(text.encode() for text in WRITTEN_OUT)
DOWNLOADS = 8  # at a time


@dataclass(frozen=True)
class Images:
    """Images, and where the bytes of each are. Nothing is opened for it.

    Parameters
    ----------
    table
        `IMAGES`, a row an image.
    root
        The folder or URL prefix that files and relative paths are below.
    fingerprint
        Names the source as it was read; "" where nothing is kept that depends on it.
    keyed
        True where a key is one image: an id, or a file named by its content; also where to find
        out would be a download. Otherwise different keys may have the same bytes.
    remote, images_from
        As in `fifa.data.table.Origin`.
    """

    table: pa.Table
    root: str
    fingerprint: str = ""
    keyed: bool = False
    remote: dict[str, tuple[int, str]] = field(default_factory=dict)
    images_from: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def take(self, rows: Rows) -> Images:
        """Some of the images, in this order, and nothing else: small enough to travel."""
        part = self.table.take(pa.array(rows, pa.int64()))
        for i, name in enumerate(IMAGES.names):
            if pa.types.is_dictionary(IMAGES.field(name).type):  # only the names that are left
                few = part[name].cast(pa.string()).combine_chunks().dictionary_encode()
                part = part.set_column(i, IMAGES.field(name), few)
        own = set(part["file"].chunk(0).dictionary.to_pylist()) if self.remote else ()
        remote = {name: known for name, known in self.remote.items() if name in own}
        return replace(self, table=part, remote=remote)

    @property
    def identity(self) -> str:
        """Names the source as it was read, and the keys in their order."""
        return digest(self.fingerprint, column_digest(self.table["key"]))

    def place(self, row: int) -> str:
        """Where an image is, for people."""
        one = {name: self.table[name][row].as_py() for name in ("file", "row", "ref")}
        return f"row {one['row']} of {one['file']}" if one["file"] else str(one["ref"])


def unique_images(pairs: Pairs) -> tuple[Images, Integers]:
    """The image behind every image key of ``pairs``, once, and the image in every slot.

    Returns
    -------
    images
        In order of first appearance, each where it stands first.
    of_slot
        The row of ``images`` in every slot (2 * row + side), int64 [2 * pairs].
    """
    n = len(pairs)
    columns = (pairs.table[f"image_{side}"] for side in (0, 1))
    # large: the keys of 100M pairs are more than the 2 GB that a plain string column can hold
    chunks = [chunk.cast(pa.large_string()) for column in columns for chunk in column.chunks]
    encoded = pa.chunked_array(chunks, pa.large_string()).dictionary_encode().unify_dictionaries()
    codes = np.concatenate([np.empty(0, np.int32), *(c.indices for c in encoded.chunks)])
    codes = codes.reshape(2, n).T.reshape(-1)  # by slot
    old, first = np.unique(codes, return_index=True)
    order = np.argsort(first)
    of_code = np.empty(len(old), np.int64)
    of_code[order] = np.arange(len(old))
    return pair_images(pairs.table, pairs.origin, first[order]), of_code[codes]


def pair_images(table: pa.Table, origin: Origin, slots: Rows | None = None) -> Images:
    """The images of some pairs.

    Parameters
    ----------
    table
        The columns ``image_0``, ``image_1``, ``image_0_ref``, ``image_1_ref``, ``file``, ``row``
        and ``swapped`` of `fifa.data.table.PAIRS`; more may be there.
    origin
        `fifa.data.table.Pairs.origin`.
    slots
        Which images, each as 2 * row of ``table`` + side; None takes them all, so that image
        ``side`` of pair i is row 2 * i + side of the result.
    """
    n = len(table)
    slots = np.arange(2 * n) if slots is None else np.asarray(slots, np.int64)
    row, side = slots // 2, slots % 2
    at = pa.array(row)

    def sides(name: str) -> pa.Array:
        columns = (table[name.format(i)] for i in (0, 1))
        chunks = [chunk.cast(pa.large_string()) for column in columns for chunk in column.chunks]
        both = pa.chunked_array(chunks, pa.large_string())
        return both.take(pa.array(row + side * n)).combine_chunks()

    ref = sides("image_{}_ref")
    own = table["row"].take(at).to_numpy()
    column = pa.nulls(len(slots), pa.string())
    if origin.cells:
        second = side ^ table["swapped"].take(at).to_numpy(zero_copy_only=False).astype(np.int64)
        names = pa.DictionaryArray.from_arrays(second.astype(np.int32), list(origin.cells))
        column = pc.if_else(ref.is_null(), names.cast(pa.string()), column)
    file = table["file"].take(at).cast(pa.string()).combine_chunks()
    other = pc.fill_null(pc.starts_with(ref, "in:"), False)
    if pc.any(other).as_py():  # in:LENGTH:FILE:REF, in a file that is not the pair's
        files, refs = zip(*map(out_of_file, ref.filter(other).to_pylist()), strict=True)
        file = pc.replace_with_mask(file, other, pa.array(files, file.type))
        ref = pc.replace_with_mask(ref, other, pa.array(refs, ref.type))
    named = pc.fill_null(pc.starts_with(ref, "cell:"), False)
    if pc.any(named).as_py():  # cell:ROW:COLUMN, a cell of another row
        parts = [name.split(":", 2) for name in ref.filter(named).to_pylist()]
        own = own.copy()
        own[named.to_numpy(zero_copy_only=False)] = [int(number) for _, number, _ in parts]
        column = pc.replace_with_mask(column, named, pa.array([name for *_, name in parts]))
        ref = pc.if_else(named, pa.scalar(None, ref.type), ref)
    return _images(
        [sides("image_{}"), file.dictionary_encode(), own, column.dictionary_encode(), ref],
        root=origin.root,
        fingerprint=origin.fingerprint,
        keyed=origin.format in KEYED or not has_pixels(table, origin),
        remote=origin.remote,
        images_from=origin.images_from,
    )


def cell_images(
    files: Sequence[Path], file: Integers, row: Integers, column: Sequence[str]
) -> Images:
    """Images in the cells of Parquet files.

    Parameters
    ----------
    files
        The files.
    file, row, column
        Where each image is: the number of its file, the row in it, and the name of a column of
        bytes, or of structs with the field ``bytes``; a dot goes into a struct.
    """
    numbers, names = pa.array(file, pa.int32()), [str(path) for path in files]
    places = pa.DictionaryArray.from_arrays(numbers, pa.array(names, pa.string()))
    columns = pa.array(column, pa.string()).dictionary_encode()
    nothing = pa.nulls(len(row), pa.large_string())
    return _images([nothing, places, row, columns, nothing], root="")


def file_images(folder: Path, names: Sequence[str], *, keyed: bool = False) -> Images:
    """Images in files below a folder, by their paths there; ``keyed`` as in `Images`."""
    n = len(names)
    paths = pa.array(names, pa.large_string())
    nothing = pa.nulls(n, pa.string()).dictionary_encode()
    file = pa.array([""] * n, pa.string()).dictionary_encode()
    return _images(
        [paths, file, np.arange(n), nothing, pa.array(map(outside, names), pa.large_string())],
        root=str(folder.resolve()),
        keyed=keyed,
    )


def _images(
    columns: list[pa.Array | Integers],
    root: str,
    fingerprint: str = "",
    keyed: bool = False,
    **more: Any,
) -> Images:
    arrays = [pa.array(column) for column in columns]
    cast = [array.cast(field.type) for array, field in zip(arrays, IMAGES, strict=True)]
    return Images(pa.table(cast, schema=IMAGES), root, fingerprint, keyed, **more)


def has_pixels(table: pa.Table, origin: Origin) -> bool:
    """True if images can be opened without fetching them by URL: cells, tar members, files.

    ``table`` and ``origin`` as for `pair_images`.
    """
    if origin.cells:
        return True
    root = Root(origin.root)
    for ref in table["image_0_ref"].drop_null()[:100].to_pylist():
        if tar_ref(out_of_file(ref)[1]) or ("://" not in ref and root.folder is None):
            return True
        if "://" not in ref and root.folder and has_file(root.folder, split(ref)[0]):
            return True
        if below(ref, (origin.root, *origin.images_from)):
            return True
    return False


def where_images(table: pa.Table, origin: Origin) -> str:
    """In words, where images would be opened; ``table`` and ``origin`` as for `pair_images`."""
    if has_pixels(table, origin):
        return "with the source"
    first = next(iter(table["image_0_ref"].drop_null()[:1].to_pylist()), "")
    if "://" in first:
        return "only known by URL, which --allow-download fetches"
    place = f": there is no {Root(origin.root).name(first)}" if first else ""
    return f"not with the source{place}"


def read(
    images: Images,
    rows: Rows | None = None,
    *,
    allow_download: bool = False,
    fetched: Path | None = None,
    cache_gb: float | None = None,
) -> Iterator[Found]:
    """The bytes of images, as the source has them.

    Parameters
    ----------
    images
        Where they are.
    rows
        Which of them; None takes all.
    allow_download
        Fetch images that are only known by URL, from public addresses.
    fetched
        A folder where fetched images are kept, by their URL, and looked for first; None keeps
        none.
    cache_gb
        As in `fifa.config.Compute`; None is its default.

    Yields
    ------
    (row, bytes or BadImage)
        File by file, in the order in which files come up, and by row in each, so that each is
        read once; of one row's images the first in the table comes first. Tar members, files and
        URLs come after the cells of their source file. Memory holds `BATCH` rows of cells at
        most. No image raises, and none is left out. The bytes are not decoded:
        `fifa.data.prefetch.decode_images` does that, or `fifa.data.decode.open_image`.

    Raises
    ------
    FifaError
        Where a remote source does not answer, refuses, or has changed: what the network loses is
        no unreadable image.
    """
    root = Root(images.root)
    wanted = np.arange(len(images)) if rows is None else np.asarray(rows, np.int64)
    chosen = images.table.select(IMAGES.names[1:]).take(pa.array(wanted)).to_pydict()
    columns = (chosen[name] for name in ("file", "row", "column", "ref"))
    places = list(zip(*columns, wanted.tolist(), strict=True))
    number = {file: i for i, file in enumerate(dict.fromkeys(chosen["file"]))}
    places.sort(key=lambda place: (number[place[0]], place[1], place[-1]))
    for file, group in groupby(places, key=lambda place: place[0]):
        cells: list[Cell] = []
        refs: list[tuple[int, str]] = []
        for _, row, column, ref, i in group:
            if column is not None:
                cells.append((row, i, column))
            elif ref is None:
                yield i, BadImage("the source has no image here")
            else:
                refs.append((i, ref))
        if cells:
            known = images.remote.get(file, (-1, ""))
            try:
                source = root.parquet(file, *known, cache_gb)
            except OSError as error:
                yield from _lost(deque(cells), error)
            else:
                yield from _from_cells(source, cells)
        yield from _from_refs(images, file, refs, allow_download, fetched)


def kept(door: Door, file: IO[bytes]) -> Door:
    """The same door, but what came through it once is kept in ``file`` and not read again.

    The file is without a buffer, so that no write fails later.
    """
    places: dict[tuple[object, ...], tuple[int, int]] = {}

    def images_again(images: Images) -> Iterator[Found]:
        columns = (images.table[name].to_pylist() for name in IMAGES.names[1:])
        names = list(zip(*columns, strict=True))
        there = [name in places for name in names]
        fresh = np.flatnonzero(np.logical_not(there))
        for i, data in door(images.take(fresh)):
            if isinstance(data, bytes):
                with suppress(OSError):  # where the disk is full it is read again
                    end = file.seek(0, os.SEEK_END)
                    if file.write(data) == len(data):
                        places[names[fresh[i]]] = end, len(data)
            yield int(fresh[i]), data
        for i in np.flatnonzero(there).tolist():
            offset, size = places[names[i]]
            file.seek(offset)
            yield i, file.read(size)

    return images_again


def look(
    images: Images,
    rows: Rows | None = None,
    *,
    sizes: bool = True,
    allow_download: bool = False,
    cache_gb: float | None = None,
    done: Callable[[int], None] = lambda images: None,
) -> pa.Table:
    """`FACTS` of images, a row each: their bytes are read and hashed, and their headers looked at.

    Parameters
    ----------
    images, rows, allow_download, cache_gb
        As for `read`.
    sizes
        Look at the headers; without it sizes are null and a broken header goes unnoticed.
    done
        Called with 1 for every image (for a progress bar).
    """
    wanted = range(len(images)) if rows is None else list(rows)
    facts: dict[int, dict[str, str | int]] = {}
    for row, data in read(images, wanted, allow_download=allow_download, cache_gb=cache_gb):
        fact = facts[row] = {}
        try:
            if isinstance(data, BadImage):
                raise data
            turn = turn_of(data)
            fact["content"] = xxhash.xxh3_128_hexdigest(data) + (f"-{turn}" if turn > 1 else "")
            if sizes:
                fact["height"], fact["width"] = image_size(data)
        except BadImage as error:
            fact["reason"] = error.reason
        done(1)
    return pa.Table.from_pylist([facts[row] for row in wanted], schema=FACTS)


def _from_cells(source: Opened, cells: list[Cell]) -> Iterator[Found]:
    """Cells of one Parquet file, sorted by row; row group by row group."""
    left = deque(cells)
    try:
        opened = pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
        columns = sorted({column for *_, column in cells})
        schema = opened.metadata.schema
        paths = [schema.column(i).path for i in range(len(schema))]
        leaves = [leaf for column in columns for leaf in bytes_leaves(paths, column)]
    except (OSError, ValueError, KeyError) as error:
        yield from _lost(left, error)
        return
    if isinstance(source, RemoteFile) and source.size >= BLOCK:
        source.expect(_expected(opened.metadata, leaves, [row for row, *_ in cells]))
    start = 0
    for group in range(opened.num_row_groups):
        end = start + opened.metadata.row_group(group).num_rows
        mine: deque[Cell] = deque()
        while left and left[0][0] < end:
            mine.append(left.popleft())
        try:
            groups = [group] if mine else []
            size = rows_at_once(opened.metadata.row_group(group), leaves) if mine else BATCH
            for batch in opened.iter_batches(size, row_groups=groups, columns=leaves):
                while mine and mine[0][0] < start + batch.num_rows:
                    row, i, column = mine[0]
                    data = _cell_bytes(batch, column, row - start)
                    mine.popleft()
                    yield i, data
                start += batch.num_rows
                if not mine:
                    break
            yield from _lost(mine, IndexError("it has fewer rows, or no such cells"))
        except (OSError, ValueError, IndexError) as error:
            yield from _lost(mine, error)
        start = end
    yield from _lost(left, IndexError("it has fewer rows"))


def _expected(
    metadata: pq.FileMetaData, leaves: Sequence[str], rows: Sequence[int]
) -> Iterator[tuple[list[Range], float]]:
    """The bytes of some columns, row group by row group, as far as rows (sorted) are wanted."""
    start = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        first, last = bisect_left(rows, start), bisect_left(rows, start + group.num_rows)
        if first < last:
            columns = map(group.column, range(group.num_columns))
            ranges = [_bytes_of(column) for column in columns if column.path_in_schema in leaves]
            yield ranges, (rows[last - 1] + 1 - start) / group.num_rows
        start += group.num_rows


def _bytes_of(column: pq.ColumnChunkMetaData) -> Range:
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    return start, start + column.total_compressed_size


def _lost(cells: deque[Cell], error: Exception) -> Iterator[Found]:
    reason = f"the file cannot be read: {str(error).partition(chr(10))[0][:100]}"
    yield from ((i, BadImage(reason)) for _, i, _ in cells)


def _cell_bytes(batch: pa.RecordBatch, column: str, row: int) -> bytes | BadImage:
    top, *rest = [column] if column in batch.schema.names else column.split(".")
    value = batch.column(batch.schema.names.index(top))[row].as_py()
    for part in rest:
        value = inner(value, part)
    value = only(value)
    if isinstance(value, list) and value:
        return BadImage("several images: name one of the list, such as images.0")
    value = value.get("bytes") if isinstance(value, dict) else value
    value = value.encode("utf-8", "replace") if isinstance(value, str) else value
    if isinstance(value, bytes) and value.startswith(WRITTEN_BYTES):
        value = text_bytes(value)
        if isinstance(value, BadImage):
            return value
    if not isinstance(value, bytes) or not value:
        return BadImage("the cell is empty")
    return value if len(value) <= MAX_BYTES else BadImage(f"more than {MAX_BYTES:,} bytes")


def _from_refs(
    images: Images,
    file: str,
    refs: list[tuple[int, str]],
    allow_download: bool,
    fetched: Path | None,
) -> Iterator[Found]:
    """Tar members by offset, files below the root, URLs a few at a time."""
    root = Root(images.root)
    in_tar = sorted((found, i) for i, ref in refs if (found := tar_ref(ref)))
    if in_tar:
        yield from _from_tar(root, file, in_tar, images.remote.get(file, (-1, "")))
    urls = [(i, ref) for i, ref in refs if "://" in ref and not tar_ref(ref)]
    files = [(i, ref) for i, ref in refs if "://" not in ref and not tar_ref(ref)]
    named = [(i, url) for i, ref in urls if (url := below(ref, (root.url, *images.images_from)))]
    yield from _side_by_side(named_bytes, named)
    urls = [(i, ref) for i, ref in urls if i not in dict(named)]
    if root.folder is None:
        yield from _side_by_side(partial(remote_bytes, root), files)
    else:
        yield from ((i, file_bytes(root.folder, ref)) for i, ref in files)
    if not allow_download:
        refused = BadImage("only known by URL, and downloads are not allowed")
        yield from ((i, refused) for i, _ in urls)
        return
    yield from _side_by_side(partial(url_bytes, fetched), urls)


def _side_by_side(
    load: Callable[[str], bytes | BadImage], refs: list[tuple[int, str]]
) -> Iterator[Found]:
    """A few of them loaded at a time, in their order."""
    waiting = iter(refs)
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        jobs = deque((i, pool.submit(load, ref)) for i, ref in islice(waiting, 2 * DOWNLOADS))
        while jobs:
            i, job = jobs.popleft()
            yield i, job.result()
            jobs.extend((i, pool.submit(load, ref)) for i, ref in islice(waiting, 1))


def _from_tar(
    root: Root, file: str, members: list[tuple[Place, int]], known: tuple[int, str]
) -> Iterator[Found]:
    left = deque(members)
    try:
        wanted = [(place.offset, place.offset + place.size) for place, _ in members]
        with root.open(file, *known, wanted) as stream:
            while left:
                place, i = left[0]
                data = tar_bytes(stream, place)
                left.popleft()
                yield i, data
    except OSError as error:
        reason = f"the file cannot be read: {error.strerror or error}"
        yield from ((i, BadImage(reason)) for _, i in left)
