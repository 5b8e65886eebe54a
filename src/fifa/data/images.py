"""The one door through which images come in. They are hostile until they are decoded."""

from __future__ import annotations

import io
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fifa.data.fetch import FetchError, fetch
from fifa.data.records import tar_ref
from fifa.data.source import Root, has_file, inside
from fifa.data.table import Pairs
from fifa.shards.files import digest, write_bytes

if TYPE_CHECKING:
    from PIL import Image, ImageFile

FORMATS = ("JPEG", "PNG", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
MAX_PIXELS = 64_000_000
MAX_BYTES = 64 << 20
BATCH = 32  # rows of cells in memory at a time
DOWNLOADS = 8  # at a time

Found = tuple[int, int, "bytes | BadImage"]


class BadImage(Exception):  # noqa: N818 - it is passed on as a finding more than it is raised
    """An image that does not come in, and why.

    Parameters
    ----------
    reason
        One short sentence.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def open_image(data: bytes) -> Image.Image:
    """Decode an image completely.

    JPEG, PNG and WEBP of at most `MAX_PIXELS` pixels and `MAX_BYTES` bytes. Refused as well:
    truncated files and headers that promise more pixels than there are data for
    (`fifa.data.truncation`), animations (nobody knows which frame a person judged), 16-bit grey,
    and JPEGs that no browser shows (arithmetic coding). Rotation by EXIF and conversion to RGB are
    left to whoever looks at the image.

    Raises `BadImage`.
    """
    from fifa.data.truncation import lacks_data

    try:
        image = _header(data)
        image.load()
        if image.format != "WEBP" and lacks_data(image, data):
            raise BadImage("its header promises more pixels than it has data for")
    except BadImage:
        raise
    except Exception as error:  # a decoder fed with hostile bytes may raise anything
        raise _undecodable(error) from error
    return image


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width of an image as its header says; raises `BadImage` as `open_image` does.

    What follows the header is not decoded: a truncated file passes.
    """
    try:
        with _header(data) as image:
            return image.height, image.width
    except BadImage:
        raise
    except Exception as error:
        raise _undecodable(error) from error


def _header(data: bytes) -> ImageFile.ImageFile:
    """The image, opened and looked at, not decoded."""
    from PIL import Image

    from fifa.data.truncation import HUFFMAN, SCANS, frame, many_scans

    if len(data) > MAX_BYTES:
        raise BadImage(f"more than {MAX_BYTES:,} bytes")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels")
    # an MPO is a JPEG with further pictures behind the one that everybody sees
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise BadImage("an animation")
    if image.mode not in MODES:
        raise BadImage(f"mode {image.mode} is not supported")
    if image.format in ("JPEG", "MPO"):
        if frame(data) not in HUFFMAN:
            raise BadImage("a JPEG with arithmetic or lossless coding is not supported")
        if many_scans(data):
            raise BadImage(f"a JPEG with more than {SCANS} scans")
    return image


def _undecodable(error: Exception) -> BadImage:
    brief = str(error).partition("\n")[0][:100] or type(error).__name__
    if "<_io.BytesIO" in brief:
        brief = "no JPEG, PNG or WEBP"
    return BadImage(f"cannot be decoded: {brief}")


def check_image(data: bytes) -> None:
    """Decode an image completely and forget it; raises `BadImage`."""
    open_image(data).close()


def has_pixels(pairs: Pairs) -> bool:
    """True if images can be opened without fetching them by URL: cells, tar members, files."""
    if pairs.origin.cells:
        return True
    root = Root(pairs.origin.root)
    for ref in pairs.table["image_0_ref"].drop_null()[:100].to_pylist():
        if tar_ref(ref) or ("://" not in ref and root.folder is None):
            return True
        if "://" not in ref and root.folder is not None and has_file(root.folder, ref):
            return True
    return False


def read_images(
    pairs: Pairs,
    rows: Sequence[int],
    *,
    allow_download: bool = False,
    fetched: Path | None = None,
) -> Iterator[Found]:
    """The images of some pairs, as the original bytes.

    Parameters
    ----------
    pairs
        Where they are.
    rows
        Rows of ``pairs.table``.
    allow_download
        Fetch images that are only known by URL, from public addresses.
    fetched
        A folder where fetched images are kept, by their URL, and looked for first; None keeps
        none.

    Yields
    ------
    (row, side, bytes or BadImage)
        In the order of the source's files and rows, so that each is read once; memory holds
        `BATCH` rows at most. The bytes are not decoded: that is `check_image`'s or
        `open_image`'s.
    """
    names = ["file", "row", "swapped", "image_0_ref", "image_1_ref"]
    chosen = pairs.table.select(names).take(pa.array(rows, pa.int64())).to_pydict()
    places = sorted(
        (chosen["file"][i], chosen["row"][i], int(row), i) for i, row in enumerate(rows)
    )
    root = Root(pairs.origin.root)
    for file, group in groupby(places, key=lambda place: place[0]):
        cells: list[tuple[int, int, int, str]] = []  # source row, row, side, column
        others: list[tuple[int, int, str]] = []
        for _, source_row, row, i in group:
            for side in (0, 1):
                ref = chosen[f"image_{side}_ref"][i]
                cell = _cell(pairs, ref, source_row, side ^ int(chosen["swapped"][i]))
                if cell:
                    cells.append((cell[0], row, side, cell[1]))
                elif ref is None:
                    yield row, side, BadImage("the source has no image here")
                else:
                    others.append((row, side, ref))
        if cells:
            yield from _from_cells(root, file, cells)
        yield from _from_refs(root, file, others, allow_download, fetched)


def _cell(pairs: Pairs, ref: str | None, row: int, side: int) -> tuple[int, str] | None:
    """Row and column of the cell with the image, if a cell has it."""
    if ref is None:
        return (row, pairs.origin.cells[side]) if pairs.origin.cells else None
    if ref.startswith("cell:"):
        _, number, column = ref.split(":", 2)
        return int(number), column
    return None


def _from_cells(root: Root, file: str, cells: list[tuple[int, int, int, str]]) -> Iterator[Found]:
    """Cells of one Parquet file, row group by row group."""
    try:
        local = root.folder is not None
        opened = pq.ParquetFile(
            root.name(file) if local else root.open(file), pre_buffer=False, buffer_size=1 << 20
        )
        columns = sorted({column for *_, column in cells})
        leaves = [leaf for column in columns for leaf in _leaves(opened.schema_arrow, column)]
        sizes = [
            opened.metadata.row_group(i).num_rows for i in range(opened.metadata.num_row_groups)
        ]
    except (OSError, ValueError, KeyError) as error:
        reason = f"the file cannot be read: {str(error).partition(chr(10))[0][:100]}"
        yield from ((row, side, BadImage(reason)) for _, row, side, _ in cells)
        return
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    cells.sort()
    of_group = np.searchsorted(starts, [cell[0] for cell in cells], side="right") - 1
    for group, members in groupby(zip(of_group.tolist(), cells, strict=True), lambda m: m[0]):
        wanted = deque(cell for _, cell in members)
        try:
            yield from _from_group(opened, group, int(starts[group]), wanted, leaves)
        except (OSError, ValueError, IndexError) as error:
            reason = f"the file cannot be read: {str(error).partition(chr(10))[0][:100]}"
            yield from ((row, side, BadImage(reason)) for _, row, side, _ in wanted)


def _from_group(
    opened: pq.ParquetFile,
    group: int,
    start: int,
    wanted: deque[tuple[int, int, int, str]],
    leaves: list[str],
) -> Iterator[Found]:
    """Cells of one row group; ``wanted`` (sorted by row) loses what has been yielded."""
    for batch in opened.iter_batches(batch_size=BATCH, row_groups=[group], columns=leaves):
        while wanted and wanted[0][0] < start + batch.num_rows:
            source_row, row, side, column = wanted.popleft()
            yield row, side, _cell_bytes(batch, column, source_row - start)
        start += batch.num_rows
        if not wanted:
            return


def _leaves(schema: pa.Schema, column: str) -> list[str]:
    top, *rest = [column] if column in schema.names else column.split(".")
    kind = schema.field(top).type
    for part in rest:
        kind = kind.field(part).type
    return [f"{column}.bytes" if pa.types.is_struct(kind) else column]


def _cell_bytes(batch: pa.RecordBatch, column: str, row: int) -> bytes | BadImage:
    top, *rest = [column] if column in batch.schema.names else column.split(".")
    value = batch.column(batch.schema.names.index(top))[row].as_py()
    for part in rest:
        value = value.get(part) if isinstance(value, dict) else None
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes) or not value:
        return BadImage("the cell is empty")
    return value if len(value) <= MAX_BYTES else BadImage(f"more than {MAX_BYTES:,} bytes")


def _from_refs(
    root: Root,
    file: str,
    refs: list[tuple[int, int, str]],
    allow_download: bool,
    fetched: Path | None,
) -> Iterator[Found]:
    """Tar members by offset, files below the root, URLs a few at a time."""
    members = [(tar_ref(ref), row, side) for row, side, ref in refs]
    in_tar = sorted((found, row, side) for found, row, side in members if found)
    if in_tar:
        yield from _from_tar(root, file, in_tar)
    urls = [(row, side, ref) for row, side, ref in refs if "://" in ref and not tar_ref(ref)]
    for row, side, ref in refs:
        if "://" not in ref and not tar_ref(ref):
            yield row, side, _file_bytes(root, ref)
    if not allow_download:
        refused = BadImage("only known by URL, and downloads are not allowed")
        yield from ((row, side, refused) for row, side, _ in urls)
        return
    waiting = iter(urls)
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        while window := list(islice(waiting, 2 * DOWNLOADS)):
            answers = pool.map(partial(_url_bytes, fetched), (ref for *_, ref in window))
            for (row, side, _), answer in zip(window, answers, strict=True):
                yield row, side, answer


def _from_tar(
    root: Root, file: str, members: list[tuple[tuple[int, int, str], int, int]]
) -> Iterator[Found]:
    try:
        with root.open(file) as stream:
            for (offset, size, _), row, side in members:
                yield row, side, _member_bytes(stream, offset, size)
    except OSError as error:
        reason = f"the file cannot be read: {error.strerror or error}"
        yield from ((row, side, BadImage(reason)) for _, row, side in members)


def _member_bytes(stream: IO[bytes], offset: int, size: int) -> bytes | BadImage:
    if size > MAX_BYTES:
        return BadImage(f"more than {MAX_BYTES:,} bytes")
    stream.seek(offset)
    data = stream.read(size)
    return data if len(data) == size else BadImage("the tar file ends within the image")


def _url_bytes(fetched: Path | None, url: str) -> bytes | BadImage:
    kept = fetched / digest(url.encode("utf-8", "surrogatepass")) if fetched else None
    if kept and kept.exists():
        return kept.read_bytes()
    try:
        data = fetch(url, max_bytes=MAX_BYTES)
    except FetchError as error:
        return BadImage(str(error))
    if kept:
        write_bytes(kept, data)
    return data


def _file_bytes(root: Root, ref: str) -> bytes | BadImage:
    """A file by its path relative to the root; no path and no link leads out of the root."""
    if root.folder is None:
        if ref.startswith("/") or ".." in ref.split("/"):
            return BadImage("the path leaves the data set's folder")
        try:
            with root.open(ref) as stream:
                data = stream.read(MAX_BYTES + 1)
        except OSError:
            return BadImage("no such file")
        return data if len(data) <= MAX_BYTES else BadImage(f"more than {MAX_BYTES:,} bytes")
    try:
        path = (root.folder / ref).resolve(strict=True)
        if not inside(root.folder, path):
            return BadImage("the path leaves the data set's folder")
        # neither a link put there meanwhile nor a pipe that never ends
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError, RuntimeError) as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        return BadImage("no such file" if missing else "the path cannot be opened")
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            return BadImage("not a regular file")
        if status.st_size > MAX_BYTES:
            return BadImage(f"more than {MAX_BYTES:,} bytes")
        return file.read()
