"""Text and tar files as rows: JSON, JSON lines, CSV and WebDataset, each broken row with a reason.

Nothing here raises for bad content: what cannot be read is returned as ``(row, reason)``.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import IO, Any, NamedTuple, cast

from fifa.errors import brief

MAX_FIELD = 1 << 24  # characters of a CSV field; longer ones are broken quotes
MAX_MEMBER = 1 << 20  # bytes of a WebDataset text member; longer ones are no labels or prompts
MAX_LINE = 64 << 20  # bytes of a line, or of one record of a JSON list
MAX_WHOLE = 1 << 30  # bytes of a JSON object that holds all records: it is read at once
NOT_UTF8 = "not UTF-8: convert the file first (iconv -f WINDOWS-1252 -t UTF-8 FILE)"
# how images begin that are written as text: data: URLs, base64 of PNG, JPEG and WEBP
WRITTEN_OUT = ("data:", "iVBORw0KGgo", "/9j/4", "_9j_4", "UklGR")
BASE64 = re.compile(
    r"(?:data:[^,\s]{0,200};base64,)?[A-Za-z0-9+/_=\s-]{30,}", re.ASCII | re.IGNORECASE
)
IN_TEXT = re.compile(r"data:|iVBORw0KGgo|[/_]9j\\?[/_]4|UklGR")
IN_BYTES = re.compile(IN_TEXT.pattern.encode())

Row = tuple[int, dict[str, Any] | str]  # a record, or the reason why it is none

# open_clip's and Pick-a-Pic's WebDataset names, as the columns that Pick-a-Pic's Parquet has
TAR_NAMES = {"original_prompt": "caption", "prompt": "caption", "txt": "caption"}
TAR_IMAGES = {"jpg", "jpeg", "png", "webp"}
TAR_TEXT = {"txt", "cls", "json"}
DOTTED = "--columns __key__=dots"  # how a user says that a tar's keys have dots in them
OURS = ("tar:", "cell:", "in:")  # what references begin with that readers make


@dataclass
class Records:
    """A file's records as columns.

    Parameters
    ----------
    rows
        The record's number in the file, from 0.
    columns
        Name to values, one a record; None where a record has no such key.
    rejected
        ``(row, reason)``; row None is the whole file.
    """

    rows: list[int] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    rejected: list[tuple[int | None, str]] = field(default_factory=list)


def read_records(stream: IO[bytes], kind: str, dots: frozenset[str] = frozenset()) -> Records:
    """All records of a ``jsonl``, ``json``, ``csv``, ``tsv`` or ``tar`` file.

    Text is UTF-8, or UTF-16 or UTF-32 with the mark of it or without. In a tar whose keys have
    dots, ``dots`` are the names of columns: what stands before one of them is the key.
    """
    iterate = {"jsonl": _jsonl, "json": _json, "csv": _csv, "tsv": _csv}
    records = Records()
    if not isinstance(stream, io.BufferedIOBase):  # those of fsspec have no bounded readline
        stream = io.BufferedReader(cast(io.RawIOBase, stream))
    for row, record in _tar(stream, dots) if kind == "tar" else iterate[kind](*_utf8(stream)):
        if isinstance(record, str):
            records.rejected.append((row if row >= 0 else None, encodable(record)))
            continue
        if not all(map(str.isascii, record)):
            record = {encodable(name): value for name, value in record.items()}
        for name in record:
            if name not in records.columns:
                records.columns[name] = [None] * len(records.rows)
        for name, values in records.columns.items():
            values.append(record.get(name))
        records.rows.append(row)
    return records


class Member(str):
    """A reference that `read_records` made, to bytes in the file.

    ``tar:OFFSET+SIZE:NAME`` is a member of a tar file, ``tar:OFFSET+SIZE+base64:NAME`` text.
    """


class Place(NamedTuple):
    """What such a reference says."""

    offset: int
    size: int
    name: str
    base64: bool


def outside(ref: str) -> str:
    """A reference as a source has it, such that it is none of ours: ``cell:x`` is ``./cell:x``.

    `OURS` at its beginning say where bytes are; nobody but the readers says so.
    """
    ours = ref.startswith(OURS) and not isinstance(ref, Member)
    return f"./{ref}" if ours else ref


def in_file(ref: str, file: str, home: str) -> str:
    """A reference for a pair of the file ``home``: ``in:LENGTH:FILE:REF`` if it is into another.

    Paths and URLs are the same everywhere.
    """
    return f"in:{len(file)}:{file}:{ref}" if file != home and ref.startswith(OURS) else ref


def out_of_file(ref: str) -> tuple[str | None, str]:
    """The other file and the reference into it of what `in_file` made; (None, ref) otherwise."""
    match = re.match(r"in:([0-9]{1,6}):", ref)
    if not match:
        return None, ref
    end = match.end() + int(match[1])
    return ref[match.end() : end], ref[end + 1 :]


def encoding_of(start: bytes) -> str:
    """The encoding of a text by its first bytes: ``utf-8-sig`` unless they are of wider units."""
    if start[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    even, odd = start[0:64:2], start[1:64:2]  # Latin letters in UTF-16 are every second byte
    for zeros, letters, name in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if len(start) >= 4 and 2 * zeros.count(0) > len(zeros) and not letters.count(0):
            return name
    return "utf-8-sig"


def encodable(text: str) -> str:
    """The text, lone surrogates (of bytes that are no UTF-8, or of JSON) as ``\\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode()


def _utf8(stream: IO[bytes]) -> tuple[IO[bytes], bool]:
    """The text in UTF-8, and whether it is the file's own bytes."""
    name = encoding_of(stream.read(64))
    stream.seek(0)
    if name == "utf-8-sig":
        return stream, True
    return io.BufferedReader(_Recoded(stream, name)), False


class _Recoded(io.RawIOBase):
    """A stream of text in another encoding, as UTF-8."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._stream, self._left = stream, b""
        self._decoder = codecs.getincrementaldecoder(encoding)("replace")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True  # to the beginning

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._left = b""
        self._decoder.reset()
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            data = self._stream.read(1 << 16)
            self._left = self._decoder.decode(data, not data).encode("utf-8", "replace")
            if not data:
                break
        part, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def tar_ref(ref: str) -> Place | None:
    """Where the bytes are that a `Member` refers to; None if it is something else."""
    form = r"tar:([0-9]{1,18})\+([0-9]{1,18})(\+base64)?:(.*)"
    match = re.fullmatch(form, ref, flags=re.DOTALL)
    return Place(int(match[1]), int(match[2]), match[4], bool(match[3])) if match else None


class _Finder:
    """Puts references to their places in the file for images written as text.

    The strings of ``raw``, which begins at the file's byte ``start``, are met in its order, so each
    byte is looked at once.
    """

    def __init__(self, raw: bytes | bytearray, start: int) -> None:
        self._raw, self._start, self._at = raw, start, 0

    def placed(self, value: Any) -> Any:
        """The value with `Member` for such texts, where they stand in the file as they are."""
        if isinstance(value, dict):
            return {name: self.placed(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self.placed(each) for each in value]
        if not isinstance(value, str) or not value.startswith(WRITTEN_OUT):
            return value
        if not BASE64.fullmatch(value):
            return value
        forms = (value, json.dumps(value)[1:-1])
        for form in dict.fromkeys((*forms, *(form.replace("/", "\\/") for form in forms))):
            at = self._raw.find(form.encode(), self._at)
            if at >= 0:
                self._at = at + len(form)
                place = self._start + at
                return Member(f"tar:{place}+{len(form)}+base64:{place}.base64")
        return value


def _placed(value: Any, raw: bytes | bytearray, start: int | None) -> Any:
    """As `_Finder.placed`; nothing is placed in a file that is recoded (``start`` None)."""
    if start is None or not IN_BYTES.search(raw):
        return value
    return _Finder(raw, start).placed(value)


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines of a stream; raises `ValueError` for one that is none of a text table."""
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"a line of more than {MAX_LINE:,} bytes: no text table")
        yield line


def _jsonl(stream: IO[bytes], placed: bool = True) -> Iterator[Row]:
    row = at = 0
    try:
        for line in _lines(stream):
            if line.strip():
                yield row, _placed(_parse(line), line, at if placed else None)
                row += 1
            at += len(line)
    except ValueError as error:
        yield row or -1, f"broken from here to the end of the file: {error}"


def _json(stream: IO[bytes], placed: bool = True) -> Iterator[Row]:
    """A list of records, one in an object, or (whatever the file is called) one record a line."""
    first = stream.read(MAX_LINE)
    start = first[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    stream.seek(0)
    if b"\0" in first:
        yield -1, "not JSON: it has NUL bytes"
        return
    del first
    if start == b"[":
        yield from _json_items(stream, placed)
    elif start != b"{":
        yield -1, "not a JSON list of records"
    elif _is_lines(stream):
        stream.seek(0)
        yield from _jsonl(stream, placed)
    else:
        stream.seek(0)
        raw = stream.read(MAX_WHOLE + 1)
        if len(raw) > MAX_WHOLE:
            yield -1, f"one JSON object of more than {MAX_WHOLE:,} bytes: write a record a line"
            return
        whole = _placed(_parse(raw), raw, 0 if placed else None)
        if isinstance(whole, dict):
            yield from enumerate(_wrapped(whole))
        else:
            yield -1, f"not a JSON list of records: {whole}"


def _is_lines(stream: IO[bytes]) -> bool:
    """True if the first line is a record, and not all there is."""
    line = b"\n"
    while line and not line.strip(b"\xef\xbb\xbf \t\r\n"):
        line = stream.readline(MAX_LINE)
    if not isinstance(_parse(line), dict):
        return False
    while line := stream.readline(MAX_LINE):
        if line.strip():
            return True
    return False


def _wrapped(whole: dict[str, Any]) -> list[dict[str, Any] | str]:
    """The records of one object: its only list of records, its columns, or itself."""
    lists = [value for value in whole.values() if isinstance(value, list)]
    if len(lists) == 1 and lists[0] and isinstance(lists[0][0], dict):
        return [_record(value) for value in lists[0]]
    columns = [list(value.values()) for value in whole.values() if _is_column(value)]  # of pandas
    if len(lists or columns) == len(whole) and len(set(map(len, lists or columns))) == 1:
        rows = zip(*(lists or columns), strict=True)
        return [dict(zip(whole, row, strict=True)) for row in rows]
    records = [value for value in whole.values() if isinstance(value, dict)]  # by their ids
    alike = len(whole) == len(records) > 1 and all(r.keys() == records[0].keys() for r in records)
    return list(records) if alike else [whole]


def _is_column(value: Any) -> bool:
    return isinstance(value, dict) and list(value) == [str(i) for i in range(len(value))]


def _json_items(stream: IO[bytes], placed: bool) -> Iterator[Row]:
    """The items of a list, one after the other: memory holds the largest, up to `MAX_LINE`."""
    items, gap = json.JSONDecoder(object_pairs_hook=_object), re.compile(r"[\s,]*")
    # bytes that are no UTF-8 become lone surrogates: they spoil their own record only
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, ended = decoder.decode(stream.read(1 << 16)), False
    images = placed and IN_TEXT.search(text)
    start, row = text.index("[") + 1, 0
    byte, known = 0, 0  # the file's byte at which text[known] is
    while True:
        match = gap.match(text, start)
        start = match.end() if match else start
        if text[start : start + 1] == "]":
            return
        value, end, fault = None, len(text), ""
        try:
            value, end = items.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            fault = brief(error)
        if end == len(text) and not ended and end - start <= MAX_LINE:
            byte += _size(text[known:start])
            more = stream.read(max(1 << 16, end - start))
            ended = not more
            text, start, known = text[start:] + decoder.decode(more, ended), 0, 0
            images = placed and IN_TEXT.search(text)
            continue
        if fault:  # what follows a break cannot be told apart, so it is one rejected row
            yield row, f"broken JSON from here to the end of the file: {fault}"
            return
        if images:
            byte, known = byte + _size(text[known:start]), start
            value = _placed(value, text[start:end].encode("utf-8", "surrogateescape"), byte)
        yield row, _record(value)
        start, row = end, row + 1


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _parse(line: bytes) -> dict[str, Any] | str:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"{NOT_UTF8}: {brief(error)}"
    try:
        return _record(json.loads(text, object_pairs_hook=_object))
    except (ValueError, RecursionError) as error:
        return f"broken JSON: {brief(error)}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:100]!r} is there twice")
    return found


def _record(value: object) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else "not a JSON object"


def _csv(stream: IO[bytes], placed: bool = True) -> Iterator[Row]:
    """Commas, tabs or semicolons, whichever the header has most of. A tab ends a field, always."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD))
    record = bytearray()  # the bytes of the record under way
    lines = _text_lines(stream, record)
    at = 0  # where it begins in the file
    names: list[str] = []
    row = -1
    reader: Iterator[list[str]] | None = None
    while True:
        at += len(record)
        record.clear()
        try:
            if reader is None:
                head = next(lines)
                comma = max(",\t;", key=head.count)
                whole = chain([head], lines)
                reader = tab_rows(whole)
                if comma != "\t":
                    gap = f"{comma} " in head  # a, b, c
                    reader = csv.reader(whole, strict=True, delimiter=comma, skipinitialspace=gap)
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row += 1
            yield row, f"broken CSV: {brief(error)}"
            continue
        except ValueError as error:
            yield (row + 1 if names else -1), f"broken from here to the end of the file: {error}"
            return
        if not names:
            names = cells
            twice = [name for name in names if name and names.count(name) > 1]
            if twice:
                yield -1, f"two columns are named {twice[0][:100]!r}"
                return
            continue
        if not cells:
            continue
        row += 1
        if len(cells) != len(names):
            yield row, f"{len(cells)} cells where the header has {len(names)}"
        else:
            if placed and IN_BYTES.search(record):
                cells = _placed(cells, record, at)
            yield row, {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _text_lines(stream: IO[bytes], record: bytearray) -> Iterator[str]:
    """Lines as text, also those that only a carriage return ends; their bytes go to ``record``."""
    start = "\ufeff"
    for line in _lines(stream):
        if b"\r" in line and b"\r" in line[:-2]:
            parts = re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", line)
        else:
            parts = [line]
        for part in parts:
            record += part
            yield part.decode("utf-8", "surrogateescape").removeprefix(start)
            start = ""


def tab_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    """The cells of lines with tabs: a quote is a letter, unless a pair of them holds the cell."""
    for line in lines:
        cells = line.rstrip("\r\n").split("\t")
        yield [_unquoted(cell) for cell in cells] if any(cells) else []


def _unquoted(cell: str) -> str:
    inner = cell[1:-1].replace('""', "")
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner:
        return cell[1:-1].replace('""', '"')
    return cell


@dataclass(slots=True)
class _Sample:
    """A WebDataset sample: its columns, which of them a json member gave, and what is wrong."""

    columns: dict[str, Any] = field(default_factory=dict)
    loose: frozenset[str] = frozenset()
    stem: str | None = None
    fault: str = ""

    def put(self, column: str, value: str, member: str) -> None:
        """A member's value; a second one for the same column is a fault, never a replacement."""
        old = self.columns.get(column, value)
        if old != value and not (column in self.loose and isinstance(value, Member)):
            self.fault = self.fault or f"{member!r} is a second value of {column!r}"
        self.columns[column] = value


def _tar(stream: IO[bytes], dots: frozenset[str]) -> Iterator[Row]:
    """WebDataset: members that share a name up to the first dot are one sample.

    Only headers and small text members are read; an image becomes a reference to its bytes. A
    sample in which two members are the same column is rejected: a key with a dot in it is cut
    there, and its members are those of several samples.
    """
    samples: dict[str, _Sample] = {}
    broken = ""
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header
                if member.isreg():
                    _member(stream, member, samples, dots)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        broken = f"broken or compressed tar: {brief(error)}"
    for row, (key, sample) in enumerate(samples.items()):
        if sample.fault:
            upto, more = (
                ("", "")
                if dots
                else (" (a name up to its first dot)", f"; {DOTTED} if it is longer")
            )
            yield row, f"sample {key[:100]!r}{upto}: {sample.fault[:300]}{more}"
            continue
        if "caption" in sample.columns and "label_0" not in sample.columns:
            sample.columns.setdefault("prompt", sample.columns["caption"])
        yield row, {"__key__": encodable(key), **sample.columns}
    if broken:
        yield (len(samples) if samples else -1), broken


def _member(
    stream: IO[bytes], member: tarfile.TarInfo, samples: dict[str, _Sample], dots: frozenset[str]
) -> None:
    folder, slash, name = member.name.rpartition("/")
    key, _, extension = name.partition(".")
    *parts, suffix = extension.split(".")
    if dots:
        key, _, suffix = name.rpartition(".")
        before, _, last = key.rpartition(".")
        key, parts = (before, [last]) if before and last in dots else (key, [])
    suffix = suffix.lower()
    column = parts[-1] if parts else suffix
    sample = samples.setdefault(folder + slash + key, _Sample())
    if suffix not in TAR_IMAGES | TAR_TEXT:
        return
    stem = ".".join(parts[:-1])  # of a key with a dot: what follows it
    if parts and stem != (stem if sample.stem is None else sample.stem):
        sample.fault = sample.fault or f"{member.name!r} belongs to another key"
    sample.stem = stem if parts else sample.stem
    if member.issparse():
        sample.fault = sample.fault or f"{member.name!r} has holes"
    elif suffix in TAR_IMAGES:
        ref = Member(f"tar:{member.offset_data}+{member.size}:{encodable(member.name)}")
        sample.put(column, ref, member.name)
    elif member.size <= MAX_MEMBER:
        stream.seek(member.offset_data)
        text = stream.read(member.size).decode("utf-8", "surrogateescape")
        if suffix == "json" and not parts:
            _json_member(sample, text, member.name)
        else:
            sample.put(TAR_NAMES.get(column, column), text.strip(), member.name)


def _json_member(sample: _Sample, text: str, member: str) -> None:
    """The fields of ``KEY.json``; where there is a member of that name, the member counts."""
    record = _parse(text.encode("utf-8", "surrogateescape"))
    if isinstance(record, str):
        sample.fault = sample.fault or f"{member!r}: {record}"
        return
    if sample.loose:
        sample.fault = sample.fault or f"{member!r} is there twice"
    for name, value in record.items():
        old = sample.columns.setdefault(name, value)
        if old != value and not isinstance(old, Member):
            sample.fault = sample.fault or f"{member!r} has a second value of {name!r}"
    sample.loose = frozenset(record)
