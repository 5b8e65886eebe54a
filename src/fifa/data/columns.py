"""One view of a source file's columns, whether it is Parquet or records.

It gives text, numbers and Python values by column name; a dot goes into a struct. Cells with image
bytes are never read: only whether they are there (from Parquet's statistics).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property, reduce
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fifa.data.parquet import check_rows, read_columns, rows_at_once
from fifa.data.records import NOT_UTF8, OURS, WRITTEN_OUT, Member, Records, outside
from fifa.errors import FifaError

Text: TypeAlias = "pa.Array | pa.ChunkedArray"

# Words by which the columns of the two sides tell themselves apart.
SIDES = (
    ("0", "1"),
    ("1", "2"),
    ("a", "b"),
    ("chosen", "rejected"),
    ("winner", "loser"),
    ("win", "lose"),
    ("left", "right"),
)


class ParquetColumns:
    """A Parquet file. ``source`` is a path, or an open file for what is not local."""

    kind = "parquet"

    def __init__(self, source: str | io.RawIOBase | io.BytesIO, file: str) -> None:
        self.file = file
        self._source = source
        self._local = isinstance(source, str)
        opened = pq.ParquetFile(source)
        self._metadata = opened.metadata
        check_rows(source, self._metadata, file)
        self._schema: pa.Schema = opened.schema_arrow
        self._leaves = {
            self._metadata.schema.column(i).path: i for i in range(self._metadata.num_columns)
        }
        self._loaded: dict[str, pa.ChunkedArray] = {}
        self.beside: Sequence[str] = ()  # columns that are loaded with those of the format
        self.names = frozenset(self._schema.names)
        self.rows = np.arange(self._metadata.num_rows, dtype=np.int64)

    def load(self, names: Iterable[str], prompt: str | None = None) -> None:
        """Read these columns (``prompt`` as a dictionary); others stay unread."""
        table = read_columns(
            self._source,
            [self._stored(name) for name in (*names, *self.beside)],
            self.file,
            metadata=self._metadata,
            as_dictionary=prompt if prompt and self._plain(prompt) else None,
        )
        self._loaded = dict(zip(table.column_names, table.columns, strict=True))

    def text(self, name: str) -> Text:
        """A column as strings (the prompt maybe dictionary-encoded), null for no valid text.

        Bytes and large strings are taken as strings where they are UTF-8, and a list of one text as
        that text.
        """
        column = self._column(name)
        kind = column.type
        if _is_list(kind):
            return text_array(map(only, column.to_pylist()))
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        return column if pa.types.is_string(kind) and _is_utf8(column) else valid_text(column)

    def named(self, name: str) -> pa.DictionaryArray:
        """A column of names: text and whole numbers as text, the parts of a list joined."""
        kind = self._type(name)
        if pa.types.is_integer(kind):
            codes = _one_chunk(self._column(name).dictionary_encode())
            return codes.from_arrays(codes.indices, codes.dictionary.cast(pa.string()))
        if _is_list(kind) or pa.types.is_floating(kind):
            return encoded(text_array(map(as_name, self._column(name).to_pylist())))
        return _without_blanks(encoded(self.text(name)))

    def no_texts(self, name: str) -> dict[int, str]:
        """The rows whose text is a list of several, and what that is."""
        if not _is_list(self._type(name)):
            return {}
        return _several(self._column(name).to_pylist())

    def reference(self, name: str) -> Text:
        """A column of paths or URLs as strings, each passed through `outside`."""
        refs = self.text(name)
        ours = begins(refs, OURS)
        if not pc.any(ours).as_py():  # joining every row takes its time
            return refs
        return pc.if_else(ours, pc.binary_join_element_wise("./", refs, ""), refs)

    def number(self, name: str) -> np.ndarray:
        """A column as float64 [n], NaN where it is no number.

        Truth values and text that reads as a number count as numbers.
        """
        column = self._column(name)
        kind = column.type
        if _is_number(kind):
            column = column.cast(pa.float64())
        elif pa.types.is_boolean(kind):
            column = column.cast(pa.uint8()).cast(pa.float64())
        else:
            return _numbers(self.values(name))
        return np.asarray(column.to_numpy(), np.float64)

    def values(self, name: str) -> list[Any]:
        """A column as Python values."""
        if self._stored(name) == name:
            return list(self._column(name).to_pylist())
        top, _, part = name.rpartition(".")
        return [inner(value, part) for value in self.values(top)]

    def image(self, name: str) -> str:
        """What an image column holds.

        ``text``, ``cell`` (bytes), ``struct`` (bytes, path) or ``written`` (images as base64).
        """
        kind = getattr(self._type(name), "storage_type", self._type(name))
        if pa.types.is_struct(kind):
            fields = [kind.field(i).name for i in range(kind.num_fields)]
            if not {"bytes", "path"} & set(fields):
                raise FifaError(
                    f"column {name!r} is a struct of {', '.join(fields)}, not of bytes or path",
                    where=self.file,
                    do="write the images' files (such as JPEG or PNG) as bytes, or their paths",
                )
            return "struct" if "path" in fields and whole_list(name) == name else "cell"
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        item = kind.value_type if _is_list(kind) else kind
        binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
        structs = pa.types.is_struct(item) and item.get_field_index("bytes") >= 0
        if structs or any(is_binary(item) for is_binary in binary):
            return "cell"
        if self._is_written_out(name, kind):
            return "written"
        kind = kind.value_type if _is_list(kind) else kind
        if not _is_text(kind) and not pa.types.is_null(kind):
            raise FifaError(
                f"column {name!r} is of {self._type(name)}, which is no image",
                where=self.file,
                do="write the images' files as bytes, or their paths or URLs as text",
            )
        return "text"

    def paths_among(self, name: str) -> Text:
        """Of a column of images as base64 those rows that are something else; null for the rest."""
        parts = []
        with pq.ParquetFile(self._source, metadata=self._metadata, pre_buffer=False) as opened:
            for batch in opened.iter_batches(64, columns=[name]):
                texts = [t if isinstance(t, str) else None for t in batch[0].to_pylist()]
                parts += [None if t and t.startswith(WRITTEN_OUT) else t for t in texts]
        return text_array(outside(text) if text else None for text in parts)

    def _is_written_out(self, name: str, kind: pa.DataType) -> bool:
        """True for a column of text that begins with an image as base64."""
        leaf = self._leaves.get(name)
        if leaf is None or not _is_text(kind) or not self._metadata.num_row_groups:
            return False
        first = self._metadata.row_group(0).column(leaf)
        if first.total_uncompressed_size < 40 * min(first.num_values, 100):
            return False
        path = self._metadata.schema.column(leaf).path
        try:
            rows = min(16, rows_at_once(self._metadata.row_group(0), [path]))
        except ValueError:
            return False
        with pq.ParquetFile(self._source, metadata=self._metadata, pre_buffer=False) as opened:
            batch = next(opened.iter_batches(rows, row_groups=[0], columns=[path]), None)
        texts = pa.array([]) if batch is None else batch[0]
        while pa.types.is_struct(texts.type):
            texts = texts.field(0)
        texts = texts.cast(texts.type.value_type) if pa.types.is_dictionary(texts.type) else texts
        begin = (bytes(text.as_buffer()[:99]) for text in texts if text.is_valid)
        return any(text.decode("utf-8", "replace").startswith(WRITTEN_OUT) for text in begin)

    def lacks_bytes(self, name: str) -> np.ndarray:
        """The rows of an image column without bytes; bytes are read where only some have them."""
        leaf = self._leaves.get(name, self._leaves.get(f"{name}.bytes"))
        parts = [np.empty(0, bool)]
        opened = pq.ParquetFile(self._source, metadata=self._metadata, pre_buffer=False)
        for group in range(self._metadata.num_row_groups):
            rows = self._metadata.row_group(group).num_rows
            stats = leaf is not None and self._metadata.row_group(group).column(leaf).statistics
            known = bool(stats and stats.has_null_count)
            nulls = stats.null_count if stats and known else 0
            lacks = np.full(rows, nulls == rows)
            # without statistics: where it costs no download
            if 0 < nulls < rows or (leaf is not None and not known and self._local):
                path = self._metadata.schema.column(leaf).path
                try:
                    size = rows_at_once(self._metadata.row_group(group), [path])
                except ValueError:  # the bytes that are there are never read, and told by then
                    parts.append(np.zeros(rows, bool))
                    continue
                batches = opened.iter_batches(size, row_groups=[group], columns=[path])
                tops = [pa.table([batch[0]], ["top"])["top"] for batch in batches]
                inner = path.split(".")[1:]
                found = [pc.struct_field(top, inner) if inner else top for top in tops]
                lacks = np.concatenate([np.asarray(top.is_null()) for top in found])
            parts.append(lacks)
        opened.close()
        return np.concatenate(parts)

    def holds_bytes(self, name: str) -> bool:
        """True if the image column has bytes in at least one row.

        From the row groups' null counts; where a file has none, the bytes are assumed.
        """
        leaves = bytes_leaves(self._leaves, name)
        if not leaves:
            return False
        leaf = self._leaves[leaves[0]]
        for group in range(self._metadata.num_row_groups):
            column = self._metadata.row_group(group).column(leaf)
            counts = column.statistics
            if counts is None or not counts.has_null_count or counts.null_count < column.num_values:
                return True
        return False

    def extra(self, name: str) -> pa.Array:
        """A column of numbers (float64) or of lists of numbers, null for the rest.

        Lists are of float16 where the file has those, otherwise of float32.
        """
        kind = self._type(name)
        if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)):
            return pa.array(self.number(name))
        of = pa.float16() if pa.types.is_float16(kind.value_type) else pa.float32()
        return _one_chunk(self._column(name).cast(pa.list_(of)))

    def truths(self, name: str) -> bool:
        """True for a column of truth values."""
        return bool(pa.types.is_boolean(self._type(name)))

    def numeric(self) -> list[str]:
        """The top-level columns of numbers (not of truth values), in the file's order."""
        return [field.name for field in self._schema if _is_number(field.type)]

    def _plain(self, name: str) -> bool:
        return name in self.names and pa.types.is_string(self._schema.field(name).type)

    def _type(self, name: str) -> pa.DataType:
        if name in self.names:
            return self._schema.field(name).type
        top, _, part = name.rpartition(".")
        kind = self._type(top)
        if pa.types.is_struct(kind):
            return kind.field(part).type
        return kind.value_type if _is_list(kind) else pa.string()

    def _stored(self, name: str) -> str:
        """Of a column, field, item of a list or of JSON that which the file has as such."""
        top = name.rpartition(".")[0]
        if name in self.names or not top:
            return name
        stored = self._stored(top)
        return name if stored == top and pa.types.is_struct(self._type(top)) else stored

    def _column(self, name: str) -> pa.ChunkedArray:
        if name in self._loaded:
            return self._loaded[name]
        if self._stored(name) != name:
            return pa.chunked_array([text_array(map(only, self.values(name)))])
        top, _, part = name.rpartition(".")
        return pc.struct_field(self._column(top), part)


class RecordColumns:
    """The records of a JSON, JSON lines, CSV or WebDataset file."""

    def __init__(self, records: Records, kind: str, file: str) -> None:
        self.file, self.kind = file, kind
        self._columns = records.columns
        self.names = frozenset(records.columns)
        self.rows = np.asarray(records.rows, np.int64)
        self.beside: Sequence[str] = ()  # as for Parquet

    def load(self, names: Iterable[str], prompt: str | None = None) -> None:
        """Nothing to do: records are read whole."""

    def text(self, name: str) -> Text:
        """Strings as they are, and of lists of one; null for every other value."""
        values = map(only, self.values(name))
        return text_array(None if isinstance(value, Member) else value for value in values)

    def named(self, name: str) -> pa.DictionaryArray:
        """A column of names: text and whole numbers as text, the parts of a list joined."""
        return encoded(text_array(map(as_name, self.values(name))))

    def no_texts(self, name: str) -> dict[int, str]:
        """The rows whose text is a list of several, or no UTF-8."""
        return _several(self.values(name))

    def reference(self, name: str) -> Text:
        """Paths, URLs and tar members, each passed through `outside`.

        Of ``NAME.path`` a row's bytes count first, where they are text that has a place; a row that
        is no object is a path itself.
        """
        values = self.values(name)
        top, _, last = name.rpartition(".")
        if last == "path" and name not in self._columns:
            written = self.values(f"{top}.bytes")
            values = [
                b if isinstance(b, Member) else v for b, v in zip(written, values, strict=True)
            ]
            whole = self.values(top)
            values = [w if isinstance(w, str) else v for w, v in zip(whole, values, strict=True)]
        values = list(map(only, values))
        return text_array(outside(value) if isinstance(value, str) else None for value in values)

    def number(self, name: str) -> np.ndarray:
        """Numbers, truth values and text that reads as a number."""
        return _numbers(self.values(name))

    def values(self, name: str) -> list[Any]:
        """Python values."""
        if name in self._columns:
            return self._columns[name]
        top, *rest = name.split(".")
        values = self._columns[top]
        for part in rest:
            values = [inner(value, part) for value in values]
        return values

    def image(self, name: str) -> str:
        """``struct`` if a value is an object, otherwise ``text``."""
        return "struct" if any(isinstance(v, dict) for v in self.values(name)) else "text"

    def holds_bytes(self, name: str) -> bool:
        """Never: text holds no image bytes."""
        return False

    def paths_among(self, name: str) -> Text:
        """Every row's path: images as text have places, and are references by then."""
        return self.reference(name)

    def lacks_bytes(self, name: str) -> np.ndarray:
        """Every row."""
        return np.ones(len(self.rows), bool)

    def extra(self, name: str) -> pa.Array:
        """Lists of numbers if any value is a list."""
        values = self.values(name)
        if not any(isinstance(value, list) for value in values):
            return pa.array(self.number(name))
        lists = [_numbers(value).tolist() if isinstance(value, list) else None for value in values]
        return pa.array(lists, pa.list_(pa.float32()))

    def truths(self, name: str) -> bool:
        """True for a column of truth values (in CSV: of ``true`` and ``false``)."""
        given = [value for value in self.values(name) if value is not None]
        texts = (str(value).strip().lower() for value in given)
        return bool(given) and all(text in ("true", "false") for text in texts)

    def numeric(self) -> list[str]:
        """Columns whose every value that is there is a number (in CSV: reads as one)."""
        return self._numeric

    @cached_property
    def _numeric(self) -> list[str]:
        loose = self.kind in ("csv", "tsv", "tar")
        return [name for name, values in self._columns.items() if _all_numbers(values, loose)]


Columns: TypeAlias = "ParquetColumns | RecordColumns"


def has(columns: Columns, name: str) -> bool:
    """True if the column, or the struct that a dotted name goes into, is there."""
    return name in columns.names or name.partition(".")[0] in columns.names


def side_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Columns that hold the same thing for side 0 and side 1: their names differ in one word.

    ``hpsv2_0`` goes with ``hpsv2_1``, ``chosen_score`` with ``rejected_score``, ``image1_model``
    with ``image2_model``. Every name is used once, the first of `SIDES` that fits wins.
    """
    left = list(names)
    pairs = []
    for zero, one in SIDES:
        edge = r"(?<![0-9])" if zero.isdigit() else r"(?<![A-Za-z])"
        after = r"(?![0-9])" if zero.isdigit() else r"(?![A-Za-z])"
        for name in list(left):
            for match in re.finditer(edge + zero + after, name):
                other = name[: match.start()] + one + name[match.end() :]
                if name in left and other in left:
                    pairs.append((name, other))
                    left.remove(name)
                    left.remove(other)
    return pairs


def check_columns(columns: Columns, names: Iterable[str], form: str = "") -> None:
    """Raise `FifaError` where the file has not all of these columns."""
    lacks = [name for name in names if not has(columns, name)]
    if lacks:
        raise FifaError(
            f"no column {', '.join(map(repr, lacks))}{form}",
            where=columns.file,
            do=f"it has {', '.join(sorted(columns.names))}; say which is which with --columns "
            "prompt=...,image_0=...,image_1=...,label=...",
        )


def _is_number(kind: pa.DataType) -> bool:
    is_one = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(is_type(kind) for is_type in is_one)


def _is_text(kind: pa.DataType) -> bool:
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_text(kind) for is_text in texts)


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_list(kind) for is_list in lists)


def whole_list(name: str) -> str:
    """``images`` for ``images.0``; every other name as it is."""
    return re.sub(r"\.[0-9]$", "", name)


def bytes_leaves(paths: Iterable[str], name: str) -> list[str]:
    """Of a Parquet file's leaves that of a column's bytes: itself, a struct's, or in a list."""
    form = re.compile(re.escape(whole_list(name)) + r"(\.list\.(element|item))?(\.bytes)?")
    return [path for path in paths if form.fullmatch(path)]


def inner(value: Any, part: str) -> Any:
    """A field of an object or an item of a list, which may be JSON; None where there is none."""
    value = _unwritten(value)
    if isinstance(value, list) and part.isdigit():
        return value[int(part)] if len(value) > int(part) else None
    return value.get(part) if isinstance(value, dict) else None


def parsed(columns: Columns, name: str) -> list[Any]:
    """A column as Python values, text that is JSON of a list or an object as that."""
    return [_unwritten(value) for value in columns.values(name)]


def _unwritten(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def only(value: Any) -> Any:
    """The one item of a list; everything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def as_name(value: Any) -> str | None:
    """Text that is not blank, whole numbers as text, the parts of a list joined; None else."""
    if isinstance(value, list):
        return ", ".join(part for part in map(as_name, value) if part) or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column with gaps made it 7.0
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def _without_blanks(codes: pa.DictionaryArray) -> pa.DictionaryArray:
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(codes.dictionary), ""), True)
    if not pc.any(blank).as_py():
        return codes
    indices = pc.if_else(blank.take(codes.indices), pa.scalar(None, pa.int32()), codes.indices)
    return codes.from_arrays(indices, codes.dictionary)


def _several(values: list[Any]) -> dict[int, str]:
    wrong = {}
    for i, value in enumerate(map(only, values)):
        if isinstance(value, list):
            wrong[i] = f"a list of {len(value)} prompts: which one the people saw is not known"
        elif isinstance(value, str) and not value.isascii() and re.search("[\udc80-\udcff]", value):
            wrong[i] = f"the prompt is {NOT_UTF8}"
    return wrong


def text_array(values: Iterable[Any]) -> pa.Array:
    """The values that are text as strings, null for every other one and for lone surrogates."""
    texts = [value if isinstance(value, str) else None for value in values]
    try:
        return pa.array(texts, pa.string())
    except (UnicodeEncodeError, pa.ArrowInvalid):
        return pa.array([_encodable(text) for text in texts], pa.string())


def valid_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings (dictionary-encoded stays so) with null for what is no text or no valid UTF-8."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        parts = []
        for part in column.unify_dictionaries().chunks:
            texts = _one_chunk(valid_text(pa.chunked_array([part.dictionary])))
            parts.append(pa.DictionaryArray.from_arrays(part.indices.cast(pa.int32()), texts))
        return pa.chunked_array(parts, pa.dictionary(pa.int32(), pa.string()))
    if not _is_text(kind) and not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
        return pa.chunked_array([pa.nulls(len(column), pa.string())])
    column = column.cast(options=pc.CastOptions(pa.string(), allow_invalid_utf8=True))
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        raw = column.cast(pa.binary()).to_pylist()
        return pa.chunked_array([pa.array([_decoded(value) for value in raw], pa.string())])
    return column


def _is_utf8(column: pa.ChunkedArray) -> bool:
    """True for strings (dictionary-encoded or not) in valid UTF-8; nothing checked them before."""
    plain = [getattr(chunk, "dictionary", chunk) for chunk in column.chunks]
    bytes_ = (np.frombuffer(chunk.buffers()[2] or b"", np.int8) for chunk in plain)
    if all(values.min(initial=0) >= 0 for values in bytes_):  # ASCII, three times as fast
        return True
    with suppress(pa.ArrowInvalid):
        column.validate(full=True)
        return True
    return False


def begins(texts: Text, prefixes: Iterable[str]) -> Text:
    """Whether each text begins with one of ``prefixes``; faster than a regular expression."""
    return reduce(pc.or_, (pc.starts_with(texts, prefix) for prefix in prefixes))


def encoded(column: Text) -> pa.DictionaryArray:
    """A column of strings as one dictionary-encoded array, its indices int32."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    one = _one_chunk(column) if isinstance(column, pa.ChunkedArray) else column
    return pa.DictionaryArray.from_arrays(one.indices.cast(pa.int32()), one.dictionary)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries()
    return column.combine_chunks()


def _decoded(value: bytes | None) -> str | None:
    if value is not None:
        with suppress(UnicodeDecodeError):
            return value.decode()
    return None


def _encodable(value: str | None) -> str | None:
    if value is not None:
        with suppress(UnicodeEncodeError):
            value.encode()
            return value
    return None


def _numbers(values: list[Any]) -> np.ndarray:
    return np.fromiter((as_number(value) for value in values), np.float64, len(values))


def as_number(value: object) -> float:
    """Numbers, truth values and text that reads as one; NaN for everything else."""
    if isinstance(value, str):
        value = {"true": "1", "false": "0"}.get(value.strip().lower(), value)
    if isinstance(value, int | float) or (isinstance(value, str) and "_" not in value):
        with suppress(ValueError, OverflowError):
            return float(value)
    return float("nan")


def _all_numbers(values: list[Any], loose: bool) -> bool:
    seen = False
    for value in values:
        if value is None:
            continue
        if isinstance(value, str):
            if not loose or value.strip().lower() in ("true", "false"):
                return False
            if np.isnan(as_number(value)) and value.strip().lower() != "nan":
                return False
        elif isinstance(value, bool) or not isinstance(value, int | float):
            return False
        seen = True
    return seen
