"""Names of prompts and pairs: content hashes that no path, order or side gets into."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from fifa.data.columns import Text
from fifa.data.murmur import murmur3

HEX = 20  # characters of an id: 80 bits, so a million pairs collide once in 10^12 data sets
# The four hex characters of every two bytes, as one number.
QUADS = np.frombuffer(np.arange(1 << 16, dtype="<u2").tobytes().hex().encode(), np.uint32)
# What folding changes beside the case: all but ASCII's printable characters, words further apart
# than a space, spaces at either end.
ODD = r"[^!-~ ]|^ |  | $"


def fold_prompt(prompt: str) -> str:
    """A prompt after NFKC, white-space and case folding: what two equal prompts share."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def prompt_hashes(prompts: pa.StringArray) -> np.ndarray:
    """XXH3-128 over each folded prompt: uint64 [2, n], little-endian words of the digest."""
    folded = pc.ascii_lower(prompts)
    odd = pc.match_substring_regex(prompts, ODD)
    by_hand = [fold_prompt(prompt) for prompt in prompts.filter(odd).to_pylist()]
    folded = pc.replace_with_mask(folded, odd, pa.array(by_hand, pa.string()))
    digests = map(xxhash.xxh3_128_digest, folded.cast(pa.binary()).to_pylist())
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2).T


def prompt_ids(prompts: Iterable[str]) -> list[str]:
    """20 hex characters of XXH3-128 over each folded prompt."""
    ids: list[str] = hex_strings(prompt_hashes(pa.array(prompts, pa.string()))).to_pylist()
    return ids


def prompt_id(prompt: str) -> str:
    """The id of one prompt."""
    return prompt_ids([prompt])[0]


def pair_hashes(prompts: np.ndarray, codes: np.ndarray, images: np.ndarray) -> np.ndarray:
    """128 bits of every pair, the same whichever image comes first.

    hash(pair) = hash(prompt) + hash(image_0) + hash(image_1), either word modulo 2^64. The three
    are good hashes already, so a sum spreads as well as they do, and it knows no order.

    Parameters
    ----------
    prompts
        `prompt_hashes` of m prompts, uint64 [2, m].
    codes
        Each pair's prompt, int32 [n].
    images
        The sum of `fifa.data.murmur.murmur3` of the pair's two keys: uint64 [2, n].

    Returns
    -------
    hashes
        uint64 [2, n].

    Source: the additive hash of Bellare and Micciancio, "A New Paradigm for Collision-Free
    Hashing" (Eurocrypt 1997), here against chance and not against an adversary.
    """
    hashes = images.copy()
    for word, own in zip(hashes, prompts, strict=True):
        word += own.take(codes)
    return hashes


def pair_ids(prompts: pa.StringArray, image_0: Text, image_1: Text) -> pa.StringArray:
    """The ids of n pairs of image keys, strings [n]: 20 hex characters of `pair_hashes`."""
    images = murmur3(image_0) + murmur3(image_1)
    return hex_strings(pair_hashes(prompt_hashes(prompts), np.arange(len(prompts)), images))


def hex_strings(hashes: np.ndarray) -> pa.StringArray:
    """The first `HEX` hex characters of hashes (uint64 [2, n]) as strings [n]."""
    n = hashes.shape[1]
    quads = hashes.T.astype("<u8", order="C").view("<u2")[:, : HEX // 4]
    ends = np.arange(n + 1, dtype=np.int32) * HEX
    return pa.StringArray.from_buffers(n, pa.py_buffer(ends), pa.py_buffer(QUADS.take(quads)))
