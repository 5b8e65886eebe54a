"""Names of prompts and pairs: content hashes that no path, order or side gets into."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

HEX = 20  # characters of an id: 80 bits, so a million pairs collide once in 10^12 data sets
SEPARATOR = b"\xff"  # in no UTF-8 text

_BYTE_HEX = np.frombuffer(b"".join(b"%02x" % byte for byte in range(256)), np.uint16)


def fold_prompt(prompt: str) -> str:
    """A prompt after NFKC, white-space and case folding: what two equal prompts share."""
    if prompt.isascii():  # the same, sooner
        return " ".join(prompt.split()).lower()
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def prompt_id(prompt: str) -> str:
    """20 hex characters of XXH3-128 over the folded prompt."""
    return xxhash.xxh3_128_hexdigest(fold_prompt(prompt).encode())[:HEX]


def pair_digests(
    prompt_ids: pa.Array, low: pa.Array, high: pa.Array
) -> tuple[np.ndarray, np.ndarray]:
    """XXH3-128 of every pair, and XXH3-64 of its two images.

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
    images
        uint64 [n], XXH3-64 of low, 0xff, high.
    """
    joined = pc.binary_join_element_wise(
        *(column.cast(pa.binary()) for column in (prompt_ids, low, high)), SEPARATOR
    )
    data = joined.buffers()[2].to_pybytes() if len(joined) else b""
    ends = _offsets(joined).tolist()
    rows = [data[start:end] for start, end in pairwise(ends)]
    digests = b"".join(map(xxhash.xxh3_128_digest, rows))
    skip = HEX + len(SEPARATOR)
    of_images: Iterable[int] = map(xxhash.xxh3_64_intdigest, [row[skip:] for row in rows])
    return (
        np.frombuffer(digests, np.uint8).reshape(-1, 16),
        np.fromiter(of_images, np.uint64, len(rows)),
    )


def hex_strings(digests: np.ndarray) -> pa.Array:
    """The first `HEX` hex characters of digests (uint8 [n, 16]) as strings [n]."""
    text = _BYTE_HEX[digests[:, : HEX // 2]]
    ends = np.arange(len(digests) + 1, dtype=np.int32) * HEX
    return pa.StringArray.from_buffers(
        len(digests), pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(text))
    )


def _offsets(array: pa.Array) -> np.ndarray:
    raw = array.buffers()[1]
    if raw is None:
        return np.zeros(1, np.int32)
    return np.frombuffer(raw, np.int32)[array.offset : array.offset + len(array) + 1]
