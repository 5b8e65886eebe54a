"""Text and tar files as rows: JSON, JSON lines, CSV and WebDataset, each broken row with a reason.

Nothing here raises for bad content: what cannot be read is returned as ``(row, reason)``.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

MAX_MEMBER = 1 << 20  # bytes of a WebDataset text member; longer ones are no labels or prompts

Row = tuple[int, dict[str, Any] | str]  # a record, or the reason why it is none

# open_clip's and Pick-a-Pic's WebDataset names, as the columns that Pick-a-Pic's Parquet has
TAR_NAMES = {"original_prompt": "caption", "prompt": "caption", "txt": "caption"}
TAR_IMAGES = {"jpg", "jpeg", "png", "webp"}
TAR_TEXT = {"txt", "cls", "json"}


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


def read_records(stream: IO[bytes], kind: str) -> Records:
    """All records of a ``jsonl``, ``json``, ``csv`` or ``tar`` file."""
    iterate = {"jsonl": _jsonl, "json": _json, "csv": _csv, "tar": _tar}[kind]
    records = Records()
    for row, record in iterate(stream):
        if isinstance(record, str):
            records.rejected.append((row if row >= 0 else None, record))
            continue
        for name in record:
            if name not in records.columns:
                records.columns[name] = [None] * len(records.rows)
        for name, values in records.columns.items():
            values.append(record.get(name))
        records.rows.append(row)
    return records


class Member(str):
    """A reference that `read_records` made, to a member of a tar file: ``tar:OFFSET+SIZE:NAME``."""


def outside(ref: str) -> str:
    """A reference as a source has it, such that it is none of ours: ``cell:x`` is ``./cell:x``.

    ``tar:`` and ``cell:`` at its beginning say where bytes are; nobody but the readers says so.
    """
    ours = ref.startswith(("tar:", "cell:")) and not isinstance(ref, Member)
    return f"./{ref}" if ours else ref


def tar_ref(ref: str) -> tuple[int, int, str] | None:
    """Offset, size and name in a reference to a tar member; None if it is something else."""
    match = re.fullmatch(r"tar:([0-9]{1,18})\+([0-9]{1,18}):(.*)", ref, flags=re.DOTALL)
    return (int(match[1]), int(match[2]), match[3]) if match else None


def _jsonl(stream: IO[bytes]) -> Iterator[Row]:
    row = 0
    for line in stream:
        if line.strip():
            yield row, _parse(line)
            row += 1


def _json(stream: IO[bytes]) -> Iterator[Row]:
    """A list of records, or (whatever the file is called) one record a line."""
    raw = stream.read()
    start = raw[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start == b"{":
        first = raw.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")[0]
        if isinstance(_parse(first), dict):
            yield from _jsonl(io.BytesIO(raw))
            return
    if start != b"[":
        yield -1, "not a JSON list of records"
        return
    # bytes that are no UTF-8 become lone surrogates: they spoil their own record only
    text = raw.decode("utf-8-sig", "surrogateescape")
    del raw
    yield from _json_items(text)


def _json_items(text: str) -> Iterator[Row]:
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    position, row = text.index("[") + 1, 0
    while True:
        match = gap.match(text, position)
        position = match.end() if match else position
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            # what follows a break cannot be told apart, so it is one rejected row
            yield row, f"broken JSON from here to the end of the file: {_brief(error)}"
            return
        yield row, _record(value)
        row += 1


def _parse(line: bytes) -> dict[str, Any] | str:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"not UTF-8: {_brief(error)}"
    try:
        return _record(json.loads(text))
    except (ValueError, RecursionError) as error:
        return f"broken JSON: {_brief(error)}"


def _record(value: object) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else "not a JSON object"


def _csv(stream: IO[bytes]) -> Iterator[Row]:
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    names: list[str] = []
    row = -1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            row += 1
            yield row, f"broken CSV: {_brief(error)}"
            continue
        if not names:
            names = cells
            continue
        if not cells:
            continue
        row += 1
        if len(cells) != len(names):
            yield row, f"{len(cells)} cells where the header has {len(names)}"
        else:
            yield row, {name: cell or None for name, cell in zip(names, cells, strict=True)}
    text.detach()


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


def _tar(stream: IO[bytes]) -> Iterator[Row]:
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
                    _member(stream, member, samples)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        broken = f"broken or compressed tar: {_brief(error)}"
    for row, (key, sample) in enumerate(samples.items()):
        if sample.fault:
            yield row, f"sample {key[:100]!r} (a name up to its first dot): {sample.fault[:300]}"
            continue
        if "caption" in sample.columns and "label_0" not in sample.columns:
            sample.columns.setdefault("prompt", sample.columns["caption"])
        yield row, {"__key__": key, **sample.columns}
    if broken:
        yield (len(samples) if samples else -1), broken


def _member(stream: IO[bytes], member: tarfile.TarInfo, samples: dict[str, _Sample]) -> None:
    folder, slash, name = member.name.rpartition("/")
    key, _, extension = name.partition(".")
    *parts, suffix = extension.split(".")
    suffix = suffix.lower()
    column = parts[-1] if parts else suffix
    sample = samples.setdefault(folder + slash + key, _Sample())
    if suffix not in TAR_IMAGES | TAR_TEXT:
        return
    stem = ".".join(parts[:-1])  # of a key with a dot: what follows it
    if parts and stem != (stem if sample.stem is None else sample.stem):
        sample.fault = sample.fault or f"{member.name!r} belongs to another key"
    sample.stem = stem if parts else sample.stem
    if suffix in TAR_IMAGES:
        ref = Member(f"tar:{member.offset_data}+{member.size}:{member.name}")
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


def _brief(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__
