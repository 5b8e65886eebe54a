"""Names of prompts and pairs: content hashes that no path, order or side gets into.

XXH3-128 names a prompt. Image keys are hashed by MurmurHash3_x64_128, a whole column of them in
step, a word of 8 bytes at a time: a million calls of a hash function take Python longer than the
bytes do, and numpy leaves the interpreter to other threads meanwhile. Source: Austin Appleby,
MurmurHash3.cpp (github.com/aappleby/smhasher, in the public domain).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from fifa.data.columns import Text

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
        The sum of `fifa.data.ids.murmur3` of the pair's two keys: uint64 [2, n].

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


def hex_strings(hashes: np.ndarray) -> pa.StringArray:
    """The first `HEX` hex characters of hashes (uint64 [2, n]) as strings [n]."""
    n = hashes.shape[1]
    quads = hashes.T.astype("<u8", order="C").view("<u2")[:, : HEX // 4]
    ends = np.arange(n + 1, dtype=np.int32) * HEX
    return pa.StringArray.from_buffers(n, pa.py_buffer(ends), pa.py_buffer(QUADS.take(quads)))


NEAR = 16_384  # rows hashed together: what is made of them stays in the processor's cache
WORD, BLOCK = 8, 16  # bytes
OWN = np.array([(1 << 8 * own) - 1 for own in range(WORD + 1)], np.uint64)


def murmur3(keys: Text) -> np.ndarray:
    """The 128 bits of every string, seed 0: uint64 [2, n], the function's h1 and h2.

    ``keys`` [n] has no nulls. Time grows with the longest of every `NEAR` keys.
    """
    hashes = np.zeros((2, len(keys)), np.uint64)
    row = 0
    for chunk in keys.chunks if isinstance(keys, pa.ChunkedArray) else [keys]:
        data = np.frombuffer(chunk.buffers()[2] or b"", np.uint8)
        ends = np.frombuffer(chunk.buffers()[1] or bytes(4), np.int32)[chunk.offset :]
        for at in range(0, len(chunk), NEAR):
            near = ends[at : min(at + NEAR, len(chunk)) + 1].astype(np.int64)
            _strings(hashes[:, row : row + len(near) - 1], data[near[0] :], near - near[0])
            row += len(near) - 1
    return hashes


def _strings(h: np.ndarray, data: np.ndarray, ends: np.ndarray) -> None:
    """Hash the n >= 1 strings data[ends[i]:ends[i + 1]] into ``h`` (uint64 [2, n], zeros)."""
    length, order = np.diff(ends), None
    n, longest, total = len(length), int(length.max()), int(ends[-1])
    if (length == longest).all():
        length = length[0]
    else:  # the longest first: those that have one more block are the first rows
        order = np.argsort(-length, kind="stable")
        ends, length = ends[order], length[order]
    if len(data) < total + BLOCK:  # words are read beyond a string's end
        data = np.append(data, np.zeros(BLOCK, np.uint8))
    anywhere = np.ndarray((len(data) - WORD + 1,), "<u8", data, strides=(1,))

    def word(offset: int | np.ndarray, rows: int) -> np.ndarray:
        """The 8 bytes at ``offset`` in each of the first rows, whether they are its own or not."""
        if order is None:
            return np.ndarray((n,), "<u8", data, int(offset), strides=(longest,)).copy()
        found: np.ndarray = anywhere[ends[:rows] + offset]
        return found

    for start in range(0, longest - BLOCK + 1, BLOCK):
        rows = n if order is None else int(np.searchsorted(-length, -start - BLOCK, "right"))
        _mix(h[0, :rows], h[1, :rows], word(start, rows), word(start + WORD, rows))
    rest = length % BLOCK
    h[0] ^= _scrambled(word(length - rest, n) & OWN[np.minimum(rest, WORD)], *FIRST)
    if (rest > WORD).any():
        second = np.minimum(length - rest + WORD, length)
        h[1] ^= _scrambled(word(second, n) & OWN[np.maximum(rest - WORD, 0)], *SECOND)
    _finish(h, length.astype(np.uint64))
    if order is not None:
        h[:, order] = h.copy()


# A word's factors before and after its rotation, and the bits of that.
FIRST = (np.uint64(0x87C37B91114253D5), 31, np.uint64(0x4CF5AD432745937F))
SECOND = (np.uint64(0x4CF5AD432745937F), 33, np.uint64(0x87C37B91114253D5))


def _mix(h1: np.ndarray, h2: np.ndarray, k1: np.ndarray, k2: np.ndarray) -> None:
    """Take a block (k1, k2) into the state (h1, h2); k1 and k2 are used up."""
    h1 ^= _scrambled(k1, *FIRST)
    _rotate(h1, 27)
    h1 += h2
    h1 *= np.uint64(5)
    h1 += np.uint64(0x52DCE729)
    h2 ^= _scrambled(k2, *SECOND)
    _rotate(h2, 31)
    h2 += h1
    h2 *= np.uint64(5)
    h2 += np.uint64(0x38495AB5)


def _scrambled(k: np.ndarray, before: np.uint64, bits: int, after: np.uint64) -> np.ndarray:
    k *= before
    _rotate(k, bits)
    k *= after
    return k


def _rotate(x: np.ndarray, bits: int) -> None:
    low = x >> np.uint64(64 - bits)
    x <<= np.uint64(bits)
    x |= low


def _finish(h: np.ndarray, length: np.ndarray | np.uint64) -> None:
    """What follows the last block: the length comes in, and every bit reaches every other."""
    h ^= length
    h[0] += h[1]
    h[1] += h[0]
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h ^= h >> np.uint64(33)
        h *= np.uint64(factor)
    h ^= h >> np.uint64(33)
    h[0] += h[1]
    h[1] += h[0]
