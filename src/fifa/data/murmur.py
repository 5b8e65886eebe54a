"""MurmurHash3_x64_128 of a column of strings: all rows in step, a word of 8 bytes at a time.

A million calls of a hash function take Python longer than the bytes do. Here every operation is
numpy's, over thousands of rows, and leaves the interpreter to other threads meanwhile.

Source: Austin Appleby, MurmurHash3.cpp (github.com/aappleby/smhasher, in the public domain).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from fifa.data.columns import Text

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
