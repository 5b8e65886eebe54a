"""How many pixels the pictures coded in an AVIF really have.

A decoder scales what is coded to the size that the file's header states, so the header may state a
small picture and hold one that fills memory. The layout is that of ISO/IEC 14496-12 and 23008-12
(boxes, ``iloc``), and AV1's specification, 5.3 to 5.5 (open bitstream units, sequence header).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

UNITS = 1000  # of a picture; a still has about three
ITEMS = 1000  # and boxes, of which a picture has a dozen
_SEQUENCE_HEADER = 1


def coded_pixels(data: bytes) -> int:
    """The pixels of all pictures coded in an AVIF, its alpha and its tiles among them.

    Raises `ValueError` for what is no such file, or a sequence of pictures.
    """
    boxes = dict(_boxes(data, 0, len(data)))
    if b"moov" in boxes:
        raise ValueError("a sequence of pictures")
    start, end = boxes.get(b"meta", (0, 0))
    items = dict(_boxes(data, start + 4, end)).get(b"iloc")
    if items is None:
        raise ValueError("it lists no pictures")
    total = 0
    for at, size in _items(data, *items):
        if at + size > len(data):
            raise ValueError("an item ends behind the file")
        total += _largest(data, at, at + size)
    return total


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The boxes between two places: name, and where the content begins and ends."""
    for _ in range(ITEMS):
        if start + 8 > end:
            return
        size, name = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1:
            (size,), head = struct.unpack_from(">Q", data, start + 8), 16
        size = size or end - start
        if size < head or start + size > end:
            raise ValueError("a box does not fit")
        yield name, (start + head, start + size)
        start += size
    raise ValueError(f"more than {ITEMS} boxes")


def _items(data: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where the items in the file begin, and their sizes; those in one piece, as AV1 has to be."""
    at = start

    def number(size: int) -> int:
        nonlocal at
        at += size
        if at > end:
            raise ValueError("its list of items ends too early")
        return int.from_bytes(data[at - size : at])

    version = number(4) >> 24
    sizes = number(2)
    offset, length, base, index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    count = number(4 if version == 2 else 2)
    if count > ITEMS:
        raise ValueError(f"more than {ITEMS} items")
    for _ in range(count):
        number(4 if version == 2 else 2)  # its id
        method = number(2) & 15 if version else 0
        number(2)  # of which file
        first = number(base)
        extents = []
        for _ in range(number(2)):
            number(index if version else 0)
            extents.append((first + number(offset), number(length)))
        if method == 0 and extents:
            if len(extents) > 1:
                raise ValueError("an item in pieces")
            yield extents[0]


def _largest(data: bytes, start: int, end: int) -> int:
    """The pixels of the largest sequence header among an item's units; 0 for other items.

    What no decoder can go on after ends it; bits that decoders pass over are passed over.
    """
    largest = 0
    for _ in range(UNITS):
        if start >= end:
            return largest
        head = data[start]
        start += 2 if head & 0x04 else 1
        size, start = _leb128(data, start, end) if head & 0x02 else (end - start, start)
        if head >> 3 & 15 == _SEQUENCE_HEADER:
            largest = max(largest, _frame(data[start : start + min(size, 64)]))
        start += size
    raise ValueError(f"more than {UNITS} units")


def _leb128(data: bytes, start: int, end: int) -> tuple[int, int]:
    value = 0
    for i in range(8):
        if start + i >= end:
            break
        value |= (data[start + i] & 0x7F) << 7 * i
        if not data[start + i] & 0x80:
            return value, start + i + 1
    return 0, end


def _frame(header: bytes) -> int:
    """Width times height in a sequence header."""
    bits = int.from_bytes(header.ljust(64, b"\0"))
    at = 512

    def number(size: int) -> int:
        nonlocal at
        at -= size
        return bits >> at & (1 << size) - 1 if at >= 0 else 0

    number(3 + 1)  # profile, still picture
    if number(1):  # a reduced header
        number(5)
    else:
        if number(1):
            raise ValueError("a sequence with a timing")
        delays = number(1)
        for _ in range(number(5) + 1):
            number(12)
            if number(5) > 7:
                number(1)
            if delays and number(1):
                number(4)
    wide, high = number(4) + 1, number(4) + 1
    return (number(wide) + 1) * (number(high) + 1)
