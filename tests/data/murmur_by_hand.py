"""MurmurHash3_x64_128 of one key in plain Python integers."""

from __future__ import annotations

MASK = 2**64 - 1
FIRST, SECOND = 0x87C37B91114253D5, 0x4CF5AD432745937F


def rotated(x: int, bits: int) -> int:
    return (x << bits | x >> (64 - bits)) & MASK


def scrambled(k: bytes, factor: int, bits: int, other: int) -> int:
    return rotated(int.from_bytes(k, "little") * factor & MASK, bits) * other & MASK


def avalanche(k: int) -> int:
    k = (k ^ k >> 33) * 0xFF51AFD7ED558CCD & MASK
    k = (k ^ k >> 33) * 0xC4CEB9FE1A85EC53 & MASK
    return k ^ k >> 33


def murmur3_by_hand(key: bytes) -> tuple[int, int]:
    """h1 and h2, seed 0."""
    h1 = h2 = 0
    blocks = len(key) // 16
    for i in range(blocks):
        block = key[16 * i : 16 * i + 16]
        h1 ^= scrambled(block[:8], FIRST, 31, SECOND)
        h1 = ((rotated(h1, 27) + h2) * 5 + 0x52DCE729) & MASK
        h2 ^= scrambled(block[8:], SECOND, 33, FIRST)
        h2 = ((rotated(h2, 31) + h1) * 5 + 0x38495AB5) & MASK
    rest = key[16 * blocks :]
    h2 ^= scrambled(rest[8:], SECOND, 33, FIRST)
    h1 ^= scrambled(rest[:8], FIRST, 31, SECOND)
    h1, h2 = h1 ^ len(key), h2 ^ len(key)
    h1 = (h1 + h2) & MASK
    h2 = (h2 + h1) & MASK
    h1, h2 = avalanche(h1), avalanche(h2)
    h1 = (h1 + h2) & MASK
    return h1, (h2 + h1) & MASK
