"""From files' pairs to one table of pairs: prompts numbered, repeats merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa.data.annotators import dawid_skene
from fifa.data.ids import hex_strings
from fifa.data.names import NAMES, labels_by_aspect
from fifa.data.pairs import FilePairs
from fifa.data.table import PAIRS, PROMPTS, REJECTED, Origin, Pairs
from fifa.errors import FifaError
from fifa.shards.mapped import Shelf, give_back

MAX_PIECES = 2_000  # of a column, or
PIECE = 1_000  # rows in a piece, on average
PART = 1 << 17  # pairs of which rows are left out at a time: what Arrow's threads free stays theirs
LAST_BITS = 0xFFFF
WORST = 10  # annotators that are named
HALVES = (0, 1)  # of all hashes, by their first bit


def merge(files: Iterable[FilePairs], *, weigh: bool = False, shelf: Shelf | None = None) -> Pairs:
    """Join files' pairs into one table; of the origin it knows no more than what they hold.

    ``weigh``: labels are not the votes' shares, but annotators weighed by their reliability.
    ``shelf``: where strings and lists lie meanwhile and later, if not in memory.

    A pair met again (the same prompt and images, on whichever sides) adds its votes to the first
    one's label and goes, its labels by aspect likewise and its annotators after the first one's;
    everything else is the first one's.
    """
    full: list[FilePairs] = []
    shelf = shelf or Shelf(None)
    rejected: list[tuple[str, int | None, str]] = []
    cells: tuple[str, str] | None = None
    not_made: Counter[str] = Counter()
    for own in files:
        not_made += own.not_made
        rejected += [(own.file, row, reason) for row, reason in own.rejected]
        cells = cells or own.cells
        if len(own):
            _shelve(own, shelf)
            full.append(own)
            give_back()
    give_back()  # what the threads had, which are no more
    known: dict[str, Any] = {}
    table, prompts = PAIRS.empty_table(), PROMPTS.empty_table()
    if full:
        table, prompts = _tables(full, known if weigh else None, shelf)
    beside = {*PAIRS.names, *NAMES, *labels_by_aspect(table)}
    scores = [name for name in table.column_names if name not in beside]
    pairs = sum(map(len, full))
    rejected.sort(key=lambda row: (row[0], -1 if row[1] is None else row[1]))
    by_column = [list(column) for column in zip(*rejected, strict=True)] or [[], [], []]
    origin = Origin(
        cells=cells,
        score_columns=tuple(scores),
        rows=pairs + len(rejected),
        merged=pairs - len(table),
        not_made=dict(not_made),
        reliability=known,
    )
    return Pairs(table, prompts, pa.table(by_column, schema=REJECTED), origin)


def _shelve(own: FilePairs, shelf: Shelf) -> None:
    """Put a file's columns on the shelf, but for dictionaries, which are to be joined."""
    plain = {n: one for n, one in own.columns.items() if not pa.types.is_dictionary(one.type)}
    table = shelf.put(pa.table(plain))
    own.columns |= dict(zip(plain, table.columns, strict=True))


def _is_heavy(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_list(kind))


def _tables(
    files: list[FilePairs], known: dict[str, Any] | None, shelf: Shelf
) -> tuple[pa.Table, pa.Table]:
    """The pairs, those met again merged, and the prompts.

    Annotators are weighed where ``known`` is given, which then has `Origin.reliability`.
    """
    images = [own.images for own in files]
    words = _words(images)
    with ThreadPoolExecutor(len(HALVES)) as pool:  # sorting leaves the interpreter alone
        search = [pool.submit(_met_again, words, half) for half in HALVES]
        columns = _joined(files)
        prompts = _prompts(columns, files)
        shared = [each.result() for each in search]
    same_images = _repeats(images, words, shared)
    repeat = columns["repeat"].to_numpy()
    repeat[same_images[0]] = True
    columns["repeat"] = pa.chunked_array([repeat])
    aspects = labels_by_aspect(columns)
    same = _same_pairs(files, *same_images)
    weighed = None if known is None else _weighed(columns, *same, files, known)
    merged = _merge(columns, *same, files, aspects)
    if weighed is not None:
        columns["label"] = pa.chunked_array([weighed])
    beside = [name for name in (*NAMES, *aspects) if name in columns]
    others = [name for name in columns if name not in {*PAIRS.names, *beside}]
    schema = pa.schema([*PAIRS, *((name, columns[name].type) for name in [*beside, *others])])
    table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    return _without(_all_shelved(table, shelf), merged, shelf), shelf.put(prompts)


def _all_shelved(table: pa.Table, shelf: Shelf) -> pa.Table:
    """Put what was joined there too: 80 bytes a pair, of which no step needs all."""
    light = [field.name for field in table.schema if not _is_heavy(field.type)]
    columns = dict(zip(table.column_names, table.columns, strict=True))
    columns |= dict(zip(light, shelf.put(table.select(light)).columns, strict=True))
    return pa.table(columns, schema=table.schema)


def _joined(files: list[FilePairs]) -> dict[str, pa.ChunkedArray]:
    """All files' columns one after the other; a score that a file lacks is null there."""
    types: dict[str, pa.DataType] = {}
    for own in files:
        for name, values in own.columns.items():
            if types.setdefault(name, values.type) != values.type:
                kinds = f"{types[name]} in an earlier file, {values.type} here"
                raise FifaError(f"column {name!r} is {kinds}", where=own.file)
    columns = {}
    for name, kind in types.items():
        found = [own.columns.get(name, pa.nulls(len(own), kind)) for own in files]
        pieces = [
            column.chunks if isinstance(column, pa.ChunkedArray) else [column] for column in found
        ]
        columns[name] = pa.chunked_array([piece for some in pieces for piece in some], kind)
    for name in ("file", *NAMES):
        if name in columns:
            columns[name] = columns[name].unify_dictionaries()
    return columns


def _prompts(columns: dict[str, pa.ChunkedArray], files: list[FilePairs]) -> pa.Table:
    """Number the prompts in order of first appearance (``prompt_index``, ``prompt_id``).

    Returns `PROMPTS`, a row a prompt, with its first spelling.
    """
    hashes = np.concatenate([own.prompts for own in files], axis=1)
    again, first = _repeats([hashes])
    new = np.ones(hashes.shape[1], bool)
    new[again] = False
    ids = hex_strings(hashes[:, new])
    number = np.cumsum(new, dtype=np.int32) - 1  # of every file's every spelling
    number[again] = number[first]
    ends = np.cumsum([own.prompts.shape[1] for own in files])
    index = [
        pa.array(numbers.take(own.columns["prompt"].indices.to_numpy()))
        for own, numbers in zip(files, np.split(number, ends[:-1]), strict=True)
    ]
    named = [pa.DictionaryArray.from_arrays(numbers, ids, safe=False) for numbers in index]
    columns["prompt_index"] = pa.chunked_array(index)
    columns["prompt_id"] = pa.chunked_array(named)
    spellings = pa.chunked_array([own.columns["prompt"].dictionary for own in files])
    return pa.table([ids, spellings.filter(pa.array(new))], schema=PROMPTS)


def _words(hashes: list[np.ndarray]) -> np.ndarray:
    """The first 32 bits of hashes (uint64 [2, n] each) one after the other: uint32 [sum of n]."""
    return np.concatenate([(key >> np.uint64(32)).astype(np.uint32) for key, _ in hashes])


def _met_again(words: np.ndarray, half: int) -> np.ndarray:
    """Those of the words (uint32 [n]) with this first bit that are there twice: sorted.

    Words are sorted much faster than whole hashes, and either half in a thread of its own.
    """
    some = words[words >> np.uint32(31) == half]
    some.sort()
    twice: np.ndarray = some[1:][some[1:] == some[:-1]]
    return twice


def _repeats(
    hashes: list[np.ndarray],
    words: np.ndarray | None = None,
    shared: list[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Which hashes (uint64 [2, n] each, one after the other) have the 80 bits of an earlier one.

    Returns their rows, ascending, and for each the first row with these bits: int64 [m] both.
    ``shared`` is what `_met_again` finds in the halves of their `_words`; only rows with such a
    word are compared.
    """
    words = _words(hashes) if words is None else words
    twice = np.concatenate(shared or [_met_again(words, half) for half in HALVES])
    likely = np.zeros(1 << 16, bool)
    likely[twice & LAST_BITS] = True
    rows = np.flatnonzero(likely[words & LAST_BITS])
    rows = rows[np.isin(words[rows], twice)]
    key, tail = _of_rows(hashes, rows)
    tail &= np.uint64(LAST_BITS)
    order = np.lexsort((tail, key))  # stable: equal rows stay in their order
    rows, key, tail = rows[order], key[order], tail[order]
    new = np.ones(len(rows), bool)
    new[1:] = (key[1:] != key[:-1]) | (tail[1:] != tail[:-1])
    again, first = rows[~new], rows[new][np.cumsum(new) - 1][~new]
    order = np.argsort(again)
    return again[order], first[order]


def _same_pairs(
    files: list[FilePairs], again: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows that have an earlier row's images, those that have its prompt too.

    Returns them, ascending, and the first row with the same pair.
    """
    rows = np.union1d(again, first)
    again, first = _repeats([_of_rows([own.pairs for own in files], rows)])
    return rows[again], rows[first]


def _of_rows(arrays: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Some ``rows``, ascending, of arrays that follow one another in their last dimension."""
    ends = np.cumsum([array.shape[-1] for array in arrays])
    own = np.split(rows, np.searchsorted(rows, ends[:-1]))
    starts = (ends - [array.shape[-1] for array in arrays]).tolist()
    found = [
        array[..., some - start] for array, some, start in zip(arrays, own, starts, strict=True)
    ]
    return np.concatenate(found, axis=-1)


def _merge(
    columns: dict[str, pa.ChunkedArray],
    again: np.ndarray,
    first: np.ndarray,
    files: list[FilePairs],
    aspects: list[str],
) -> np.ndarray:
    """Average the labels of repeated pairs into their first row; returns the other rows.

    label = sum(votes * label) / sum(votes), with 1 - label where a repeat has the sides
    the other way round.
    """
    heads = np.unique(first)
    rows = np.union1d(heads, again)
    at = np.searchsorted(rows, heads)
    head = np.arange(len(rows))  # of every row, by its place in rows
    head[np.searchsorted(rows, again)] = np.searchsorted(rows, first)
    high = _of_rows([own.high for own in files], rows)
    own, weight = (
        _of_rows([np.asarray(own.columns[name]) for own in files], rows)
        for name in ("label", "votes")
    )
    turned = high != high[head]
    if len(again):
        for name in aspects:
            aspect = columns[name].to_numpy().copy()  # NaN where there is none
            aspect[heads] = _means(aspect[rows].astype(np.float64), turned, weight, head)[at]
            columns[name] = pa.chunked_array([pa.array(aspect, pa.float32(), from_pandas=True)])
        if "annotator" in columns:
            columns["annotator"] = _annotators(columns["annotator"], rows, head)
    label = columns["label"].to_numpy().astype(np.float32)
    label[heads] = _means(own, turned, weight, head)[at]
    columns["label"] = pa.chunked_array([label])
    if len(again):
        weight = np.bincount(head, weights=weight)[at]
        votes = columns["votes"].to_numpy().copy()
        votes[heads] = np.minimum(weight, np.iinfo(np.int32).max)
        columns["votes"] = pa.chunked_array([votes])
    return again


def _weighed(
    columns: dict[str, pa.ChunkedArray],
    again: np.ndarray,
    first: np.ndarray,
    files: list[FilePairs],
    known: dict[str, Any],
) -> np.ndarray:
    """The label of every row by the annotators' reliability, float32 [n]; fills ``known``.

    In hundredths: what nobody can tell is a tie. Votes without a name are one annotator's.
    """
    advice = "leave --annotators weigh out"
    if "annotator" not in columns:
        raise FifaError(
            "the source does not say who judged a pair",
            do=f"{advice}, or name the column with --columns annotator=NAME",
        )
    pair = np.arange(len(columns["label"]))
    pair[again] = first
    high = np.concatenate([own.high for own in files])
    vote = columns["label"].to_numpy().astype(np.float64)
    vote = np.where(high != high[pair], 1 - vote, vote)
    codes = columns["annotator"].combine_chunks()
    names = [*codes.dictionary.to_pylist(), "(no name)"]
    annotator = codes.indices.fill_null(len(names) - 1).to_numpy().astype(np.int64)
    # two different annotators of one pair, for at least one pair
    if not (annotator[again] != annotator[first]).any():
        raise FifaError("no pair was judged by two annotators, each in a row of its own", do=advice)
    heads, item = np.unique(pair, return_inverse=True)
    found = dawid_skene(item, annotator, vote)
    here = np.flatnonzero(found.votes)
    worst = here[np.argsort(found.right[here], kind="stable")][:WORST]
    known |= {
        "annotators": len(here),
        "votes": len(vote),
        "worst": [[names[k], int(found.votes[k]), round(float(found.right[k]), 4)] for k in worst],
    }
    label = np.empty(len(pair), np.float32)
    label[heads] = found.label.round(2)
    label[again] = label[first]
    return label


def _means(
    label: np.ndarray, turned: np.ndarray, weight: np.ndarray, head: np.ndarray
) -> np.ndarray:
    """The weighted mean of the labels of each head (its place), those that are there; or NaN."""
    known = ~np.isnan(label)
    share = np.where(known, np.where(turned, 1.0 - label, label), 0.0) * weight
    total = np.bincount(head, weights=known * weight)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.bincount(head, weights=share) / total)


def _annotators(column: pa.ChunkedArray, rows: np.ndarray, head: np.ndarray) -> pa.ChunkedArray:
    """Whoever judged one of the ``rows`` stands in its head's row: each once, in their order."""
    texts = column.take(pa.array(rows)).cast(pa.string()).to_pylist()
    judges: dict[int, dict[str, None]] = {}
    for place, text in zip(head.tolist(), texts, strict=True):
        judges.setdefault(place, {}).update(dict.fromkeys(text.split(", ") if text else ()))
    heads = list(judges)
    joined = pa.array([", ".join(judges[place]) or None for place in heads], pa.string())
    codes = column.combine_chunks()
    known = pa.concat_arrays([codes.dictionary, joined.drop_null()]).unique()
    indices = codes.indices.fill_null(0).to_numpy().copy()
    indices[rows[heads]] = pc.index_in(joined, value_set=known).fill_null(0)
    nobody = np.asarray(codes.indices.is_null()).copy()
    nobody[rows[heads]] = np.asarray(joined.is_null())
    return pa.chunked_array([codes.from_arrays(pa.array(indices, mask=nobody), known)])


def _without(table: pa.Table, gone: np.ndarray, shelf: Shelf) -> pa.Table:
    """The other rows: as slices of what is there, unless that makes too many pieces."""
    if len(gone) <= max(MAX_PIECES, len(table) // PIECE):
        bounds = zip([0, *(gone + 1)], [*gone, len(table)], strict=True)
        return pa.concat_tables([table.slice(start, stop - start) for start, stop in bounds])
    stays = np.ones(len(table), bool)
    stays[gone] = False
    heavy = [field.name for field in table.schema if _is_heavy(field.type)]
    parts = []
    for start in range(0, len(table), PART):
        some = table.slice(start, PART).filter(pa.array(stays[start : start + PART]))
        columns = dict(zip(some.column_names, some.columns, strict=True))
        columns |= dict(zip(heavy, shelf.put(some.select(heavy)).columns, strict=True))
        parts.append(pa.table(columns, schema=some.schema))
        give_back()
    return pa.concat_tables(parts)
