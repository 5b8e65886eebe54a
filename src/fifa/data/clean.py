"""One file's share of the table of pairs: bad rows out, ids, sides."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa.data.batch import Batch
from fifa.data.columns import Text, encoded
from fifa.data.ids import hex_strings, pair_hashes, prompt_hashes
from fifa.data.murmur import murmur3
from fifa.data.table import PAIRS

MAX_PROMPT = 100_000  # bytes of UTF-8; text encoders read a few hundred
MAX_KEY = 4_096  # bytes of a path or URL
NO_TEXT = "no prompt, or no valid text"


@dataclass(frozen=True)
class Part:
    """What one file adds: n pairs.

    Parameters
    ----------
    file
        The source file, relative to the root.
    rejected
        Rows that are no pairs, and why; row None is the whole file.
    columns
        The columns of `PAIRS` that need no other file, and the scores.
    prompts
        `fifa.data.ids.prompt_hashes` of the prompt column's dictionary, which is in order of
        first appearance: uint64 [2, m].
    pairs
        `fifa.data.ids.pair_hashes`, uint64 [2, n].
    images
        The same for the two images alone: the sum of their hashes, uint64 [2, n].
    high
        Whether image_0 is the one with the higher hash, bool [n].
    cells
        The columns with image bytes; None without.
    """

    file: str
    rejected: list[tuple[int | None, str]] = field(default_factory=list)
    columns: dict[str, Text] = field(default_factory=dict)
    prompts: np.ndarray = field(default_factory=lambda: np.empty((2, 0), np.uint64))
    pairs: np.ndarray = field(default_factory=lambda: np.empty((2, 0), np.uint64))
    images: np.ndarray = field(default_factory=lambda: np.empty((2, 0), np.uint64))
    high: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    cells: tuple[str, str] | None = None


def make_part(batch: Batch) -> Part:
    """Everything about a file's pairs that needs no other file; files may be made side by side."""
    _clean(batch)
    if not len(batch):
        return Part(batch.file, batch.rejected, cells=batch.cells)
    prompt = batch.prompt
    words = prompt_hashes(prompt.dictionary)
    hashes = [murmur3(key) for key in batch.keys]
    images = hashes[0] + hashes[1]
    pairs = pair_hashes(words, prompt.indices.to_numpy(), images)
    keys, refs, label = batch.keys, batch.refs, batch.label
    scores = {name: pa.array(values) for name, values in batch.scores.items()} | batch.extras
    high = hashes[0][0] > hashes[1][0]
    swapped = np.zeros(len(batch), bool)
    if batch.winner_first:
        # image_0 is the key with the lower hash, or by a bit of the pair's hash the other one:
        # the sides depend on the keys alone, never on who won or where the row stands
        swapped = high ^ (pairs[1] >> np.uint64(63)).astype(bool)
        turn = pa.array(swapped)
        keys, refs = _turned(turn, keys), _turned(turn, refs)
        label = np.where(swapped, 1.0 - label, label)
        for names in batch.swaps:
            both = _turned(turn, (scores[names[0]], scores[names[1]]))
            scores |= dict(zip(names, both, strict=True))
    file = pa.array(np.zeros(len(batch), np.int32))
    columns = {
        "pair_id": hex_strings(pairs),
        "prompt": prompt,
        "image_0": keys[0],
        "image_1": keys[1],
        "image_0_ref": refs[0],
        "image_1_ref": refs[1],
        "file": pa.DictionaryArray.from_arrays(file, [batch.file], safe=False),
        "row": pa.array(batch.row),
        "swapped": pa.array(swapped),
        "label": pa.array(label),
        "votes": pa.array(batch.votes),
        "repeat": pa.array((hashes[0] == hashes[1]).all(axis=0)),  # one image twice
    }
    taken = {name: f"source_{name}" if name in PAIRS.names else name for name in scores}
    columns |= {taken[name]: values for name, values in scores.items()}
    return Part(
        batch.file, batch.rejected, columns, words, pairs, images, high ^ swapped, batch.cells
    )


def _turned(turn: pa.Array, pair: tuple[Text, Text]) -> tuple[Text, Text]:
    return pc.if_else(turn, pair[1], pair[0]), pc.if_else(turn, pair[0], pair[1])


def _clean(batch: Batch) -> None:
    """Move the rows that are no pairs to ``batch.rejected``, and their prompts with them."""
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
    batch.prompt = _in_order(batch.prompt)


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
    reasons.append(NO_TEXT)
    for word in np.flatnonzero(np.asarray(words.is_null())).tolist():
        reasons[word] = NO_TEXT
    return {row: reasons[codes[row]] for row in np.flatnonzero(faulty[codes]).tolist()}


def _in_order(prompt: pa.DictionaryArray) -> pa.DictionaryArray:
    """The same with a dictionary of what is used, in order of first appearance."""
    codes, words = prompt.indices.to_numpy(), prompt.dictionary
    place = np.full(len(words), -1)
    # of several writes to one place the last one stays
    place[codes[::-1]] = np.arange(len(codes))[::-1]
    used = np.flatnonzero(place >= 0)
    used = used[np.argsort(place[used])]
    if np.array_equal(used, np.arange(len(words))):
        return prompt
    number = np.empty(len(words), np.int32)
    number[used] = np.arange(len(used))
    return pa.DictionaryArray.from_arrays(number[codes], words.take(pa.array(used)))


def _take(batch: Batch, stays: np.ndarray) -> None:
    mask = pa.array(stays)
    batch.row, batch.label, batch.votes = batch.row[stays], batch.label[stays], batch.votes[stays]
    batch.prompt = batch.prompt.filter(mask)
    batch.keys = (batch.keys[0].filter(mask), batch.keys[1].filter(mask))
    batch.refs = (batch.refs[0].filter(mask), batch.refs[1].filter(mask))
    batch.scores = {name: values[stays] for name, values in batch.scores.items()}
    batch.extras = {name: values.filter(mask) for name, values in batch.extras.items()}
