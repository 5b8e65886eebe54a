"""From batches to the table of pairs: bad rows out, ids, sides, repeats merged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa.pairs.batch import Batch
from fifa.pairs.frames import Text, encoded
from fifa.pairs.ids import hex_strings, pair_digests, prompt_ids
from fifa.pairs.table import PAIRS, PROMPTS, REJECTED

MAX_PROMPT = 100_000  # bytes of UTF-8; text encoders read a few hundred
MAX_KEY = 4_096  # bytes of a path or URL
MAX_PIECES = 2_000  # of a column
LAST_BITS = np.uint64(0xFFFF)


@dataclass
class _Prompts:
    """Every spelling of every prompt met so far, in order of first appearance."""

    spellings: dict[str, int] = field(default_factory=dict)  # to the spelling's number
    names: list[str] = field(default_factory=list)  # a prompt_id a spelling
    index: list[int] = field(default_factory=list)  # a prompt a spelling
    known: dict[str, int] = field(default_factory=dict)  # prompt_id to the prompt's number

    def codes(self, spellings: list[str]) -> list[int]:
        """The numbers of some spellings (each of them once), known or new."""
        new = [spelling for spelling in spellings if spelling not in self.spellings]
        self.spellings.update(zip(new, count(len(self.index)), strict=False))
        names, known = prompt_ids(new), self.known
        self.index += [known.setdefault(name, len(known)) for name in names]
        self.names += names
        return [self.spellings[spelling] for spelling in spellings]

    def table(self) -> pa.Table:
        """A row a prompt, with its first spelling."""
        first = np.unique(np.asarray(self.index, np.int64), return_index=True)[1]
        spelled = pa.array(list(self.spellings), pa.string()).take(pa.array(first, pa.int64()))
        return pa.table([pa.array(list(self.known), pa.string()), spelled], schema=PROMPTS)


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


def assemble(batches: Iterable[Batch]) -> Assembled:
    """Join batches, each `clean`, into one table of pairs.

    A pair met again (the same prompt and images, on whichever sides) adds its votes to the first
    one's label and goes; everything else is the first one's.
    """
    prompts = _Prompts()
    parts: list[dict[str, Text]] = []
    digests, sketches = [np.empty((0, 16), np.uint8)], [np.empty(0, np.uint64)]
    rejected: list[tuple[str, int | None, str]] = []
    cells: tuple[str, str] | None = None
    for batch in batches:
        rejected += [(batch.file, row, reason) for row, reason in batch.rejected]
        cells = cells or batch.cells
        if len(batch):
            part, digest, sketch = _part(batch, prompts)
            parts.append(part)
            digests.append(digest)
            sketches.append(sketch)
    digest, sketch = np.concatenate(digests), np.concatenate(sketches)
    columns = _joined(parts, prompts)
    kept = len(digest)
    first = _first_of(digest[:, :8].copy().view(np.uint64).ravel(), digest[:, 8:10])
    if first is not None:
        _merge(columns, first)
        stays = first == np.arange(kept)
        columns = {name: _without(column, stays) for name, column in columns.items()}
        sketch = sketch[stays]
    columns["repeat"] = _repeats(columns, sketch)
    scores = tuple(name for name in columns if name not in PAIRS.names)
    columns["label"] = columns["label"].cast(pa.float32())
    schema = pa.schema([*PAIRS, *((name, columns[name].type) for name in scores)])
    table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    rejected.sort(key=lambda row: (row[0], -1 if row[1] is None else row[1]))
    by_column = [list(column) for column in zip(*rejected, strict=True)] or [[], [], []]
    return Assembled(
        table=table,
        prompts=prompts.table(),
        rejected=pa.table(by_column, schema=REJECTED),
        scores=scores,
        cells=cells,
        rows=kept + len(rejected),
        merged=kept - len(table),
    )


def clean(batch: Batch) -> Batch:
    """Move the rows that are no pairs to ``batch.rejected``, and order every pair's keys.

    What needs no knowledge of other files is done here, where files are read side by side.
    """
    label = batch.label
    bad = np.flatnonzero(~((label >= 0.0) & (label <= 1.0)))  # NaN is neither
    reasons = dict.fromkeys(bad.tolist(), "the label is no number between 0 and 1")
    for side, key in enumerate(batch.keys):
        length = np.asarray(pc.fill_null(pc.binary_length(key), 0))
        missing = np.flatnonzero(length == 0).tolist()
        reasons |= dict.fromkeys(missing, f"image {side} is missing")
        long = np.flatnonzero(length > MAX_KEY).tolist()
        reasons |= dict.fromkeys(long, f"the name of image {side} is over {MAX_KEY:,} bytes")
    reasons |= batch.wrong
    batch.prompt = encoded(batch.prompt)
    reasons |= _prompt_faults(batch.prompt)
    if reasons:
        rows = batch.row
        stays = np.ones(len(batch), bool)
        stays[list(reasons)] = False
        _take(batch, stays)
        batch.rejected += [(int(rows[i]), reason) for i, reason in reasons.items()]
    keys = batch.keys
    in_order = pc.less_equal(*keys)
    low, high = pc.if_else(in_order, *keys), pc.if_else(in_order, keys[1], keys[0])
    batch.order = (in_order, low, high)
    return batch


def _prompt_faults(prompt: pa.DictionaryArray) -> dict[int, str]:
    """The rows without a prompt, or with one that is too long."""
    words = prompt.dictionary
    size = np.asarray(pc.fill_null(pc.binary_length(words), 0))
    blank = np.asarray(pc.fill_null(pc.utf8_is_space(words), False)).astype(bool) | (size == 0)
    faulty = np.append(blank | (size > MAX_PROMPT), True)  # the last one is for null
    codes = np.asarray(pc.fill_null(prompt.indices, len(words)))
    if not prompt.null_count and not faulty[:-1].any():
        return {}
    reasons = [
        "no prompt" if none else f"the prompt has {n:,} bytes, more than {MAX_PROMPT:,}"
        for none, n in zip(blank.tolist(), size.tolist(), strict=True)
    ]
    reasons.append("no prompt")
    return {row: reasons[codes[row]] for row in np.flatnonzero(faulty[codes]).tolist()}


def _take(batch: Batch, stays: np.ndarray) -> None:
    mask = pa.array(stays)
    batch.row, batch.label, batch.votes = batch.row[stays], batch.label[stays], batch.votes[stays]
    batch.prompt = batch.prompt.filter(mask)
    batch.keys = (batch.keys[0].filter(mask), batch.keys[1].filter(mask))
    batch.refs = (batch.refs[0].filter(mask), batch.refs[1].filter(mask))
    batch.scores = {name: values[stays] for name, values in batch.scores.items()}
    batch.extras = {name: values.filter(mask) for name, values in batch.extras.items()}


def _part(batch: Batch, prompts: _Prompts) -> tuple[dict[str, Text], np.ndarray, np.ndarray]:
    """A batch's columns, the digests of its pairs and the sketches of their images."""
    codes, ids = _spellings(batch.prompt, prompts)
    keys, refs, label = batch.keys, batch.refs, batch.label
    scores = {name: pa.array(values) for name, values in batch.scores.items()} | batch.extras
    assert batch.order is not None, "clean() comes first"
    in_order, low, high = batch.order
    digest, sketch = pair_digests(ids, low, high)
    swapped = np.zeros(len(batch), bool)
    if batch.winner_first:
        # image_0 is the key that sorts first, or by a bit of the pair's digest the other one:
        # the sides depend on the keys alone, never on who won or where the row stands
        swapped = np.asarray(in_order) == (digest[:, 15] & 1).astype(bool)
        turn = pa.array(swapped)
        keys = _turned(turn, keys)
        refs = _turned(turn, refs)
        label = np.where(swapped, 1.0 - label, label)
        for names in batch.swaps:
            both = _turned(turn, (scores[names[0]], scores[names[1]]))
            scores |= dict(zip(names, both, strict=True))
    file = pa.array(np.zeros(len(batch), np.int32))
    columns = {
        "code": pa.array(codes),
        "pair_id": hex_strings(digest),
        "image_0": keys[0],
        "image_1": keys[1],
        "image_0_ref": refs[0],
        "image_1_ref": refs[1],
        "file": pa.DictionaryArray.from_arrays(file, [batch.file], safe=False),
        "row": pa.array(batch.row),
        "swapped": pa.array(swapped),
        "label": pa.array(label),
        "votes": pa.array(batch.votes),
    }
    taken = {name: f"source_{name}" if name in PAIRS.names else name for name in scores}
    return columns | {taken[name]: values for name, values in scores.items()}, digest, sketch


def _turned(turn: pa.Array, pair: tuple[Text, Text]) -> tuple[Text, Text]:
    return pc.if_else(turn, pair[1], pair[0]), pc.if_else(turn, pair[0], pair[1])


def _spellings(prompt: pa.DictionaryArray, prompts: _Prompts) -> tuple[np.ndarray, pa.Array]:
    """Every row's spelling (int32 [n]) and prompt_id (strings [n])."""
    local = prompt.indices.to_numpy()
    # where each entry first appears: of several writes to one place the last one stays
    place = np.full(len(prompt.dictionary), -1)
    place[local[::-1]] = np.arange(len(local))[::-1]
    used = np.flatnonzero(place >= 0)
    used = used[np.argsort(place[used])]
    words = prompt.dictionary.take(pa.array(used)).to_pylist()
    codes = np.empty(len(place), np.int32)
    codes[used] = prompts.codes(words)
    order = np.empty(len(place), np.int32)
    order[used] = np.arange(len(used))
    ids = pa.array([prompts.names[code] for code in codes[used].tolist()], pa.string())
    return codes[local], ids.take(pa.array(order[local]))


def _joined(parts: list[dict[str, Text]], prompts: _Prompts) -> dict[str, pa.ChunkedArray]:
    """All parts' columns one after the other; a score that a part lacks is null there."""
    types = {name: values.type for part in parts for name, values in part.items()}
    columns = {}
    for name, kind in types.items():
        found = [part.get(name, pa.nulls(len(part["code"]), kind)) for part in parts]
        pieces = [
            column.chunks if isinstance(column, pa.ChunkedArray) else [column] for column in found
        ]
        columns[name] = pa.chunked_array([piece for some in pieces for piece in some], kind)
    if not parts:
        return {field.name: pa.chunked_array([], field.type) for field in PAIRS}
    columns["file"] = columns["file"].unify_dictionaries()
    words, ids = (
        pa.array(list(prompts.spellings), pa.string()),
        pa.array(list(prompts.known), pa.string()),
    )
    index = np.asarray(prompts.index, np.int32)
    chunks = [pa.array(index[part["code"].to_numpy()]) for part in parts]
    columns["prompt_index"] = pa.chunked_array(chunks)
    columns["prompt_id"] = pa.chunked_array(
        [pa.DictionaryArray.from_arrays(chunk, ids, safe=False) for chunk in chunks]
    )
    columns["prompt"] = pa.chunked_array(
        [pa.DictionaryArray.from_arrays(part["code"], words, safe=False) for part in parts]
    )
    del columns["code"]
    return columns


def _first_of(key: np.ndarray, tail: np.ndarray | None = None) -> np.ndarray | None:
    """For every row the first row with the same key (and tail); None if no two are the same.

    ``key`` is uint64 [n], ``tail`` uint8 [n, 2].
    """
    ordered = np.sort(key)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return None
    likely = np.zeros(1 << 16, bool)
    likely[twice & LAST_BITS] = True
    rows = np.flatnonzero(likely[key & LAST_BITS])
    rows = rows[np.isin(key[rows], twice)]
    ends = np.zeros(len(rows), np.uint16) if tail is None else tail[rows].copy().view(np.uint16)
    ends = ends.ravel()
    order = np.lexsort((ends, key[rows]))  # stable: equal rows stay in their order
    rows, ends = rows[order], ends[order]
    new = np.ones(len(rows), bool)
    new[1:] = (key[rows][1:] != key[rows][:-1]) | (ends[1:] != ends[:-1])
    first = np.arange(len(key))
    first[rows] = rows[new][np.cumsum(new) - 1]
    return first


def _merge(columns: dict[str, pa.ChunkedArray], first: np.ndarray) -> None:
    """Average the labels of repeated pairs into their first row.

    label = sum(votes * label) / sum(votes), with 1 - label where a repeat has the sides
    the other way round.
    """
    later = np.flatnonzero(first != np.arange(len(first)))
    rows = np.concatenate([np.unique(first[later]), later])
    ahead = first[rows]
    keys = columns["image_0"]
    turned = np.asarray(pc.not_equal(keys.take(rows), keys.take(ahead)))
    label, votes = columns["label"].to_numpy().copy(), columns["votes"].to_numpy().copy()
    share = np.where(turned, 1.0 - label[rows], label[rows]) * votes[rows]
    heads, of_row = np.unique(ahead, return_inverse=True)
    weight = np.bincount(of_row, weights=votes[rows])
    label[heads] = np.bincount(of_row, weights=share) / weight
    votes[heads] = weight
    columns["label"] = pa.chunked_array([pa.array(label)])
    columns["votes"] = pa.chunked_array([pa.array(votes)])


def _repeats(columns: dict[str, pa.ChunkedArray], sketch: np.ndarray) -> pa.Array:
    """True for an image beside itself, and for two images that an earlier pair compares."""
    zero, one = columns["image_0"], columns["image_1"]
    repeat = np.array(pc.equal(zero, one), bool)
    first = _first_of(sketch)
    if first is None:
        return pa.array(repeat)
    alike = np.zeros(len(sketch), bool)
    alike[first[first != np.arange(len(first))]] = True
    rows = np.flatnonzero(alike[first])
    seen: set[tuple[str, ...]] = set()
    for row, *keys in zip(
        rows, zero.take(rows).to_pylist(), one.take(rows).to_pylist(), strict=True
    ):
        both = tuple(sorted(keys))
        repeat[row] |= both in seen
        seen.add(both)
    return pa.array(repeat)


def _without(column: pa.ChunkedArray, stays: np.ndarray) -> pa.ChunkedArray:
    """The rows that stay: as slices of what is there, unless that makes too many pieces."""
    gone = np.flatnonzero(~stays)
    if len(gone) > MAX_PIECES:
        return column.filter(pa.array(stays))
    bounds = zip([0, *(gone + 1)], [*gone, len(stays)], strict=True)
    pieces = [c for start, stop in bounds for c in column.slice(start, stop - start).chunks]
    return pa.chunked_array([piece for piece in pieces if len(piece)], column.type)
