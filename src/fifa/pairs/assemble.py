"""From files' parts to the table of pairs: prompts numbered, repeats merged."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa.errors import FifaError
from fifa.pairs.ids import hex_strings
from fifa.pairs.part import Part
from fifa.pairs.table import PAIRS, PROMPTS, REJECTED

MAX_PIECES = 2_000  # of a column
LAST_BITS = np.uint64(0xFFFF)


@dataclass(frozen=True)
class Assembled:
    """The tables, and how many rows went into them.

    Parameters
    ----------
    table, prompts, rejected
        As in `fifa.pairs.table.Pairs`.
    scores
        The table's columns beyond `PAIRS`.
    cells
        The columns with image bytes, if a file has any.
    rows, merged
        Rows read, and how many repeated an earlier pair.
    """

    table: pa.Table
    prompts: pa.Table
    rejected: pa.Table
    scores: tuple[str, ...]
    cells: tuple[str, str] | None
    rows: int
    merged: int


def assemble(parts: Iterable[Part]) -> Assembled:
    """Join files' parts into one table of pairs.

    A pair met again (the same prompt and images, on whichever sides) adds its votes to the first
    one's label and goes; everything else is the first one's.
    """
    full: list[Part] = []
    rejected: list[tuple[str, int | None, str]] = []
    cells: tuple[str, str] | None = None
    for part in parts:
        rejected += [(part.file, row, reason) for row, reason in part.rejected]
        cells = cells or part.cells
        if part.columns:
            full.append(part)
    table, prompts = _tables(full) if full else (PAIRS.empty_table(), PROMPTS.empty_table())
    pairs = sum(part.pairs.shape[1] for part in full)
    rejected.sort(key=lambda row: (row[0], -1 if row[1] is None else row[1]))
    by_column = [list(column) for column in zip(*rejected, strict=True)] or [[], [], []]
    return Assembled(
        table=table,
        prompts=prompts,
        rejected=pa.table(by_column, schema=REJECTED),
        scores=tuple(table.column_names[len(PAIRS) :]),
        cells=cells,
        rows=pairs + len(rejected),
        merged=pairs - len(table),
    )


def _tables(parts: list[Part]) -> tuple[pa.Table, pa.Table]:
    """The pairs, those met again merged, and the prompts."""
    with ThreadPoolExecutor(1) as pool:  # most of either half leaves the interpreter alone
        search = pool.submit(_first_of, _side_by_side([part.images for part in parts]))
        columns = _joined(parts)
        prompts = _prompts(columns, parts)
        first = search.result()
    columns["repeat"] = pc.or_(columns["repeat"], pa.array(first != np.arange(len(first))))
    merged = _merge(columns, _same_pairs(parts, first), parts)
    columns["label"] = columns["label"].cast(pa.float32())
    scores = [(name, columns[name].type) for name in columns if name not in PAIRS.names]
    schema = pa.schema([*PAIRS, *scores])
    table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    return _without(table, merged), prompts


def _joined(parts: list[Part]) -> dict[str, pa.ChunkedArray]:
    """All parts' columns one after the other; a score that a part lacks is null there."""
    types: dict[str, pa.DataType] = {}
    for part in parts:
        for name, values in part.columns.items():
            if types.setdefault(name, values.type) != values.type:
                kinds = f"{types[name]} in an earlier file, {values.type} here"
                raise FifaError(f"column {name!r} is {kinds}", where=part.file)
    columns = {}
    for name, kind in types.items():
        found = [part.columns.get(name, pa.nulls(part.pairs.shape[1], kind)) for part in parts]
        pieces = [
            column.chunks if isinstance(column, pa.ChunkedArray) else [column] for column in found
        ]
        columns[name] = pa.chunked_array([piece for some in pieces for piece in some], kind)
    columns["file"] = columns["file"].unify_dictionaries()
    return columns


def _prompts(columns: dict[str, pa.ChunkedArray], parts: list[Part]) -> pa.Table:
    """Number the prompts in order of first appearance (``prompt_index``, ``prompt_id``).

    Returns `PROMPTS`, a row a prompt, with its first spelling.
    """
    hashes = _side_by_side([part.prompts for part in parts])
    first = _first_of(hashes)
    new = first == np.arange(len(first))
    ids = hex_strings(hashes[:, new])
    number = (np.cumsum(new, dtype=np.int32) - 1)[first]  # of every part's every spelling
    ends = np.cumsum([part.prompts.shape[1] for part in parts])
    index = [
        pa.array(own.take(part.columns["prompt"].indices.to_numpy()))
        for part, own in zip(parts, np.split(number, ends[:-1]), strict=True)
    ]
    named = [pa.DictionaryArray.from_arrays(own, ids, safe=False) for own in index]
    columns["prompt_index"] = pa.chunked_array(index)
    columns["prompt_id"] = pa.chunked_array(named)
    words = pa.chunked_array([part.columns["prompt"].dictionary for part in parts])
    return pa.table([ids, words.filter(pa.array(new))], schema=PROMPTS)


def _side_by_side(hashes: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(hashes, axis=1)


def _first_of(hashes: np.ndarray) -> np.ndarray:
    """For each of n hashes (uint64 [2, n]) the first one with the same 80 bits: int64 [n]."""
    key, tail = hashes
    first = np.arange(len(key))
    ordered = np.sort(key)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return first
    likely = np.zeros(1 << 16, bool)
    likely[twice & LAST_BITS] = True
    rows = np.flatnonzero(likely[key & LAST_BITS])
    rows = rows[np.isin(key[rows], twice)]
    some, ends = key[rows], tail[rows] & LAST_BITS
    order = np.lexsort((ends, some))  # stable: equal rows stay in their order
    rows, some, ends = rows[order], some[order], ends[order]
    new = np.ones(len(rows), bool)
    new[1:] = (some[1:] != some[:-1]) | (ends[1:] != ends[:-1])
    first[rows] = rows[new][np.cumsum(new) - 1]
    return first


def _same_pairs(parts: list[Part], first_images: np.ndarray) -> np.ndarray:
    """For every row the first row with the same pair: int64 [n].

    The same pair has the same images, so only rows that share them are looked at.
    """
    first = np.arange(len(first_images))
    shared = np.zeros(len(first), bool)
    shared[first_images[first_images != first]] = True
    shared = shared[first_images]
    ends = np.cumsum([part.pairs.shape[1] for part in parts])
    some = zip(parts, np.split(shared, ends[:-1]), strict=True)
    hashes = _side_by_side([part.pairs[:, own] for part, own in some])
    rows = np.flatnonzero(shared)
    first[rows] = rows[_first_of(hashes)]
    return first


def _merge(columns: dict[str, pa.ChunkedArray], first: np.ndarray, parts: list[Part]) -> np.ndarray:
    """Average the labels of repeated pairs into their first row; returns the other rows.

    label = sum(votes * label) / sum(votes), with 1 - label where a repeat has the sides
    the other way round.
    """
    later = np.flatnonzero(first != np.arange(len(first)))
    if not len(later):
        return later
    rows = np.concatenate([np.unique(first[later]), later])
    ahead = first[rows]
    high = np.concatenate([part.high for part in parts])
    label, votes = columns["label"].to_numpy().copy(), columns["votes"].to_numpy().copy()
    share = np.where(high[rows] != high[ahead], 1.0 - label[rows], label[rows]) * votes[rows]
    heads, of_row = np.unique(ahead, return_inverse=True)
    weight = np.bincount(of_row, weights=votes[rows])
    label[heads] = np.bincount(of_row, weights=share) / weight
    votes[heads] = weight
    columns["label"] = pa.chunked_array([pa.array(label)])
    columns["votes"] = pa.chunked_array([pa.array(votes)])
    return later


def _without(table: pa.Table, gone: np.ndarray) -> pa.Table:
    """The other rows: as slices of what is there, unless that makes too many pieces."""
    if len(gone) > MAX_PIECES:
        stays = np.ones(len(table), bool)
        stays[gone] = False
        return table.filter(pa.array(stays))
    bounds = zip([0, *(gone + 1)], [*gone, len(table)], strict=True)
    return pa.concat_tables([table.slice(start, stop - start) for start, stop in bounds])
