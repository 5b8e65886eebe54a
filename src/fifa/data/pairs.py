"""One file's pairs: what every format is turned into, bad rows out, ids, sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa.data.columns import Text, encoded
from fifa.data.ids import hex_strings, murmur3, pair_hashes, prompt_hashes
from fifa.data.names import exchanged, label_columns
from fifa.data.table import PAIRS

MAX_PROMPT = 100_000  # bytes of UTF-8; text encoders read a few hundred
MAX_KEY = 4_096  # bytes of a path or URL
NO_TEXT = "no prompt, or no valid text"
Rejected = list[tuple[int | None, str]]  # a row and why it is no pair; row None is the whole file


@dataclass
class FilePairs:
    """One file's pairs: n rows. Formats fill it in, `finish` does the rest.

    Parameters
    ----------
    file
        The source file, relative to the root.
    columns
        Those of `PAIRS` that need no other file, [n] each. From a format: ``row``, ``prompt``
        (maybe dictionary-encoded; null where there is no text), the images' keys ``image_0`` and
        ``image_1`` (null where an image is missing), ``image_0_ref`` and ``image_1_ref`` (path,
        URL or tar member; null for a cell of the row), ``label`` (float64, the probability that a
        person prefers image 0; NaN where there is none) and ``votes`` (int32). Then those of
        `fifa.data.names`, where the source has them.
    scores
        Columns to keep beside them, [n] each; `finish` puts them among ``columns``.
    wrong
        Rows (positions in the columns) that are to be rejected, and why.
    swaps
        Columns of ``scores`` that change places when the sides do.
    winner_first
        The source's order gives the winner away: sides are assigned by the images' keys.
    cells
        The columns with image bytes; None without.
    rejected
        Rows that are no pairs.
    used, names
        The columns that pairs and labels come from, each with what it is; all of the file's.
    not_made
        Pairs of a ranking's images that are not made, by reason.
    members
        Rows that are one image of a ranking each (`fifa.data.rankings.join`): the ranking's hash,
        row, rank, prompt, key and reference, how many ratings the rank is the mean of and their
        squared deviations, then ratings.
    gap
        Of ``members`` the least difference of two ranks that makes a pair, unless the user names
        another one.
    prompts, pairs, images, high
        By `finish`: `fifa.data.ids.prompt_hashes` of the prompt column's dictionary, which is in
        order of first appearance, uint64 [2, m]; `fifa.data.ids.pair_hashes`, uint64 [2, n]; the
        sum of the two images' hashes, uint64 [2, n]; whether image_0 is the one with the higher
        hash, bool [n].
    """

    file: str
    columns: dict[str, Text] = field(default_factory=dict)
    scores: dict[str, Text] = field(default_factory=dict)
    wrong: dict[int, str] = field(default_factory=dict)
    swaps: list[tuple[str, str]] = field(default_factory=list)
    winner_first: bool = False
    cells: tuple[str, str] | None = None
    rejected: Rejected = field(default_factory=list)
    used: dict[str, str] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    not_made: Counter[str] = field(default_factory=Counter)
    members: pa.Table | None = None
    gap: float | None = None
    prompts: np.ndarray = field(default_factory=lambda: np.empty((2, 0), np.uint64))
    pairs: np.ndarray = field(default_factory=lambda: np.empty((2, 0), np.uint64))
    images: np.ndarray = field(default_factory=lambda: np.empty((2, 0), np.uint64))
    high: np.ndarray = field(default_factory=lambda: np.empty(0, bool))

    def __len__(self) -> int:
        return len(self.columns["row"]) if self.columns else 0


def pair_columns(
    row: np.ndarray | Sequence[int],
    prompt: Text,
    keys: Sequence[Text],
    refs: Sequence[Text],
    label: np.ndarray | Sequence[float],
    votes: np.ndarray | Sequence[int] | None = None,
) -> dict[str, Text]:
    """`FilePairs.columns`; keys and references a side; None is a vote a pair."""
    return {
        "row": pa.array(row, pa.int64()),
        "prompt": prompt,
        "image_0": keys[0],
        "image_1": keys[1],
        "image_0_ref": refs[0],
        "image_1_ref": refs[1],
        "label": pa.array(label, pa.float64()),
        "votes": pa.array(np.ones(len(row), np.int32) if votes is None else votes, pa.int32()),
    }


def finish(own: FilePairs) -> FilePairs:
    """Everything about a file's pairs that needs no other file; files may be done side by side."""
    if len(own):
        _clean(own)
    if not len(own):
        own.columns = {}
        return own
    columns, scores = own.columns, own.scores
    prompt = columns["prompt"]
    own.prompts = prompt_hashes(prompt.dictionary)
    codes = prompt.indices.to_numpy()
    for name, values in scores.items():
        if pa.types.is_list(values.type):
            scores[name] = _once(values, codes)
    hashes = [murmur3(columns[f"image_{side}"]) for side in (0, 1)]
    own.images = hashes[0] + hashes[1]
    own.pairs = pair_hashes(own.prompts, prompt.indices.to_numpy(), own.images)
    own.high = hashes[0][0] > hashes[1][0]
    swapped = np.zeros(len(own), bool)
    if own.winner_first:
        # image_0 is the key with the lower hash, or by a bit of the pair's hash the other one:
        # the sides depend on the keys alone, never on who won or where the row stands
        swapped = own.high ^ (own.pairs[1] >> np.uint64(63)).astype(bool)
        own.high = own.high ^ swapped
        turn, label = pa.array(swapped), columns["label"].to_numpy()
        columns["label"] = pa.array(np.where(swapped, 1.0 - label, label))
        for name in label_columns(columns):
            label = columns[name].to_numpy(zero_copy_only=False)
            columns[name] = pa.array(np.where(swapped, 1.0 - label, label))
        if "model_0" in columns and "model_1" in columns:
            models = exchanged((columns["model_0"], columns["model_1"]), swapped)
            columns["model_0"], columns["model_1"] = models
        sides = [(columns, "image_0", "image_1"), (columns, "image_0_ref", "image_1_ref")]
        for table, *names in [*sides, *((scores, *names) for names in own.swaps)]:
            zero, one = (table[name] for name in names)
            table[names[0]] = pc.if_else(turn, one, zero)
            table[names[1]] = pc.if_else(turn, zero, one)
    file = pa.array(np.zeros(len(own), np.int32))
    columns |= {
        "pair_id": hex_strings(own.pairs),
        "file": pa.DictionaryArray.from_arrays(file, [own.file], safe=False),
        "swapped": pa.array(swapped),
        "repeat": pa.array((hashes[0] == hashes[1]).all(axis=0)),  # one image twice
    }
    for name in label_columns(columns):
        columns[name] = pc.cast(columns[name], pa.float32())
    taken = {*PAIRS.names, *columns}
    columns |= {f"source_{name}" if name in taken else name: scores[name] for name in scores}
    own.scores = {}  # what becomes of the columns is nobody's to hold
    return own


def _clean(own: FilePairs) -> None:
    """Move the rows that are no pairs to ``rejected``, and their prompts with them."""
    columns = own.columns
    label = columns["label"].to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(~((label >= 0.0) & (label <= 1.0)))  # NaN is neither
    reasons = dict.fromkeys(bad.tolist(), "the label is no number between 0 and 1")
    for side in (0, 1):
        length = np.asarray(pc.fill_null(pc.binary_length(columns[f"image_{side}"]), 0))
        missing = np.flatnonzero(length == 0).tolist()
        reasons |= dict.fromkeys(missing, f"image {side} is missing")
        long = np.flatnonzero(length > MAX_KEY).tolist()
        reasons |= dict.fromkeys(long, f"the name of image {side} is over {MAX_KEY:,} bytes")
    reasons |= own.wrong
    columns["prompt"] = encoded(columns["prompt"])
    for i, reason in _prompt_faults(columns["prompt"]).items():
        if reason != NO_TEXT or i not in own.wrong:  # a format may know more
            reasons[i] = reason
    if reasons:
        stays = np.ones(len(own), bool)
        stays[list(reasons)] = False
        rows = columns["row"].to_numpy()
        own.rejected += [(int(rows[i]), reason) for i, reason in reasons.items()]
        for table in (columns, own.scores):
            table |= {name: column.filter(pa.array(stays)) for name, column in table.items()}
    columns["prompt"] = _in_order(columns["prompt"])


def _prompt_faults(prompt: pa.DictionaryArray) -> dict[int, str]:
    """The rows without a prompt, or with one that is too long."""
    texts = prompt.dictionary
    size = np.asarray(pc.fill_null(pc.binary_length(texts), 0))
    blank = np.asarray(pc.fill_null(pc.utf8_is_space(texts), False)).astype(bool) | (size == 0)
    faulty = np.append(blank | (size > MAX_PROMPT), True)  # the last one is for null
    codes = np.asarray(pc.fill_null(prompt.indices, len(texts)))
    if not prompt.null_count and not faulty[:-1].any():
        return {}
    reasons = [
        "no prompt" if none else f"the prompt has {n:,} bytes, more than {MAX_PROMPT:,}"
        for none, n in zip(blank.tolist(), size.tolist(), strict=True)
    ]
    reasons.append(NO_TEXT)
    for code in np.flatnonzero(np.asarray(texts.is_null())).tolist():
        reasons[code] = NO_TEXT
    return {row: reasons[codes[row]] for row in np.flatnonzero(faulty[codes]).tolist()}


def _once(lists: Text, codes: np.ndarray) -> pa.Array:
    """The lists, null in all rows of a prompt but its first: it is described by one of them."""
    _, first = np.unique(codes, return_index=True)
    one = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    place, others = np.zeros(len(one), np.int64), np.ones(len(one), bool)
    place[first], others[first] = np.arange(len(first)), False
    return one.take(pa.array(first)).take(pa.array(place, mask=others))


def _in_order(prompt: pa.DictionaryArray) -> pa.DictionaryArray:
    """The same with a dictionary of what is used, in order of first appearance."""
    codes, texts = prompt.indices.to_numpy(), prompt.dictionary
    place = np.full(len(texts), -1)
    # of several writes to one place the last one stays
    place[codes[::-1]] = np.arange(len(codes))[::-1]
    used = np.flatnonzero(place >= 0)
    used = used[np.argsort(place[used])]
    if np.array_equal(used, np.arange(len(texts))):
        return prompt
    number = np.empty(len(texts), np.int32)
    number[used] = np.arange(len(used))
    return pa.DictionaryArray.from_arrays(number[codes], texts.take(pa.array(used)))
