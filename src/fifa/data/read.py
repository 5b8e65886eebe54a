"""`read_pairs`: any feedback data set becomes one table of preference pairs."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from fifa.config import Read
from fifa.console import note, progress
from fifa.data import formats
from fifa.data.columns import Columns, ParquetColumns, RecordColumns, Text, has
from fifa.data.folders import read_sides
from fifa.data.formats import COUNTS, PAIR_COLUMNS, Layout, Winner, own_layout
from fifa.data.merge import merge
from fifa.data.names import (
    NAMES,
    OF_AN_IMAGE,
    Names,
    by_aspect,
    find_names,
    label_columns,
    refuse_names,
)
from fifa.data.pairs import FilePairs, Rejected, finish
from fifa.data.rankings import PAIRINGS, ROW_AN_IMAGE, Compare, Ranked, join, own_rankings
from fifa.data.records import DOTTED, OURS, outside, read_records
from fifa.data.source import Root, Source, SourceFile, find_files
from fifa.data.subset import check_subset
from fifa.data.table import Origin, Pairs
from fifa.data.winners import PROMPTS, likely_columns
from fifa.errors import FifaError, brief
from fifa.shards.files import digest
from fifa.shards.mapped import Shelf

FORMATS = tuple(sorted({form.name for form in formats.FORMATS}))

THREADS = 3
AHEAD = THREADS + 1  # files that are read, or wait for their turn with all of their columns
KEY = "__key__"  # WebDataset's name of a sample's key
VERSION = 6  # of the way a source becomes pairs; part of every fingerprint


def read_pairs(
    source: str | Path,
    format: str | None = None,
    *,
    columns: dict[str, str] | None = None,
    pairs: str | None = None,
    min_gap: float | None = None,
    label_aspect: str | None = None,
    images_from: Sequence[str] = (),
    annotators: Literal["count", "weigh"] = Read.annotators,
    spill: Path | None = None,
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
        ``label`` columns (the label is the probability that a person prefers image_0, or one of
        the forms in `fifa.data.labels.OTHER_SCALES`). For any source with a row a pair: the columns
        of the `fifa.data.names.NAMES`, and of a label by aspect, ``label_ASPECT``, in the same
        forms. Any other name keeps a column of numbers, or of lists of numbers, under that name.
        ``__key__`` is ``dots`` where the keys of a WebDataset tar have dots in them.
    label_aspect
        The labels are those of this aspect, of a source that has several labels a pair.
    annotators
        ``count`` or ``weigh``, as in `fifa.config.Read`.
    pairs, min_gap
        Where a prompt has several rated or ranked images: which two of them make a pair, as in
        `fifa.data.rankings.Compare`; every two if not given.
    images_from
        URLs (``s3://bucket/images``) below which the source may name images; they are opened with
        your rights there.
    spill
        A folder on a disk, where strings and lists lie instead of in memory, in a file without a
        name that goes with the pairs.

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
    if pairs not in (None, *PAIRINGS):
        raise FifaError(f"no pairs {pairs!r}", do=f"take one of {', '.join(PAIRINGS)}")
    found = find_files(source)
    if (folder := found.root.folder) is not None:
        for place in (folder, folder.parent):  # the subset was named, or its files
            check_subset(place)
    reader = _Reader(found.root, format, columns, Compare(pairs, min_gap), label_aspect)
    with progress("reading files", len(found.files)) as advance:
        files = _file_pairs(reader, found, advance)
        read = merge(files, weigh=annotators == "weigh", shelf=Shelf(spill))
    if not len(read):
        raise _nothing(found, read)
    note(pairs=len(read), merged=read.origin.merged, rejected=len(read.rejected))
    if read.origin.not_made:
        note(not_made=sum(read.origin.not_made.values()))
    origin = replace(
        _origin(read, reader, found),
        source=str(source),
        columns=columns,
        pairs=pairs,
        min_gap=min_gap,
        label_aspect=label_aspect,
        annotators=annotators,
        images_from=tuple(images_from),
    )
    origin = replace(origin, fingerprint=_fingerprint(found, origin))
    return replace(read, origin=origin)


def _origin(read: Pairs, reader: _Reader, found: Source) -> Origin:
    """What reading tells of where pairs come from."""
    scores = {name.removeprefix("source_") for name in read.origin.score_columns}
    taken = {name.partition(".")[0] for name in reader.used} | scores | reader.given
    return replace(
        read.origin,
        root=found.root.url,
        format=reader.name,
        used=reader.used,
        ignored=tuple(sorted(reader.names - taken)),
        remote={f.path: (f.size, f.stamp) for f in found.files} if found.root.is_remote else {},
    )


def read_source(read: Read, source: str | None = None, spill: Path | None = None) -> Pairs:
    """`read_pairs` with the knobs of ``read``; ``source`` is where it is now, if not there."""
    return read_pairs(
        source or read.source,
        read.format,
        columns=read.columns,
        pairs=read.pairs,
        min_gap=read.min_gap,
        label_aspect=read.label_aspect,
        images_from=read.images_from,
        annotators=read.annotators,
        spill=spill,
    )


def source_fingerprint(origin: Origin) -> str:
    """`Origin.fingerprint` as it would be now: another one where a file has changed.

    Raises `FifaError` where the source is not at hand.
    """
    return _fingerprint(find_files(origin.source), origin)


def _fingerprint(found: Source, origin: Origin) -> str:
    compare = [origin.pairs, origin.min_gap]
    if compare in ([None, None], [PAIRINGS[0], None]):  # as ever
        compare = []
    files = [file.__dict__ for file in found.files]
    labels = [origin.label_aspect] if origin.label_aspect else []
    labels += [origin.annotators] if origin.annotators != Read.annotators else []
    return digest([VERSION, origin.format, origin.columns, files, *compare, *labels])


class _Reader:
    """Reads one file after another, all in one format."""

    def __init__(
        self,
        root: Root,
        format: str | None,
        columns: dict[str, str],
        compare: Compare,
        aspect: str | None,
    ) -> None:
        self.root, self.compare, self.aspect = root, compare, aspect
        self.name = format or ""
        self.used: dict[str, str] = {}  # of the first file with a format
        self.names: frozenset[str] = frozenset()
        self._dots, self.given = frozenset[str](), set(columns.values())
        if KEY in columns:
            if columns[KEY] != "dots":
                raise FifaError(f"{KEY} is {columns[KEY]!r}", do=f"say {DOTTED}, or leave it out")
            self._dots = formats.known_columns() | self.given
        named = {*NAMES, *OF_AN_IMAGE[0], *label_columns(columns)}
        self.named = {name: column for name, column in columns.items() if name in named}
        own: tuple[str, ...] = (*PAIR_COLUMNS, *COUNTS)
        self._own: Layout | Ranked | None = own_rankings(columns)
        if self._own:
            own = ROW_AN_IMAGE
        elif format == "columns" or columns.keys() & {*own}:
            self._own = own_layout({name: columns[name] for name in own if name in columns})
        if self._own:
            self.name = "columns"
        used = {*own, KEY, *named}
        self.carried = {name: column for name, column in columns.items() if name not in used}

    def read(self, file: SourceFile) -> tuple[str, FilePairs]:
        """A file's format and pairs; one that cannot be read is one rejected row."""
        try:
            return self._read(file)
        except FifaError:
            raise
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
            # pyarrow's errors are ValueErrors, OSErrors, KeyErrors, NotImplementedErrors
            why = f"the file cannot be read: {brief(error)}"
            return "", FilePairs(file.path, rejected=[(None, why)])
        finally:
            pa.default_memory_pool().release_unused()  # only its own thread can give it back

    def _read(self, file: SourceFile) -> tuple[str, FilePairs]:
        columns, rejected = self._columns(file)
        form = self._form(columns)
        if form is None:
            reasons = [*rejected, *_unknown(columns, bool(rejected))]
            return "", FilePairs(file.path, rejected=reasons)
        own = self._pairs(columns, form)
        own.rejected += rejected
        own.used, own.names = form.uses(columns) | own.used, columns.names
        if own.members is not None:
            placed = self._placed(file, own.members["key"], own.members["ref"])
            for at, column in zip((4, 5), placed, strict=True):
                name = own.members.column_names[at]
                own.members = own.members.set_column(at, name, column)
            return form.name, own
        for side in (0, 1):
            key, ref = f"image_{side}", f"image_{side}_ref"
            placed = self._placed(file, own.columns[key], own.columns[ref])
            own.columns[key], own.columns[ref] = placed
        return form.name, finish(own)

    def _pairs(self, columns: Columns, form: Layout | Ranked) -> FilePairs:
        """A file's pairs, with its names; the labels are those of the aspect, if one is asked."""
        if len(form.images) == 2 and self.compare not in (Compare(), Compare(PAIRINGS[0])):
            raise FifaError(
                "--pairs and --min-gap are for several rated images of a prompt; here a row is a "
                "pair",
                where=columns.file,
                do="leave them out",
            )
        if isinstance(form, Ranked):
            refuse_names(self.carried, form.images, columns.file)
            own = form.read(columns, self.named, self.compare)
        else:
            names = find_names(columns, form.images, self.named, self.aspect)
            plain = Names()
            if self.aspect in names.aspects:
                reads = tuple(name for name in form.reads if has(columns, name))
                there = all(has(columns, name) for name in form.needs)
                if there and form.needs not in map(itemgetter(0), names.aspects.values()):
                    plain = Names(aspects={"plain": (form.needs + reads, form.label)})
                needs, label = names.aspects[self.aspect]
                form = replace(form, label=label, needs=needs, reads=())
            columns.beside = [*names.columns, *plain.columns]
            own = form.read(columns, self.carried)
            own.columns |= names.read(columns)
            with suppress(FifaError):  # on another scale, and not asked for
                own.columns |= plain.read(columns)
            own.used = names.uses() | plain.uses()
        if self.aspect and own.members is None and len(own):
            replaced = by_aspect(own.columns, self.aspect, columns.file)
            if isinstance(form, Ranked):
                own.columns["label_plain"] = replaced
        return own

    def _columns(self, file: SourceFile) -> tuple[Columns, Rejected]:
        if file.kind == "sides" and self.root.folder is not None:
            one, _, two = file.path.partition("+")
            records = read_sides(self.root.folder, (one, two))
            return RecordColumns(records, "jsonl", file.path), records.rejected
        if file.kind == "parquet":
            opened = self.root.parquet(file.path, file.size, file.stamp)
            return ParquetColumns(opened, file.path), []
        with self.root.open(file.path, file.size, file.stamp) as stream:
            records = read_records(stream, file.kind, self._dots)
        if file.path.rpartition("/")[2].partition(".")[0] == "metadata":
            records.columns = _image_folder(records.columns, self.given)
        return RecordColumns(records, file.kind, file.path), records.rejected

    def _form(self, columns: Columns) -> Layout | Ranked | None:
        if self._own:
            return self._own
        for form in formats.FORMATS:
            if self.name in ("", form.name) and form.fits(columns):
                return form.layout(columns) if isinstance(form, Winner) else form
        return None

    def _placed(self, file: SourceFile, keys: Text, refs: Text) -> tuple[Text, Text]:
        """Relative paths from the root: they are beside the file, or in a folder beside it.

        A path below the file's own folder is that folder's: ``test/0.png`` and ``train/0.png`` are
        two images, though either file says ``0.png``, and so are their keys.
        """
        root, given = self.root, refs
        files = pc.fill_null(pc.starts_with(refs, "file://"), False)
        if pc.any(files).as_py():
            paths = [unquote(urlsplit(ref).path) for ref in refs.filter(files).to_pylist()]
            refs = pc.replace_with_mask(refs, files, pa.array(map(outside, paths), refs.type))
        some = refs.drop_null().slice(0, 200).to_pylist()
        paths = [ref for ref in some if ref and is_path(ref)][:20]
        if root.is_remote or not paths:
            prefix = file.path.rpartition("/")[0] if paths else ""
        else:
            prefix = _prefix(root, file.path, paths)
            plain = [path.replace("\\", "/") for path in paths]
            if plain != paths and not _there(root, prefix, paths):  # written on Windows
                prefix = _prefix(root, file.path, plain)
                if _there(root, prefix, plain):
                    refs = pc.replace_substring(refs, "\\", "/")
        parent = file.path.rpartition("/")[0]
        if parent and f"{prefix}/".startswith(f"{parent}/"):
            same = pc.fill_null(pc.equal(keys, given), False)
            keys = pc.if_else(same, _prefixed(given, f"{parent}/"), keys)
        prefix = outside(prefix)
        return keys, _prefixed(refs, f"{prefix}/") if prefix else refs


def is_path(ref: str) -> bool:
    """True for a reference that is a path relative to the root (no URL, tar member or cell)."""
    return "://" not in ref and not ref.startswith((*OURS, "/"))


def _prefix(root: Root, file: str, paths: list[str]) -> str:
    parent = file.rpartition("/")[0]
    stem = Path(file).stem
    for base in dict.fromkeys((parent, "")):
        for name in ("", "images", stem, "image"):
            prefix = "/".join(part for part in (base, name) if part)
            if _there(root, prefix, paths):
                return prefix
    return parent


def _there(root: Root, prefix: str, paths: list[str]) -> bool:
    """True if one of the paths is a file below the prefix."""
    return any(root.holds(f"{prefix}/{path}" if prefix else path) for path in paths)


def _prefixed(refs: Text, prefix: str) -> Text:
    if not len(refs) or refs.null_count == len(refs):
        return refs
    whole = pc.match_substring_regex(refs, f"^/|^{'|^'.join(OURS)}|://")
    return pc.if_else(whole, refs, pc.binary_join_element_wise(prefix, refs, ""))


def _file_pairs(
    reader: _Reader, found: Source, advance: Callable[[int], None]
) -> Iterator[FilePairs]:
    """Every file's pairs, in order, read a few files ahead; all files have one format."""
    forms: Counter[str] = Counter()
    ranked: list[FilePairs] = []  # files of which a row is one image of a ranking
    yield from (FilePairs(path, rejected=[(None, why)]) for path, why in found.refused)
    files = iter(found.files)
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = deque(pool.submit(reader.read, file) for file in islice(files, AHEAD))
        while waiting:
            name, own = waiting.popleft().result()
            waiting.extend(pool.submit(reader.read, file) for file in islice(files, 1))
            if name:
                forms[name] += 1
                reader.used, reader.names = reader.used or own.used, reader.names | own.names
            if len(forms) > 1:
                mixed = " and ".join(sorted(forms))
                raise FifaError(
                    f"files of several formats here: {mixed}",
                    where=found.named,
                    do="name one with --format, or a glob that matches one",
                )
            if own.members is not None:
                ranked.append(own)
            advance(1)
            yield own
    for own in join(ranked, reader.compare):
        if reader.aspect and len(own):
            own.columns["label_plain"] = by_aspect(own.columns, reader.aspect, own.file)
        yield finish(own)
    reader.name = next(iter(forms), reader.name)


def _image_folder(columns: dict[str, list[Any]], given: set[str]) -> dict[str, list[Any]]:
    """The columns of `datasets`' imagefolder as it names them, and its text as the prompt.

    ``chosen_file_name`` becomes ``chosen``, ``file_name`` becomes ``image``; where the user has
    ``given`` one of the file's own names, these stay.
    """
    names = {name: re.sub("_file_names?$", "", name) for name in columns}
    names |= {"file_name": "image"}
    if "prompt" not in columns:
        names["text"] = "prompt"
    renamed = {names.get(name, name): values for name, values in columns.items()}
    own = columns.keys() - renamed.keys()
    return columns if own & given or len(renamed) < len(columns) else renamed


def _unknown(columns: Columns, explained: bool) -> Rejected:
    """Why a file has no format; nothing if its rows have been rejected already."""
    if columns.names:
        some = ", ".join(sorted(columns.names)[:20])
        looks = _one_image(columns) or likely_columns(columns)
        if {"images", "chosen", "rejected"} <= columns.names:
            looks = " (it looks like TRL's answers about images: they say which text is better)"
        return [(None, f"no known format has these columns: {some}{looks}")]
    return [] if explained else [(None, "the file is empty")]


def _one_image(columns: Columns) -> str:
    """What to say to a table with one image and a number in each row."""
    images = [name for name in sorted(columns.names) if re.search(r"image|img|path|url|file", name)]
    numbers = [name for name in columns.numeric() if not re.search(r"id$|index|^seed$", name)]
    if len(images) != 1 or not numbers:
        return ""
    prompt = next((name for name in PROMPTS if name in columns.names), "...")
    return (
        f" (it looks like a row an image: --columns prompt={prompt},image={images[0]},"
        f"score={numbers[0]} pairs the images of each prompt, and rank=... where less is better)"
    )


def _nothing(found: Source, pairs: Pairs) -> FifaError:
    """The message for a source without one pair: its commonest reason."""
    if not len(pairs.rejected):
        why = "; ".join(f"{count:,} pairs: {n}" for n, count in pairs.origin.not_made.items())
        return FifaError(f"no pairs: {why}" if why else "the data set is empty", where=found.named)
    reasons = Counter(pairs.rejected["reason"].to_pylist())
    reason, count = reasons.most_common(1)[0]
    place = next(row for row in pairs.rejected.to_pylist() if row["reason"] == reason)
    do = "say which columns are which with --columns prompt=...,image_0=...,image_1=...,label=..."
    return FifaError(
        f"no pairs: {reason}" + (f" ({count:,} times)" if count > 1 else ""),
        where=f"{found.named}, {place['file']}"
        + ("" if place["row"] is None else f", row {place['row']}"),
        do=do if "columns" in reason and "--columns" not in reason else None,
    )
