"""Columns that lie on the disk instead of in memory: written once, mapped, and used as any other.

Arrow reads a mapped file as it reads memory, so nobody who uses a column has to know. Pages that
were looked at are the system's to take away, and `give_back` lets it have them at once.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

STEP = 1 << 17  # rows of a table that are looked at together
LEAST = 1 << 20  # bytes: smaller tables stay in memory

_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if hasattr(mmap, "MADV_DONTNEED") else None


class Shelf:
    """A file without a name that tables are put on; it goes with the last of them.

    Parameters
    ----------
    folder
        Where the file lies: on a disk, not in memory. None, and a folder that takes no file, keep
        all tables in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None

    def put(self, table: pa.Table) -> pa.Table:
        """The same table, mapped from the disk; small ones as they are."""
        if self._folder is None or table.nbytes < LEAST:
            return table
        if self._file is None:
            try:
                self._file = TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            except OSError:  # a run of somebody else's, to be read only
                self._folder = None
                return table
            weakref.finalize(self, self._file.close)  # maps hold the file themselves
        start = -(-self._file.seek(0, 2) // mmap.ALLOCATIONGRANULARITY)
        start *= mmap.ALLOCATIONGRANULARITY
        self._file.seek(start)
        with pa.ipc.new_stream(self._file, table.schema) as stream:
            stream.write_table(table)
        size = self._file.tell() - start
        mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ, offset=start)
        follow(mapped)
        with pa.ipc.open_stream(pa.py_buffer(mapped)) as stream:
            return stream.read_all()


def take(table: pa.Table, rows: npt.ArrayLike) -> pa.Table:
    """Rows of a table, in the order asked; Arrow itself would join all of its chunks first."""
    wanted, order = np.unique(np.asarray(rows, np.int64), return_inverse=True)
    parts = [table.slice(0, 0)]
    for start in np.unique(wanted // STEP).tolist():
        first, last = np.searchsorted(wanted, [start * STEP, (start + 1) * STEP])
        parts.append(
            table.slice(start * STEP, STEP).take(pa.array(wanted[first:last] - start * STEP))
        )
        give_back()
    return pa.concat_tables(parts).take(pa.array(order))


def follow(mapped: mmap.mmap) -> None:
    """Let `give_back` know of a map."""
    _maps.add(mapped)


def give_back() -> None:
    """Give the memory of all mapped tables back, which are read again where they are looked at.

    And what Arrow has kept of tables that are no more, and the C library of arrays.
    """
    pa.default_memory_pool().release_unused()
    if _trim is not None:
        _trim(0)
    if hasattr(mmap, "MADV_DONTNEED"):
        for mapped in list(_maps):
            mapped.madvise(mmap.MADV_DONTNEED)
