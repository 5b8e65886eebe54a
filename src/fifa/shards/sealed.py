"""Files that carry a digest of themselves: one that was changed or cut short is told, not believed.

The digest stands in the file, so that both are there or neither: in a table's own metadata, as a
key of a JSON object, in a comment of YAML, behind an array. It is over the whole file, its own 32
characters read as zeros.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO

import xxhash

from fifa.errors import FifaError

SEAL = "fifa.digest"
BLANK = "0" * 32  # what stands in its place until the rest is written
_MARK = re.compile(rb'fifa\.digest(?:\x18 |": ?"|: )([0-9a-f]{32})')
_END = 1 << 16  # bytes at either end of a file where it is looked for


class DamagedError(FifaError):
    """A file of fifa's own is not there, or not what fifa wrote."""

    def __init__(self, where: str, do: str | None = None, *, missing: bool = False) -> None:
        super().__init__(
            "the file is missing"
            if missing
            else "the file is damaged, or was changed after fifa wrote it",
            where=where,
            do=do or "remove the file: the command that made it makes it again",
        )


def seal(file: BinaryIO) -> None:
    """Put the digest where a file that is open for reading and writing has `BLANK` for it."""
    place = _place(file)
    assert place is not None, "the file has no place for its digest"
    found = _digest(file, place)
    file.seek(place)
    file.write(found)


def is_whole(file: BinaryIO) -> bool:
    """Whether a file that is open for reading has its digest, and it is the right one."""
    place = _place(file)
    if place is None:
        return False
    file.seek(place)
    return file.read(len(BLANK)) == _digest(file, place)


def has_seal(data: bytes) -> bool:
    """Whether a file's bytes have a digest, right or wrong."""
    return bool(_MARK.search(data[:_END]) or _MARK.search(data[-_END:]))


def check_whole(path: Path, do: str | None = None) -> None:
    """Raise `DamagedError` for a file that is not whole or not there.

    `FifaError` for one that cannot be read.
    """
    try:
        with path.open("rb") as file:
            whole = is_whole(file)
    except FileNotFoundError as error:
        raise DamagedError(str(path), do, missing=True) from error
    except OSError as error:
        raise FifaError(
            f"cannot read a file of the run: {error.strerror}", where=str(path), do=do
        ) from error
    if not whole:
        raise DamagedError(str(path), do)


def _place(file: BinaryIO) -> int | None:
    size = file.seek(0, os.SEEK_END)
    for start in (max(0, size - _END), 0):
        file.seek(start)
        found = list(_MARK.finditer(file.read(_END)))
        if found:
            return start + found[-1].start(1)
    return None


def _digest(file: BinaryIO, place: int) -> bytes:
    h = xxhash.xxh3_128()
    file.seek(0)
    left = place
    while left:
        block = file.read(min(left, 1 << 24))
        h.update(block)
        left -= len(block)
    h.update(BLANK.encode())
    file.seek(place + len(BLANK))
    while block := file.read(1 << 24):
        h.update(block)
    return h.hexdigest().encode()
