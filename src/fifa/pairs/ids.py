"""Names of prompts and pairs: content hashes that no path, order or side gets into."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from fifa.pairs.frames import Text

HEX = 20  # characters of an id: 80 bits, so a million pairs collide once in 10^12 data sets
SEPARATOR = b"\xff"  # in no UTF-8 text
NEAR = 4_096  # rows hashed together: their bytes stay in the processor's cache
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / the golden ratio, odd


def fold_prompt(prompt: str) -> str:
    """A prompt after NFKC, white-space and case folding: what two equal prompts share."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def prompt_ids(prompts: Iterable[str]) -> list[str]:
    """20 hex characters of XXH3-128 over each folded prompt."""
    folded = [
        # for ASCII the same, sooner
        " ".join(prompt.lower().split()) if prompt.isascii() else fold_prompt(prompt)
        for prompt in prompts
    ]
    return [xxhash.xxh3_128_hexdigest(prompt.encode())[:HEX] for prompt in folded]


def prompt_id(prompt: str) -> str:
    """The id of one prompt."""
    return prompt_ids([prompt])[0]


def pair_digests(prompt_ids: pa.Array, low: Text, high: Text) -> tuple[np.ndarray, np.ndarray]:
    """XXH3-128 of every pair, and a sketch of its two images.

    Parameters
    ----------
    prompt_ids
        Strings [n] of `HEX` characters.
    low, high
        Strings [n], the pair's two image keys in the order of their bytes.

    Returns
    -------
    digests
        uint8 [n, 16], XXH3-128 of prompt_id, 0xff, low, 0xff, high; the first 20 hex characters
        are the pair's id.
    sketches
        uint64 [n], the same for the same two images; different ones may share it.
    """
    joined = pc.binary_join_element_wise(
        *(column.cast(pa.binary()) for column in (prompt_ids, low, high)), SEPARATOR
    )
    if isinstance(joined, pa.ChunkedArray):
        joined = joined.combine_chunks()
    if not len(joined):
        return np.empty((0, 16), np.uint8), np.empty(0, np.uint64)
    data = np.frombuffer(joined.buffers()[2], np.uint8)
    ends = np.frombuffer(joined.buffers()[1], np.int32)[: len(joined) + 1]
    length = int(ends[1] - ends[0])
    if (np.diff(ends) == length).all():  # ids of one length: the same rows, sooner
        same = data[: ends[-1]].view(f"V{length}")
        pieces = (same[at : at + NEAR].tolist() for at in range(0, len(same), NEAR))
    else:
        raw = data.tobytes()
        cuts = list(pairwise(ends.tolist()))
        pieces = (
            [raw[start:end] for start, end in cuts[at : at + NEAR]]
            for at in range(0, len(cuts), NEAR)
        )
    digests = b"".join([b"".join(map(xxhash.xxh3_128_digest, rows)) for rows in pieces])
    return np.frombuffer(digests, np.uint8).reshape(-1, 16), _sketches(
        data, ends, np.asarray(pc.binary_length(low))
    )


def _sketches(data: np.ndarray, ends: np.ndarray, low: np.ndarray) -> np.ndarray:
    """A number for the two images of each row, from 8 bytes near the end of either key.

    It is there to say cheaply that a million pairs have no two images in common: names of files
    differ just before their ending, and ids differ everywhere. ``low`` is the lower key's length.
    """
    starts = ends[:-1].astype(np.int64) + HEX + len(SEPARATOR)
    middle = starts + low
    sketch = (ends[1:] - starts).astype(np.uint64)
    for start, end in ((starts, middle), (middle + len(SEPARATOR), ends[1:])):
        at = np.maximum(end - 12, start)
        room = end - at
        short = room.min() < 8
        if short:
            data = np.concatenate([data, np.zeros(8, np.uint8)])
        word = np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))[at]
        if short:  # what follows a short key is not its own
            own = word << (8 * (8 - np.clip(room, 1, 8))).astype(np.uint64)
            word = np.where(room > 0, own, np.uint64(0))
        sketch = (sketch ^ word) * MIX
        sketch ^= sketch >> np.uint64(29)
    return sketch


def hex_strings(digests: np.ndarray) -> pa.Array:
    """The first `HEX` hex characters of digests (uint8 [n, 16]) as strings [n]."""
    text = digests[:, : HEX // 2].tobytes().hex().encode()
    ends = np.arange(len(digests) + 1, dtype=np.int32) * HEX
    return pa.StringArray.from_buffers(len(digests), pa.py_buffer(ends), pa.py_buffer(text))
