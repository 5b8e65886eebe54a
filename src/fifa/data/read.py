"""`read_pairs`: any feedback data set becomes one table of preference pairs."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pyarrow.compute as pc

from fifa.console import note, progress
from fifa.data.clean import Part, make_part
from fifa.data.columns import Frame, ParquetFrame, RecordFrame, Text
from fifa.data.formats import Layout, from_layout, plan
from fifa.data.layouts import LAYOUTS, own_layout
from fifa.data.merge import Assembled, assemble
from fifa.data.rankings import RANKINGS, Ranked
from fifa.data.records import read_records
from fifa.data.source import Root, Source, SourceFile, find_files, has_file
from fifa.data.table import Origin, Pairs
from fifa.errors import FifaError
from fifa.shards.files import digest

FORMATS = tuple(sorted({form.name for form in (*LAYOUTS, *RANKINGS)}))
PAIR_COLUMNS = ("prompt", "image_0", "image_1", "label")

AHEAD = 8  # files that are open at a time
THREADS = 3
BLOCK = 5 << 20  # bytes; a remote file below it is read whole, of others only the columns needed
VERSION = 3  # of the way a source becomes pairs; part of every fingerprint

Format = Layout | Ranked
Rejected = list[tuple[int | None, str]]


def read_pairs(
    source: str | Path, format: str | None = None, *, columns: dict[str, str] | None = None
) -> Pairs:
    """Read preference pairs, whatever data set they come in, without reading pixels.

    Parameters
    ----------
    source
        A file, a folder (searched recursively), a glob, ``hf://datasets/...`` or any URL that
        fsspec knows: Parquet, JSON, JSON lines, CSV or WebDataset tar.
    format
        One of `FORMATS`; None recognises it by its columns.
    columns
        For a table of your own: the names of its ``prompt``, ``image_0``, ``image_1`` and
        ``label`` columns (the label is the probability that a person prefers image_0). Any other
        name keeps a column of numbers, or of lists of numbers, under that name.

    Returns
    -------
    Pairs
        Rows that could not be read are in ``Pairs.rejected``, each with its reason; pairs that
        the source repeats are merged, their labels averaged.

    Raises
    ------
    FifaError
        Where there is nothing to read, columns are missing, or not one row is a pair.
    """
    columns = columns or {}
    if format is not None and format not in FORMATS:
        raise FifaError(f"no format {format!r}", do=f"take one of {', '.join(FORMATS)}")
    found = find_files(source)
    reader = _Reader(found.root, format, columns)
    with progress("reading files", len(found.files)) as advance:
        done = assemble(_parts(reader, found, advance))
    if not len(done.table):
        raise _nothing(found, done)
    note(pairs=len(done.table), merged=done.merged, rejected=len(done.rejected))
    return Pairs(
        done.table,
        done.prompts,
        done.rejected,
        Origin(
            source=str(source),
            root=found.root.url,
            format=reader.name,
            columns=columns,
            cells=done.cells,
            score_columns=done.scores,
            fingerprint=_fingerprint(found, reader.name, columns),
            rows=done.rows,
            merged=done.merged,
        ),
    )


def source_fingerprint(origin: Origin) -> str:
    """`Origin.fingerprint` as it would be now: another one where a file has changed.

    Raises `FifaError` where the source is not at hand.
    """
    return _fingerprint(find_files(origin.source), origin.format, origin.columns)


def _fingerprint(found: Source, format: str, columns: dict[str, str]) -> str:
    return digest([VERSION, format, columns, [file.__dict__ for file in found.files]])


class _Reader:
    """Reads one file after another, all in one format."""

    def __init__(self, root: Root, format: str | None, columns: dict[str, str]) -> None:
        self.root = root
        self.name = format or ""
        self.carried = {name: c for name, c in columns.items() if name not in PAIR_COLUMNS}
        own = {name: column for name, column in columns.items() if name in PAIR_COLUMNS}
        self._own = own_layout(own) if own or format == "columns" else None
        if self._own:
            self.name = "columns"

    def read(self, file: SourceFile) -> tuple[str, Part]:
        """A file's format and pairs; one that cannot be read is one rejected row."""
        try:
            return self._read(file)
        except FifaError:
            raise
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
            # pyarrow's errors are ValueErrors, OSErrors, KeyErrors, NotImplementedErrors
            brief = " ".join(str(error).split())[:300]
            return "", Part(file.path, [(None, f"the file cannot be read: {brief}")])

    def _read(self, file: SourceFile) -> tuple[str, Part]:
        frame, rejected = self._frame(file)
        form = self._form(frame)
        if form is None:
            return "", Part(file.path, [*rejected, *_unknown(frame, bool(rejected))])
        if isinstance(form, Ranked):
            batch = form.convert(frame)
        else:
            what = plan(frame, form, self.carried)
            frame.load(what.wanted, prompt=form.prompt)
            batch = from_layout(frame, what)
        batch.rejected += rejected
        batch.refs = self._placed(file, batch.refs)
        return form.name, make_part(batch)

    def _frame(self, file: SourceFile) -> tuple[Frame, Rejected]:
        if file.kind == "parquet":
            local = self.root.folder is not None
            name = self.root.name(file.path)
            opened = name if local else self.root.open(file.path, ahead=file.size < BLOCK)
            return ParquetFrame(opened, file.path), []
        with self.root.open(file.path) as stream:
            records = read_records(stream, file.kind)
        return RecordFrame(records, file.kind, file.path), records.rejected

    def _form(self, frame: Frame) -> Format | None:
        if self._own:
            return self._own
        for form in (*RANKINGS, *LAYOUTS):
            if self.name in ("", form.name) and form.fits(frame):
                return form
        return None

    def _placed(self, file: SourceFile, refs: tuple[Text, Text]) -> tuple[Text, Text]:
        """Relative paths, found below the root: beside the file, or in a folder beside it."""
        folder = self.root.folder
        paths = [ref for ref in refs[0].slice(0, 200).to_pylist() if ref and is_path(ref)][:20]
        if folder is None or not paths:
            prefix = file.path.rpartition("/")[0] if paths else ""
        else:
            prefix = _prefix(folder, file.path, paths)
        if not prefix:
            return refs[0], refs[1]
        first, second = (_prefixed(ref, f"{prefix}/") for ref in refs)
        return first, second


def is_path(ref: str) -> bool:
    """True for a reference that is a path relative to the root (no URL, tar member or cell)."""
    return "://" not in ref and not ref.startswith(("tar:", "cell:", "/"))


def _prefix(root: Path, file: str, paths: list[str]) -> str:
    parent = file.rpartition("/")[0]
    stem = Path(file).stem
    for base in dict.fromkeys((parent, "")):
        for name in ("", "images", stem, "image"):
            prefix = "/".join(part for part in (base, name) if part)
            for path in paths:
                if has_file(root, f"{prefix}/{path}" if prefix else path):
                    return prefix
    return parent


def _prefixed(refs: Text, prefix: str) -> Text:
    if not len(refs) or refs.null_count == len(refs):
        return refs
    whole = pc.match_substring_regex(refs, "^/|^tar:|^cell:|://")
    return pc.if_else(whole, refs, pc.binary_join_element_wise(prefix, refs, ""))


def _parts(reader: _Reader, found: Source, advance: Callable[[int], None]) -> Iterator[Part]:
    """Every file's part, in order, made a few files ahead; all files have one format."""
    forms: Counter[str] = Counter()
    yield from (Part(path, [(None, reason)]) for path, reason in found.refused)
    files = iter(found.files)
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = deque(pool.submit(reader.read, file) for file in islice(files, AHEAD))
        while waiting:
            name, part = waiting.popleft().result()
            waiting.extend(pool.submit(reader.read, file) for file in islice(files, 1))
            if name:
                forms[name] += 1
            if len(forms) > 1:
                mixed = " and ".join(sorted(forms))
                raise FifaError(
                    f"files of several formats here: {mixed}",
                    where=found.named,
                    do="name one with --format, or a glob that matches one",
                )
            advance(1)
            yield part
    reader.name = next(iter(forms), reader.name)


def _unknown(frame: Frame, explained: bool) -> Rejected:
    """Why a file has no format; nothing if its rows have been rejected already."""
    if frame.names:
        some = ", ".join(sorted(frame.names)[:20])
        return [(None, f"no known format has these columns: {some}")]
    return [] if explained else [(None, "the file is empty")]


def _nothing(found: Source, done: Assembled) -> FifaError:
    """The message for a source without one pair: its commonest reason."""
    if not len(done.rejected):
        return FifaError("the data set is empty", where=found.named)
    reasons = Counter(done.rejected["reason"].to_pylist())
    reason, count = reasons.most_common(1)[0]
    place = next(row for row in done.rejected.to_pylist() if row["reason"] == reason)
    do = "say which columns are which with --columns prompt=...,image_0=...,image_1=...,label=..."
    return FifaError(
        f"no pairs: {reason}" + (f" ({count:,} times)" if count > 1 else ""),
        where=f"{found.named}, {place['file']}"
        + ("" if place["row"] is None else f", row {place['row']}"),
        do=do if "columns" in reason else None,
    )
